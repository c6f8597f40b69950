"""Checkpoints: what a training needs to go on as if it had never stopped.

Each is an entry of `store`, numbered; the one before the newest is kept in case the newest is
damaged later.
"""

import logging
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model.run_stack import Run
from bitfit.model.token_budget import random_state, set_random_state
from bitfit.signals import Stopped, StopSignals
from bitfit.training import store
from bitfit.training.loop import Record, TrainState, evaluations
from utils import CorruptFile, as_list

LOGGER = logging.getLogger("bitfit")
KEPT = 2


class Saver:
    """Writes a checkpoint when one is due, and stops where a signal asks for it."""

    def __init__(
        self,
        folder: Path | None = None,
        every: int = 1,
        minutes: float | None = None,
        signals: StopSignals | None = None,
        group: Group = SINGLE_PROCESS,
    ) -> None:
        """
        Args:
            folder: where checkpoints go; None: nothing is written.
            every: write one after so many epochs; 0: not for epochs.
            minutes: and after so many minutes, within an epoch too; None: not for time.
            signals: `bitfit.signals.StopSignals`; None: nothing stops the training.
            group: the ranks that train together: they write one checkpoint, and stop together.
        """
        self.folder = folder and Path(folder)
        self.every, self.minutes, self.signals = every, minutes, signals or StopSignals()
        self.group, self.written, self.saved = group, time.monotonic(), None

    def held(self, waits: bool = True) -> AbstractContextManager[None]:
        """Within: a signal waits for `after_step`, or does not."""
        return self.signals.deferred(waits)

    def after_step(self, state: TrainState) -> None:
        self.visit(state, self.minutes and time.monotonic() - self.written > 60 * self.minutes)

    def after_epoch(self, state: TrainState, last: bool) -> None:
        self.visit(state, self.every and (last or state.epoch % self.every == 0))

    def visit(self, state: TrainState, due: object) -> None:
        """Write a checkpoint that is due; on a signal write one anyway, and raise Stopped."""
        due, stops = self.group.all_reduce_max(due, self.signals.received)
        if due or (stops and self.saved != (state.epoch, state.step)):
            self.save(state)
        if stops:
            raise Stopped(int(stops))

    def save(self, state: TrainState) -> None:
        if not self.folder:
            return
        begin = time.perf_counter()
        content = capture(state)
        if self.group.rank == 0:
            self.folder.mkdir(exist_ok=True)
            numbers = found(self.folder)
            store.write(path_of(self.folder, numbers[-1] + 1 if numbers else 1), *content)
            drop_older(self.folder)
        self.group.barrier()  # nobody goes on, or ends, before it is written
        self.written, self.saved = time.monotonic(), (state.epoch, state.step)
        for record in state.records:
            record.seconds["checkpoints"] += (time.perf_counter() - begin) / len(state.records)

    def load(self, state: TrainState) -> None:
        """Put the newest good checkpoint into `state`; CorruptFile if there are some, none good."""
        numbers = found(self.folder) if self.folder and self.folder.is_dir() else []
        for number in reversed(numbers):
            try:
                restore(state, *store.read(path_of(self.folder, number)))
            except CorruptFile as error:
                LOGGER.warning("checkpoint %s; the one before it is tried", error)
                continue
            LOGGER.info("resumed after %d epochs and %d steps", state.epoch, state.step)
            return
        if numbers:
            what = "can be used: remove that folder to start over"
            raise CorruptFile(f"no checkpoint in {self.folder} {what}")


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.json"


def found(folder: Path) -> list[int]:
    """The numbers of the checkpoints in a folder, rising."""
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def drop_older(folder: Path) -> None:
    """Keep the newest checkpoints; tensors that a kill left without their JSON go too."""
    for number in found(folder)[:-KEPT]:
        path_of(folder, number).unlink()
    for path in folder.glob("*.safetensors"):
        if not path.with_suffix(".json").exists():
            path.unlink()


def capture(state: TrainState) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (facts, tensors on the host): the state that changes and the random generators."""
    tensors = {"values": state.stack.params, "bad_step": state.stack.bad_step}
    tensors["loss_sum"] = state.loss_sum
    if state.best is not None:
        tensors["best"] = state.best
    for k, own in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{k}.{name}": value for name, value in own.items()}
    for split, logits in state.logits.items():
        tensors[f"logits.{split}"] = torch.from_numpy(logits[: evaluations(state)])
    generators = state.plan.group.all_gather(random_state(state.stack.params.device))
    tensors |= {f"random.{i}": generator for i, generator in enumerate(generators)}
    facts = {name: getattr(state, name) for name in ("epoch", "step", "seconds", "scores")}
    limits = state.plan.group.all_gather([torch.tensor([state.plan.token_budget.max_tokens])])
    facts |= {"max_tokens": [limit.item() for limit in limits]}
    facts |= {"records": [asdict(record) for record in state.records]}
    return facts, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore(state: TrainState, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint into a state of the same runs on the same model; else CorruptFile."""
    stack, device = state.stack, state.stack.params.device
    records = [Record(**record | {"run": Run(*record["run"])}) for record in facts["records"]]
    if [r.run for r in records] != stack.runs or tensors["values"].shape != stack.params.shape:
        raise CorruptFile("it is of other runs or another model")
    stack.params.copy_(tensors["values"])
    stack.bad_step.copy_(tensors["bad_step"])
    if state.best is not None:
        state.best.copy_(tensors["best"])
    for k, group in enumerate(state.optimizer.param_groups):
        begin = f"optimizer.{k}."
        own = {
            n.removeprefix(begin): t.to(device) for n, t in tensors.items() if n.startswith(begin)
        }
        if own:
            state.optimizer.state[group["params"][0]] = own
    group, budget = state.plan.group, state.plan.token_budget
    names = [name for name in tensors if name.startswith("random.")]
    each = len(names) // group.size
    first = group.rank * each
    set_random_state(device, [tensors[f"random.{first + i}"] for i in range(each)])
    budget.max_tokens = min(budget.max_tokens, as_list(facts["max_tokens"])[group.rank])
    state.records = records
    state.loss_sum.copy_(tensors["loss_sum"])
    state.scores = [tuple(score) for score in facts["scores"]]
    for split, logits in state.logits.items():
        kept = tensors[f"logits.{split}"].numpy()
        logits[: len(kept)] = kept
    state.epoch, state.step, state.seconds = facts["epoch"], facts["step"], facts["seconds"]
