"""The loop: forward, backward, clip, step; and its optimizers and schedule."""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from bitfit.compute import Limit, forward
from bitfit.data import Tokens, gather, micro_batches, overhead_tokens
from bitfit.runs import clip_
from bitfit.tasks import Task, row_losses
from utils import generator

MAX_GRAD_NORM = 1.0  # as in the released code: over all of a run's gradients together


class Schedule(NamedTuple):
    """The learning rate's factor at each step: warm-up, then constant or linear to 0."""

    kind: str  # "constant" or "linear"
    warmup_steps: int
    total_steps: int

    def factor(self, step):
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        return (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)


def make_optimizers(name, stack):
    """One optimizer per run over its row, so that each can skip a step of its own.

    AdamW has no weight decay and eps 1e-6, as the released code's `transformers.AdamW` had.
    """
    optimizers = []
    for run, values, grads in zip(stack.runs, stack.values, stack.grads, strict=True):
        row = torch.nn.Parameter(values)  # shares the row's storage
        row.grad = grads
        settings = {"lr": run.learning_rate, "fused": True}
        if name == "adamw":
            optimizers.append(torch.optim.AdamW([row], weight_decay=0.0, eps=1e-6, **settings))
        else:
            optimizers.append(torch.optim.Adam([row], **settings))
    return optimizers


def epoch_order(run, epoch, rows):
    """A run's own order of its training rows, (rows,), the same whatever else happens."""
    return generator(run.seed, f"data order of epoch {epoch}").permutation(rows)


@dataclass(frozen=True)
class Plan:
    """What one training is: the model and rows it works on, and how."""

    task: Task
    model: torch.nn.Module
    tokens: Tokens  # the training split
    batch_size: int  # rows of each run in a step
    schedule: Schedule
    limit: Limit
    rows_of_seed: dict  # {seed: the rows of `tokens` that its runs train on, all as many}

    @cached_property
    def overhead(self):
        return overhead_tokens(self.model, self.tokens.ids.device)

    @property
    def rows_per_run(self):
        return len(next(iter(self.rows_of_seed.values())))

    def order(self, run, epoch):
        rows = self.rows_of_seed[run.seed]
        return rows[epoch_order(run, epoch, len(rows))]


def steps_per_epoch(plan):
    return math.ceil(plan.rows_per_run / plan.batch_size)


@dataclass
class Position:
    """How far a training is: the epoch, the steps of it that are done, and its sums so far."""

    epoch: int
    step: int
    loss_sum: torch.Tensor  # (K,) over the rows of this epoch
    seconds: float  # of training in this epoch


def train_epoch(plan, stack, optimizers, position, progress):
    """One pass of each run over its training rows; yields after each step.

    Nothing in a step waits for the device. A run whose loss or gradient is not finite keeps its
    last good values, and `stack.bad_step` the step, counted over all epochs; from the next epoch
    on its rows are left out.

    Args:
        position: where to start; moved on with each step.
        progress: a tqdm bar that counts rows; the loss is read only when it redraws.
    """
    plan.model.train()
    steps, epoch = steps_per_epoch(plan), position.epoch
    alive = stack.alive(epoch * steps)
    orders = np.stack([plan.order(stack.runs[k], epoch) for k in alive])
    for number in range(position.step, steps):
        step = epoch * steps + number
        rows = orders[:, number * plan.batch_size : (number + 1) * plan.batch_size]  # (alive, B)
        losses = plan.limit.hold(partial(forward_backward, plan, stack, alive, rows))
        norms = clip_(stack.grads, MAX_GRAD_NORM)
        stack.note_bad(~(norms + losses).isfinite(), step)
        for k in alive:
            optimizer = optimizers[k]
            rate = stack.runs[k].learning_rate * plan.schedule.factor(step)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.found_inf = (stack.bad_step[k] >= 0).float()  # skips, on the device
            optimizer.step()
        stack.write_back()

        position.step = number + 1
        position.loss_sum += losses * rows.shape[1]
        if progress.update(rows.size):
            if not len(stack.alive()):
                return
            loss = losses[stack.bad_step < 0].mean().item()
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", refresh=False)
        yield


def mean_losses(plan, stack, position):
    """The mean training loss of each run in this epoch, a list of K; NaN where a run was bad."""
    means = position.loss_sum / plan.rows_per_run
    return means.where(stack.bad_step < 0, math.nan).tolist()


def whole_epoch(plan, stack, optimizers, epoch):
    """One epoch from its first step, with no bar; returns the mean losses."""
    position = Position(epoch, 0, torch.zeros_like(stack.values[:, 0]), 0.0)
    for _ in train_epoch(plan, stack, optimizers, position, tqdm(disable=True)):
        pass
    return mean_losses(plan, stack, position)


def forward_backward(plan, stack, alive, rows):
    """The losses of one step, (K,), and in `stack.grads` their gradients, by micro-batches.

    Args:
        alive: the runs that take part.
        rows: (alive, B) row numbers, B of each.
    """
    device = stack.values.device
    stack.grads.zero_()
    owner, flat = np.repeat(alive, rows.shape[1]), rows.ravel()
    losses = torch.zeros(len(stack.runs), device=device)
    for part in micro_batches(plan.tokens.lengths[flat], plan.overhead, plan.limit.tokens):
        inputs, numbers = gather(plan.tokens, flat[part])
        with stack.computing(owner[part]):
            logits = forward(plan.model, inputs)
        each = row_losses(plan.task, logits, plan.tokens.labels[numbers])
        into = torch.from_numpy(owner[part]).to(device, non_blocking=True)
        part_losses = torch.zeros_like(losses).index_add(0, into, each / rows.shape[1])
        part_losses.sum().backward()
        losses += part_losses.detach()
    return losses
