"""Live tracking: what a training measures, told to TensorBoard, W&B or MLflow while it runs.

`Tracker` has an open run there for each run here, under the run's name, and one for a sweep's
report. What it tells is known anyway: it asks the device for nothing. Each of them is told in a
thread of its own, so that a slow one keeps nobody waiting; one that fails is given up.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from bitfit.tracking.services import KINDS
from utils import UserError, convert_errors, first_line

if TYPE_CHECKING:  # -h imports this module, and no torch
    import torch

    from bitfit.model.run_stack import Run

LOGGER = logging.getLogger("bitfit")


class TrackedState(Protocol):
    """The part of a training's state that trackers read."""

    plan: Any
    stack: Any
    records: list
    epoch: int
    step: int
    seconds: float


def connect(kinds: Sequence[str], output: Path) -> None:
    """See whether all can be reached; UserError for one that cannot."""
    for kind in kinds:
        with convert_errors(
            lambda error, kind=kind: UserError(f"--report-to {kind}: {first_line(error)}")
        ):
            KINDS[kind].connect(output)


def peak_gib(device: "torch.device") -> float:
    """The most memory this process has had: of a GPU, or of the machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def examples_per_second(state: TrackedState, since: tuple[int, int, float] | None = None) -> float:
    """Of each run, in this epoch since (epoch, step, seconds), or since its start."""
    epoch, step, seconds = since or (None, 0, 0.0)
    if epoch != state.epoch:
        step, seconds = 0, 0.0
    rows = min(state.step * state.plan.batch_size, state.plan.rows_per_run)
    return (rows - step * state.plan.batch_size) / (state.seconds - seconds)


class Tracker:
    """{tracker: {run's name: its run there}} in `open`; without trackers it does nothing."""

    def __init__(
        self,
        kinds: Sequence[str] = (),
        output: str | Path | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            kinds: some of `KINDS`.
            output: the command's output folder.
            facts: {name: value} that each run shows beside its learning rate and seed.
        """
        self.open: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        self.output, self.facts = output and Path(output), facts or {}
        self.threads = {kind: ThreadPoolExecutor(1) for kind in kinds}
        self.told: dict[str, Future] = {}
        self.step, self.before = 0, (0, 0, 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tell(lambda runs: [run.close(failed=True) for run in runs.values()])
        for thread in self.threads.values():
            thread.shutdown()

    def begin(self, state: TrackedState, folders: dict["Run", Path]) -> None:
        """Open the runs of a `bitfit.training.loop.State` that have a folder: {run: folder}."""
        if self.open:
            self._place(state)
            for run, folder in folders.items():
                self._open(run.name, folder, run._asdict())

    def watch(self, state: TrackedState, losses: dict[int, float]) -> None:
        """Within an epoch: {run's number: its loss in the last step}. Some looks may be left out,
        where a tracker is slower than they come; so is that after the last step, for `note`."""
        measured = {k: {"train/loss": loss} for k, loss in losses.items()}
        if state.step < state.plan.steps_per_epoch:
            self._log(state, measured, since=self.before, skippable=True)

    def note(self, state: TrackedState, scores: list[tuple]) -> None:
        """After an epoch: its mean losses, and the rows of scores there are."""
        measured = {}
        for k, record in enumerate(state.records):
            own = [row[2:] for row in scores if row[0] == record.run.name]
            if not record.diverged:
                measured[k] = {"train/mean_loss": record.train_loss[-1]}
                measured[k] |= {f"{split}/{metric}": value for split, metric, value in own}
        self._log(state, measured)

    def results(self, name: str, folder: Path, text: str, diverged: str | None = None) -> None:
        """The end of a run, or of a sweep: the pictures in its folder, and a table as text."""
        self._open(name, folder, {})
        step, pictures = self.step, sorted(folder.glob("*.png"))
        text = "\n".join(filter(None, (text, diverged)))

        def tell(runs: dict[str, Any]) -> None:
            run = runs.pop(name)
            run.results(step, pictures, text)
            run.close(failed=bool(diverged))

        self._tell(tell)

    def _place(self, state: TrackedState) -> None:
        self.before = state.epoch, state.step, state.seconds
        self.step = state.epoch * state.plan.steps_per_epoch + state.step

    def _log(
        self,
        state: TrackedState,
        measured: dict[int, dict[str, float]],
        since: tuple[int, int, float] | None = None,
        skippable: bool = False,
    ) -> None:
        """Tell what was measured of some runs, with what is known of all; the speed is that since
        an earlier place in this epoch, or since its start."""
        if not self.open:
            return
        self._place(state)
        plan, step, factor = state.plan, self.step, state.plan.factors[self.step - 1]
        common = {"epoch": step / plan.steps_per_epoch}
        common |= {"peak_memory_gib": peak_gib(state.stack.params.device)}
        common |= {"train/examples_per_second": examples_per_second(state, since)}
        rows = {}
        for k, own in measured.items():
            run = state.stack.runs[k]
            rows[run.name] = common | {"train/learning_rate": run.learning_rate * factor} | own

        def tell(runs: dict[str, Any]) -> None:
            for name in rows.keys() & runs.keys():
                runs[name].log(step, rows[name])

        self._tell(tell, skippable)

    def _open(self, name: str, folder: Path, facts: dict[str, Any]) -> None:
        """Open a run, here and now, where it is not open."""
        for kind, runs in list(self.open.items()):

            def make(kind: str = kind, runs: dict[str, Any] = runs) -> None:
                own = self.facts | facts
                runs[name] = KINDS[kind](self.output, name, folder, own, self.step)

            if name not in runs:
                self._try(kind, make)

    def _tell(self, work: Callable, skippable: bool = False) -> None:
        """Do `work(the open runs)` for every tracker in its thread; or not, if that is busy."""
        for kind, runs in list(self.open.items()):
            if not skippable or kind not in self.told or self.told[kind].done():
                self.told[kind] = self.threads[kind].submit(self._try, kind, partial(work, runs))

    def _try(self, kind: str, work: Callable[[], object]) -> None:
        try:
            if kind in self.open:
                work()
        except Exception as error:
            self.open.pop(kind, None)
            what = f"{type(error).__name__}: {first_line(error)}"
            LOGGER.warning("--report-to %s failed and is off; training goes on: %s", kind, what)


OFF = Tracker()
