"""A run at TensorBoard, W&B or MLflow: each is opened, told numbers, then results, and closed.

Their packages are imported when they are asked for. What goes wrong is raised as they raise it.
"""

import html
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfit.files import write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGGER = logging.getLogger("bitfit")
FLUSH_SECONDS = 5  # how late TensorBoard's files may be
LONGEST_PARAMETER = 6000  # letters, MLflow's own limit


def kept_id(folder: Path, kind: str, make: Callable[[], str]) -> str:
    """Return the id of a run at a tracker. A resumed run keeps its id."""
    path = folder / "tracking.json"
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kind not in ids:
        ids[kind] = make()
        write_text(path, json.dumps(ids, indent=2) + "\n")
    return ids[kind]


def indented(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class TensorBoard:
    """A run as event files, in <output>/tensorboard/<run>/."""

    @staticmethod
    def connect(output: Path) -> None:
        import torch.utils.tensorboard  # noqa: F401

    def __init__(
        self, output: Path, name: str, folder: Path, metadata: dict[str, Any], step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        where = output / "tensorboard" / name
        # What a killed process wrote after its last checkpoint is hidden: it comes again.
        self.writer = SummaryWriter(where, purge_step=step + 1, flush_secs=FLUSH_SECONDS)
        self.writer.add_text("flags", indented(json.dumps(metadata, indent=2)), step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def results(self, step: int, pictures: list[Path], text: str) -> None:
        from matplotlib.image import imread

        for path in pictures:
            self.writer.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")
        self.writer.add_text("results", indented(text), step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, in the group of the output folder's name."""

    @staticmethod
    def connect(output: Path) -> None:
        import wandb

        if wandb.setup().settings.mode == "online":
            wandb.login()

    def __init__(
        self, output: Path, name: str, folder: Path, metadata: dict[str, Any], step: int
    ) -> None:
        import wandb

        group = os.environ.get("WANDB_RUN_GROUP", output.resolve().name)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bitfit"), group=group, name=name,
            id=kept_id(folder, "wandb", lambda: secrets.token_hex(4)), config=metadata,
            dir=os.environ.get("WANDB_DIR", str(output)), resume="allow", reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.begins = self.run.step  # of a run that goes on, unless offline
        if not (self.run.offline or self.run.disabled):
            LOGGER.info("W&B: %s", self.run.url)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self.begins:
            self.run.log(values, step=step)

    def results(self, step: int, pictures: list[Path], text: str) -> None:
        import wandb

        shown = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures}
        shown["results"] = wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self.log(max(step, self.begins), shown)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, in the experiment of the output folder's name."""

    @staticmethod
    def connect(output: Path) -> None:
        MLflow.experiment(MLflow.new_client(), output)

    @staticmethod
    def new_client() -> "MlflowClient":
        from mlflow import MlflowClient

        return MlflowClient()

    @staticmethod
    def experiment(client: "MlflowClient", output: Path) -> str:
        name = output.resolve().name
        found = client.get_experiment_by_name(name)
        there = found and found.lifecycle_stage == "active"  # create_ says what is wrong otherwise
        return found.experiment_id if there else client.create_experiment(name)

    def __init__(
        self, output: Path, name: str, folder: Path, metadata: dict[str, Any], step: int
    ) -> None:
        from mlflow.entities import Param

        self.client = client = self.new_client()
        made = []

        def make() -> str:
            made.append(client.create_run(self.experiment(client, output), run_name=name))
            return made[0].info.run_id

        self.id = kept_id(folder, "mlflow", make)
        if made:
            pairs = [Param(name, str(fact)[:LONGEST_PARAMETER]) for name, fact in metadata.items()]
            client.log_batch(self.id, params=pairs)
        else:
            client.update_run(self.id, status="RUNNING")
        self.begins = client.get_run(self.id).data.metrics.get("epoch", 0.0)

    def log(self, step: int, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if values["epoch"] > self.begins:
            now = int(1000 * time.time())
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            self.client.log_batch(self.id, metrics=metrics)

    def results(self, step: int, pictures: list[Path], text: str) -> None:
        for path in pictures:
            self.client.log_artifact(self.id, str(path))
        self.client.log_text(self.id, text, "results.txt")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


# By the names of their packages.
KINDS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
