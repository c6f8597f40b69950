"""Checkpoints, with which a training continues as if it had not been interrupted.

`CheckpointManager` decides when and where to write them; `TrainState` serializes itself.
Checkpoints are numbered entries of `store`. Two are kept, in case the newest is damaged later.
"""

import time
from collections.abc import Callable
from pathlib import Path

from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.signals import Stopped, StopSignals
from bitfit.training import store
from bitfit.training.state import TrainState
from utils import LOGGER, CorruptFile

KEPT = 2


class CheckpointManager:
    """Writes a checkpoint when it is due, and stops the training after a signal."""

    def __init__(
        self,
        folder: Path | None = None,
        every: int = 1,
        minutes: float | None = None,
        signals: StopSignals | None = None,
        group: Group = SINGLE_PROCESS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            folder: where checkpoints go; None: nothing is written.
            every: write a checkpoint after so many epochs; 0: not for epochs.
            minutes: also write one after so many minutes, within an epoch too; None: do not.
            signals: `bitfit.signals.StopSignals`; None: nothing stops the training.
            group: the ranks that train together: they write one checkpoint, and stop together.
            clock: returns the seconds that `minutes` is compared with.
        """
        self.folder = folder and Path(folder)
        self.every, self.minutes, self.signals = every, minutes, signals or StopSignals()
        self.group, self.clock = group, clock
        self.written_at = clock()
        self.saved: tuple[int, int] | None = None  # (epoch, step) of the newest checkpoint

    def after_step(self, state: TrainState) -> None:
        """Save if `minutes` have passed; raise Stopped after a signal."""
        elapsed = self.clock() - self.written_at
        self.save_if_due(state, elapsed > 60 * self.minutes if self.minutes else False)

    def after_epoch(self, state: TrainState, last: bool) -> None:
        """Save after every `every` epochs and the last; raise Stopped after a signal."""
        self.save_if_due(state, bool(self.every) and (last or state.epoch % self.every == 0))

    def save_if_due(self, state: TrainState, due: bool) -> None:
        """Save if it is due on any rank or a signal came; after a signal raise Stopped."""
        any_due, stops = self.group.all_reduce_max(due, self.signals.received or 0)
        if any_due or (stops and self.saved != (state.epoch, state.step)):
            self.save(state)
        if stops:
            raise Stopped(int(stops))

    def save(self, state: TrainState) -> None:
        """Write a checkpoint and remove older ones; without a folder do nothing."""
        if not self.folder:
            return
        begin = time.perf_counter()
        metadata, tensors = state.state_dict()
        if self.group.rank == 0:
            self.folder.mkdir(exist_ok=True)
            numbers = list_checkpoints(self.folder)
            path = checkpoint_path(self.folder, numbers[-1] + 1 if numbers else 1)
            store.write_entry(path, metadata, tensors)
            remove_older(self.folder)
        self.group.barrier()  # no rank goes on, or ends, before the checkpoint is written
        self.written_at, self.saved = self.clock(), (state.epoch, state.step)
        for record in state.records:
            record.seconds["checkpoints"] += (time.perf_counter() - begin) / len(state.records)

    def load(self, state: TrainState) -> None:
        """Load the newest good checkpoint into `state`, if there are checkpoints.

        Raises:
            CorruptFile: there are checkpoints, but none is good.
        """
        if not self.folder or not self.folder.is_dir():
            return
        numbers = list_checkpoints(self.folder)
        for number in reversed(numbers):
            try:
                state.load_state_dict(*store.read_entry(checkpoint_path(self.folder, number)))
            except CorruptFile as error:
                LOGGER.warning("checkpoint %s; the one before it is tried", error)
                continue
            LOGGER.info("resumed after %d epochs and %d steps", state.epoch, state.step)
            return
        if numbers:
            advice = "can be used: remove that folder to start over"
            raise CorruptFile(f"no checkpoint in {self.folder} {advice}")


def checkpoint_path(folder: Path, number: int) -> Path:
    """Return the path of a checkpoint's JSON file."""
    return folder / f"{number:06}.json"


def list_checkpoints(folder: Path) -> list[int]:
    """Return the numbers of the checkpoints in a folder in ascending order."""
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def remove_older(folder: Path) -> None:
    """Keep the newest checkpoints; also remove tensors that a kill left without their JSON."""
    for number in list_checkpoints(folder)[:-KEPT]:
        checkpoint_path(folder, number).unlink()
    for path in folder.glob("*.safetensors"):
        if not path.with_suffix(".json").exists():
            path.unlink()
