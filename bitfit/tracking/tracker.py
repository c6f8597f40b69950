"""Live tracking: losses and scores of a training at TensorBoard, W&B or MLflow.

A tracker shows one run for each run of the command, under the same name, and one for the report of
a sweep. All values are on the host, so logging never waits for the device. Every tracker has a
separate thread, so a slow tracker delays nobody. A tracker that fails is switched off.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from bitfit.tracking.services import KINDS
from utils import LOGGER, UserError, convert_errors, first_line

if TYPE_CHECKING:  # -h imports this module and must not import torch
    import torch

    from bitfit.model.run import Run


class TrackedState(Protocol):
    """The part of a training's state that trackers read."""

    plan: Any
    stack: Any
    records: list
    epoch: int
    step: int
    seconds: float


def check_connections(kinds: Sequence[str], output: Path) -> None:
    """Raise a UserError for a tracker that cannot be reached."""
    kind = ""
    with convert_errors(lambda error: UserError(f"--report-to {kind}: {first_line(error)}")):
        for kind in kinds:
            KINDS[kind].connect(output)


def peak_gib(device: "torch.device") -> float:
    """Return the peak memory of this process in GiB: of a GPU, or of the machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def examples_per_second(state: TrackedState) -> float:
    """Return the speed of one run since the start of the epoch."""
    examples_before = state.plan.examples_before
    examples = examples_before(state.epoch, state.step) - examples_before(state.epoch, 0)
    return examples / state.seconds


class Tracker:
    """Sends losses, scores and results to trackers. Without trackers nothing happens.

    `open_trackers` is {tracker: {name of a run: object of `bitfit.tracking.services`}}.
    """

    def __init__(
        self,
        kinds: Sequence[str] = (),
        output: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            kinds: some of `KINDS`.
            output: the command's output folder.
            metadata: {name: value} that all runs show beside learning rate and seeds.
        """
        self.open_trackers: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        self.output, self.metadata = output and Path(output), metadata or {}
        self.threads = {kind: ThreadPoolExecutor(1) for kind in kinds}
        self.pending: dict[str, Future] = {}
        self.step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._submit(lambda runs: [run.close(failed=True) for run in runs.values()])
        for thread in self.threads.values():
            thread.shutdown()

    def open_runs(self, state: TrackedState, folders: dict["Run", Path]) -> None:
        """Open the runs of a training at the trackers; `folders` is {run: folder}."""
        if self.open_trackers:
            self._set_step(state)
            for run, folder in folders.items():
                terms = {} if run.terms is None else {"bias_terms": run.terms.split()}
                self._open(run.name, folder, run.fields | terms)

    def log_losses(self, state: TrackedState, losses: dict[int, float]) -> None:
        """Log {number of a run: loss in the last step} within an epoch.

        A slow tracker misses some losses. `log_scores` logs the end of an epoch.
        """
        measured = {k: {"train/loss": loss} for k, loss in losses.items()}
        if state.step < state.plan.steps_per_epoch:
            self._log(state, measured, skippable=True)

    def log_scores(self, state: TrackedState, scores: list[tuple]) -> None:
        """Log the mean losses of an epoch, and the scores if there was an evaluation."""
        measured = {}
        for k, record in enumerate(state.records):
            of_run = [row[2:] for row in scores if row[0] == record.run.name]
            if len(record.train_loss) > state.epoch:  # it has not ended
                measured[k] = {"train/mean_loss": record.train_loss[-1]}
                measured[k] |= {f"{split}/{metric}": value for split, metric, value in of_run}
        self._log(state, measured)

    def log_results(self, name: str, folder: Path, text: str, diverged: str | None = None) -> None:
        """Log the figures and the table of a run or a sweep, and close the run at the trackers."""
        self._open(name, folder, {})
        step, pictures = self.step, sorted(folder.glob("*.png"))
        text = "\n".join(filter(None, (text, diverged)))

        def send(runs: dict[str, Any]) -> None:
            run = runs.pop(name)
            run.results(step, pictures, text)
            run.close(failed=bool(diverged))

        self._submit(send)

    def _set_step(self, state: TrackedState) -> None:
        self.step = state.epoch * state.plan.steps_per_epoch + state.step

    def _log(
        self, state: TrackedState, measured: dict[int, dict[str, float]], skippable: bool = False
    ) -> None:
        """Log values of some runs, together with epoch, memory, speed and learning rate.

        Args:
            measured: {number of a run: {name: value}}.
            skippable: do not send the values to busy trackers.
        """
        if not self.open_trackers:
            return
        self._set_step(state)
        plan, step, factor = state.plan, self.step, state.plan.factors[self.step - 1]
        common = {"epoch": step / plan.steps_per_epoch}
        common |= {"peak_memory_gib": peak_gib(state.stack.params.device)}
        common |= {"train/examples_per_second": examples_per_second(state)}
        rows = {}
        for k, of_run in measured.items():
            run = state.stack.runs[k]
            rows[run.name] = common | {"train/learning_rate": run.learning_rate * factor} | of_run

        def send(runs: dict[str, Any]) -> None:
            for name in rows.keys() & runs.keys():
                runs[name].log(step, rows[name])

        self._submit(send, skippable)

    def _open(self, name: str, folder: Path, metadata: dict[str, Any]) -> None:
        """Open a run, in this thread, at the trackers where the run is not open."""
        for kind, runs in list(self.open_trackers.items()):

            def make(kind: str = kind, runs: dict[str, Any] = runs) -> None:
                shown = self.metadata | metadata
                runs[name] = KINDS[kind](self.output, name, folder, shown, self.step)

            if name not in runs:
                self._try(kind, make)

    def _submit(self, work: Callable, skippable: bool = False) -> None:
        """Call `work` with the open runs in the thread of every tracker, or of every idle one."""
        for kind, runs in list(self.open_trackers.items()):
            if not skippable or kind not in self.pending or self.pending[kind].done():
                self.pending[kind] = self.threads[kind].submit(self._try, kind, partial(work, runs))

    def _try(self, kind: str, work: Callable[[], object]) -> None:
        try:
            if kind in self.open_trackers:
                work()
        except Exception as error:
            self.open_trackers.pop(kind, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            LOGGER.warning("--report-to %s failed and is off; training goes on: %s", kind, reason)


OFF = Tracker()
