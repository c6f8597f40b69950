"""Checkpoints: what a training needs to go on as if it had never stopped.

A checkpoint is two files, `<number>.safetensors` and then `<number>.json`, which holds the
position, the scores so far and the checksum of the first. Each is written under a temporary name,
flushed and renamed, so a checkpoint is there when its JSON is. The one before is kept until then.
A file that was torn or edited does not have its checksum, and the checkpoint before it is used.
"""

import hashlib
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitfit.checkpoints import write_tensors
from bitfit.compute import random_state, set_random_state
from bitfit.runs import Run, Stack
from bitfit.training import Plan, Position
from utils import CheckpointError, Stopped, write_text

LOGGER = logging.getLogger("bitfit")
FORMAT = 1
KEPT = 2  # the newest, and the one before it in case the newest is damaged later


@dataclass
class Training:
    """What one training works on, and all that changes on the way."""

    plan: Plan
    stack: Stack
    optimizers: list
    records: list
    best: torch.Tensor | None  # (K, n), with `keep` "best"
    position: Position


class Saver:
    """Writes a checkpoint when one is due, and stops where a signal asks for it."""

    def __init__(self, folder=None, every=1, minutes=None, signals=None):
        """
        Args:
            folder: where checkpoints go; None: nothing is written.
            every: write one after so many epochs; 0: not for epochs.
            minutes: and after so many minutes, within an epoch too; None: not for time.
            signals: `utils.Signals`; None: nothing stops the training.
        """
        self.folder = folder and Path(folder)
        self.every, self.minutes, self.signals = every, minutes, signals
        self.written, self.saved = time.monotonic(), None

    def held(self):
        """A signal waits for `after_step`."""
        return self.signals.held() if self.signals else nullcontext()

    def at_once(self):
        """A signal raises Stopped at once."""
        return self.signals.at_once() if self.signals else nullcontext()

    def after_step(self, training):
        waited = time.monotonic() - self.written
        if self.minutes and waited > 60 * self.minutes:
            self.save(training)
        if self.signals and self.signals.received:
            self.stop(training)

    def after_epoch(self, training, last):
        if self.every and (last or training.position.epoch % self.every == 0):
            self.save(training)
        if self.signals and self.signals.received:
            self.stop(training)

    def stop(self, training):
        """Write a checkpoint, if it is not there yet, and raise what the signal asks for."""
        if self.saved != at(training):
            self.save(training)
        raise Stopped(self.signals.received)

    def save(self, training):
        if not self.folder:
            return
        begin = time.perf_counter()
        self.folder.mkdir(exist_ok=True)
        numbers = found(self.folder)
        write(self.folder, numbers[-1] + 1 if numbers else 1, training)
        drop_older(self.folder)
        self.written, self.saved = time.monotonic(), at(training)
        for record in training.records:
            record.seconds["checkpoints"] += (time.perf_counter() - begin) / len(training.records)

    def load(self, training):
        """Put the newest good checkpoint into `training`; False if there never was one.

        Raises:
            CheckpointError: there are some, and none is good.
        """
        numbers = found(self.folder) if self.folder and self.folder.is_dir() else []
        for number in reversed(numbers):
            try:
                restore(training, *read(self.folder, number))
            except CheckpointError as error:
                LOGGER.warning("%s; the checkpoint before it is tried", error)
                continue
            position = training.position
            LOGGER.info("resumed after %d epochs and %d steps", position.epoch, position.step)
            return True
        if numbers:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: remove that folder to start over"
            )
        return False


def found(folder):
    """The numbers of the checkpoints in a folder, rising."""
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def drop_older(folder):
    """Keep the newest checkpoints; tensors that a kill left without their JSON go too."""
    for number in found(folder)[:-KEPT]:
        (folder / f"{number:06}.json").unlink()
    kept = {f"{number:06}" for number in found(folder)}
    for path in folder.glob("*.safetensors"):
        if path.stem not in kept:
            path.unlink()


def at(training):
    return training.position.epoch, training.position.step


def dump(facts):
    """The one way to write facts, so that no byte of them can change unseen."""
    return json.dumps(facts, separators=(",", ":")) + "\n"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write(folder, number, training):
    """Write checkpoint `number`: tensors, then facts."""
    path = folder / f"{number:06}.safetensors"
    write_tensors(path, tensors_of(training))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"format": FORMAT, "tensors_sha256": digest, "max_tokens": training.plan.limit.tokens}
    facts |= {"epoch": training.position.epoch, "step": training.position.step}
    facts |= {"seconds": training.position.seconds}
    facts |= {"records": [asdict(record) for record in training.records]}
    facts["sha256"] = sha256(dump(facts).encode())
    write_text(path.with_suffix(".json"), dump(facts))


def tensors_of(training):
    """{name: tensor on the host}: values, optimizer state, generators, sums."""
    stack = training.stack
    tensors = {"values": stack.values, "bad_step": stack.bad_step}
    tensors["loss_sum"] = training.position.loss_sum
    if training.best is not None:
        tensors["best"] = training.best
    for k, optimizer in enumerate(training.optimizers):
        for state in optimizer.state.values():
            tensors |= {f"optimizer.{k}.{name}": value for name, value in state.items()}
    states = random_state(stack.values.device)
    tensors |= {f"random.{i}": state for i, state in enumerate(states)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read(folder, number):
    """(facts, tensors) of a checkpoint whose checksums are right.

    Raises:
        CheckpointError: for any file that is not as it was written.
    """
    path = folder / f"{number:06}.json"
    try:
        text = path.read_bytes()
        facts = json.loads(text)
        written = facts.pop("sha256")
        intact = sha256(dump(facts).encode()) == written
        if not intact or dump(facts | {"sha256": written}).encode() != text:
            raise ValueError("its checksum is wrong")
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
        data = path.with_suffix(".safetensors")
        with open(data, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["tensors_sha256"]:
                raise ValueError(f"the checksum of {data.name} is wrong")
        return facts, load_file(data)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            SafetensorError) as error:  # fmt: skip
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None


def restore(training, facts, tensors):
    """Put a checkpoint's state into a training that was set up by the same command."""
    stack = training.stack
    saved = [Run(*record["run"]) for record in facts["records"]]
    if saved != stack.runs or tensors["values"].shape != stack.values.shape:
        raise CheckpointError("the checkpoint is of other runs or another model")
    device = stack.values.device
    stack.values.copy_(tensors["values"])
    stack.bad_step.copy_(tensors["bad_step"])
    if training.best is not None:
        training.best.copy_(tensors["best"])
    for k, optimizer in enumerate(training.optimizers):
        (row,) = optimizer.param_groups[0]["params"]
        names = [name for name in tensors if name.startswith(f"optimizer.{k}.")]
        if names:
            optimizer.state[row] = {n.split(".", 2)[2]: tensors[n].to(device) for n in names}
    set_random_state(
        device, [tensors[name] for name in ("random.0", "random.1") if name in tensors]
    )
    training.plan.limit.tokens = min(training.plan.limit.tokens, facts["max_tokens"])
    training.position = Position(
        facts["epoch"], facts["step"], tensors["loss_sum"].to(device), facts["seconds"]
    )
    for record, saved in zip(training.records, facts["records"], strict=True):
        for name in vars(record).keys() - {"run"}:
            setattr(record, name, saved[name])
    stack.write_back()
