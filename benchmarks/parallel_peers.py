"""Two other ways to train K runs at once, for peers.py and gpu_times.py: vmap, and K processes.

`make_vmap` trains the plain Hugging Face model with `torch.func.vmap` over the stacked biases and
classifiers of K runs. `Processes` trains single runs of ours in K processes that share the device.
"""

import math
import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Protocol

import numpy as np
import torch
from common import seconds, train_biases
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from bitfit.data.tokens import TokenizedSplit
from utils import is_out_of_memory

Epoch = Callable[[str], float]  # precision -> seconds of one epoch
START_SECONDS = 300  # for all processes to load the model


def make_vmap(
    make_model: Callable[[], PreTrainedModel], tokens: TokenizedSplit, batch_size: int, runs: int
) -> Epoch:
    """Return a function that trains K runs for one epoch and returns its seconds.

    It takes the faster of the attention implementations sdpa and eager, which differ in what vmap
    can batch. Examples are grouped by length, as with Trainer.
    """
    trainers = [
        Vmap(make_model(), kind, tokens, batch_size=batch_size, runs=runs)
        for kind in ("sdpa", "eager")
    ]
    fastest: dict[str, Vmap] = {}

    def epoch(precision: str) -> float:
        if precision not in fastest:
            times = {trainer: time_or_inf(trainer, precision) for trainer in trainers}
            fastest[precision] = min(times, key=times.__getitem__)
        return fastest[precision].epoch(precision)

    return epoch


def time_or_inf(trainer: "Vmap", precision: str) -> float:
    """Return the seconds of an epoch, or infinity if this attention fails, as on some devices."""
    try:
        return trainer.epoch(precision)
    except RuntimeError as error:  # also without enough memory
        kind = "eager" if trainer.is_eager else "sdpa"
        print(f"vmap with {kind} attention fails: {str(error).splitlines()[0]}", flush=True)
        return math.inf


class Vmap:
    """K runs of the plain model, whose biases and classifiers are stacked."""

    def __init__(
        self,
        model: PreTrainedModel,
        attention: str,
        tokens: TokenizedSplit,
        batch_size: int,
        runs: int,
    ) -> None:
        self.device, self.batch_size, self.runs = tokens.ids.device, batch_size, runs
        self.model = train_biases(model).to(self.device).train()
        self.model.set_attn_implementation(attention)
        self.is_eager, self.lengths = attention == "eager", tokens.lengths
        self.rows = padded(tokens)

    def stacked(self) -> dict[str, torch.Tensor]:
        """Return {name: (K, ...)} of the parameters that train, at their initial values."""
        return {
            name: p.detach().expand(self.runs, *p.shape).clone().requires_grad_()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def epoch(self, precision: str) -> float:
        """Return the seconds of one epoch, from the initial values."""
        params = self.stacked()
        optimizer = torch.optim.AdamW(
            params.values(), lr=1e-4, eps=1e-6, weight_decay=0.0, fused=True
        )
        orders = np.stack([self.order(seed) for seed in range(self.runs)])  # (K, rows)

        def train() -> None:
            for first in range(0, orders.shape[1], self.batch_size):
                batch = self.batch(orders[:, first : first + self.batch_size])
                with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    losses = torch.vmap(self.loss, randomness="different")(params, batch)  # (K,)
                losses.sum().backward()
                clip_per_run_(list(params.values()))
                optimizer.step()
                optimizer.zero_grad()

        return seconds(train, self.device)

    def order(self, seed: int) -> np.ndarray:
        """Return the rows of a run, grouped by length as Trainer does."""
        generator = torch.Generator().manual_seed(seed)
        lengths = self.lengths.tolist()
        return np.array(get_length_grouped_indices(lengths, self.batch_size, generator=generator))

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors (K, B, ...) of some rows (K, B), cut to the longest of them."""
        longest, index = int(self.lengths[rows].max()), torch.from_numpy(rows).to(self.device)
        batch = {
            name: values[index] if name == "labels" and values.dim() == 1
            else values[index, :longest]
            for name, values in self.rows.items()
        }  # fmt: skip
        # transformers looks into masks (B, L), which vmap forbids, but not into those of all pairs.
        mask = batch["attention_mask"][:, :, None, None].expand(-1, -1, 1, longest, -1)
        lowest = torch.finfo(torch.float32).min
        batch["attention_mask"] = (~mask).float() * lowest if self.is_eager else mask
        return batch

    def loss(self, params: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss () of one run, with its parameters and its batch."""
        return torch.func.functional_call(self.model, params, (), batch).loss


def padded(tokens: TokenizedSplit) -> dict[str, torch.Tensor]:
    """Return the inputs of all rows, padded to the longest: (rows, L), labels also (rows,)."""
    device, lengths = tokens.ids.device, torch.from_numpy(tokens.lengths)
    column = torch.arange(int(lengths.max()))
    valid = (column < lengths[:, None]).to(device)  # (rows, L)

    def pad(values: torch.Tensor, filler: int) -> torch.Tensor:
        full = torch.full(valid.shape, filler, device=device)
        full[valid] = values.long()
        return full

    rows = {"input_ids": pad(tokens.ids, tokens.pad_id), "attention_mask": valid}
    if tokens.types is not None:
        rows["token_type_ids"] = pad(tokens.types, 0)
    labels = tokens.require_labels()
    if tokens.word_index is not None:
        of_token = torch.full_like(tokens.ids, -100, dtype=torch.long)
        of_token[tokens.word_index] = labels
        labels = pad(of_token, -100)
    return rows | {"labels": labels}


def clip_per_run_(params: list[torch.Tensor]) -> None:
    """Scale the gradients (K, ...) of each run to a norm of at most 1."""
    grads = [p.grad for p in params]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)  # (K,)
    scale = (1.0 / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))


class OneRun(Protocol):
    """Something that trains one run for an epoch, after waiting for the other processes."""

    def epoch(self, precision: str, wait: Callable[[], object]) -> float: ...


class Processes:
    """K processes that share the device; each trains one run of ours, all at the same time."""

    def __init__(self, make: Callable[[], OneRun], count: int) -> None:
        """
        Args:
            make: builds one run; it can be pickled.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common"])
        self.barrier = context.Barrier(count)  # it exists as long as a process holds it
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(count):
            pipe, other = context.Pipe()
            arguments = make, other, self.barrier
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            other.close()  # so that the pipe ends with the process
            self.pipes.append(pipe)
            self.processes.append(process)

    def epoch(self, precision: str) -> float:
        """Return the seconds until the slowest process has trained its epoch.

        Raises:
            RuntimeError: a process ended, such as by a lack of memory.
        """
        for pipe in self.pipes:
            pipe.send(precision)
        try:
            return max(pipe.recv() for pipe in self.pipes)
        except (EOFError, ConnectionError):
            raise RuntimeError("a process has ended") from None

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            pipe.close()
            process.terminate()
            process.join()


def serve(make: Callable[[], OneRun], pipe: Connection, barrier: Barrier) -> None:
    """Train an epoch for each precision that arrives, and send its seconds."""
    torch.set_num_threads(max(1, torch.get_num_threads() // barrier.parties))
    try:
        ours, wait = make(), partial(barrier.wait, START_SECONDS)
        while True:
            pipe.send(ours.epoch(pipe.recv(), wait))
    except EOFError:
        return
    except (RuntimeError, BrokenBarrierError) as error:
        barrier.abort()  # so that the other processes do not wait for this one
        if not (isinstance(error, BrokenBarrierError) or is_out_of_memory(error)):
            raise
