"""Clients of TensorBoard, W&B and MLflow with the same methods: log values, log results, close.

A client's constructor imports the tracker's package and opens a run. Exceptions of the packages
pass through.
"""

import html
import json
import os
import secrets
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfit.files import write_text
from utils import LOGGER

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_SECONDS = 5  # how late TensorBoard's files may be
CODE = "    "  # at the start of lines that Markdown shows unchanged
MAX_PARAMETER_LENGTH = 6000  # characters, MLflow's limit


def kept_id(folder: Path, kind: str, make: Callable[[], str]) -> str:
    """Return the id of a run at a tracker, from tracking.json if the run is resumed."""
    path = folder / "tracking.json"
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kind not in ids:
        ids[kind] = make()
        write_text(path, json.dumps(ids, indent=2) + "\n")
    return ids[kind]


class TensorBoard:
    """A run as event files, in <output>/tensorboard/<run>/."""

    @staticmethod
    def connect(output: Path) -> None:
        import torch.utils.tensorboard  # noqa: F401

    def __init__(
        self, output: Path, name: str, folder: Path, metadata: dict[str, Any], step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # `purge_step` hides values that a killed process wrote after the last checkpoint, because
        # the resumed run writes them again.
        self.writer = SummaryWriter(
            output / "tensorboard" / name, purge_step=step + 1, flush_secs=FLUSH_SECONDS
        )
        self.writer.add_text("flags", textwrap.indent(json.dumps(metadata, indent=2), CODE), step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def results(self, step: int, pictures: list[Path], text: str) -> None:
        from matplotlib.image import imread

        for path in pictures:
            self.writer.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")
        self.writer.add_text("results", textwrap.indent(text, CODE), step)

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
        self.first_step = self.run.step  # above 0 in a resumed run, unless it is offline
        if not (self.run.offline or self.run.disabled):
            LOGGER.info("W&B: %s", self.run.url)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self.first_step:
            self.run.log(values, step=step)

    def results(self, step: int, pictures: list[Path], text: str) -> None:
        import wandb

        shown = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures}
        shown["results"] = wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self.log(max(step, self.first_step), shown)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, in the experiment of the output folder's name."""

    @staticmethod
    def connect(output: Path) -> None:
        from mlflow import MlflowClient

        MLflow.experiment(MlflowClient(), output)

    @staticmethod
    def experiment(client: "MlflowClient", output: Path) -> str:
        name = output.resolve().name
        found = client.get_experiment_by_name(name)
        is_active = found and found.lifecycle_stage == "active"
        # For a deleted experiment, `create_experiment` raises an error with an explanation.
        return found.experiment_id if is_active else client.create_experiment(name)

    def __init__(
        self, output: Path, name: str, folder: Path, metadata: dict[str, Any], step: int
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = client = MlflowClient()
        created = []

        def make() -> str:
            created.append(client.create_run(self.experiment(client, output), run_name=name))
            return created[0].info.run_id

        self.id = kept_id(folder, "mlflow", make)
        if created:
            params = [Param(n, str(value)[:MAX_PARAMETER_LENGTH]) for n, value in metadata.items()]
            client.log_batch(self.id, params=params)
        else:
            client.update_run(self.id, status="RUNNING")
        self.logged_epoch = client.get_run(self.id).data.metrics.get("epoch", 0.0)

    def log(self, step: int, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if values["epoch"] > self.logged_epoch:
            now = int(1000 * time.time())
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            self.client.log_batch(self.id, metrics=metrics)

    def results(self, step: int, pictures: list[Path], text: str) -> None:
        for path in pictures:
            self.client.log_artifact(self.id, str(path))
        self.client.log_text(self.id, text, "results.txt")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


KINDS: dict[str, Any] = {  # {name of the package: client}
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
