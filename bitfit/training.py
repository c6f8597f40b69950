"""The loop: forward, backward, clip, step; and its optimizers, schedule, precision, evaluation."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from bitfit.data import (
    MAX_TOKENS,
    Tokens,
    evaluation_batches,
    gather,
    micro_batches,
    overhead_tokens,
)
from bitfit.models import takes_full_mask
from bitfit.runs import clip_
from bitfit.tasks import Task, row_losses, score
from utils import Diverged, generator

# Of a larger training set, evenly spaced rows are scored: all would cost a third of an epoch.
# No validation split is left short: the largest has 40,430 rows.
MOST_ROWS_SCORED = 50_000
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


@contextmanager
def precision_of(model, precision, device):
    """Run in "fp32" or "bf16".

    Under bf16 the frozen matrices are held in bf16: autocast alone would cast them again at each
    step. On leaving, the model has its own frozen values back, bit for bit.
    """
    if precision == "fp32":
        yield
        return
    frozen = [
        m.weight
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad
    ]
    own = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.bfloat16()
        # Without its cache: that would hold the trained values as they were at first use.
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            yield
    finally:
        for weight, data in zip(frozen, own, strict=True):
            weight.data = data


def forward(model, inputs):
    """Logits (B, C) in float32."""
    mask = inputs["attention_mask"]
    if mask is not None and takes_full_mask(model):
        width = mask.shape[1]
        inputs = inputs | {"attention_mask": mask[:, None, None].expand(-1, 1, width, width)}
    return model(**inputs).logits.float()


def epoch_order(run, epoch, rows):
    """A run's own order of the training rows, (rows,), the same whatever else happens."""
    return generator(run.seed, f"data order of epoch {epoch}").permutation(rows)


class Plan(NamedTuple):
    """What one training is: the model and rows it works on, and how."""

    task: Task
    model: torch.nn.Module
    tokens: Tokens  # the training split
    batch_size: int
    schedule: Schedule


def train_epoch(plan, stack, optimizers, epoch, progress):
    """One pass over the training rows. Nothing in a step waits for the device.

    Args:
        epoch: counted from 0.
        progress: a tqdm bar that counts rows; the loss is read only when it redraws.

    Returns:
        The mean training loss of each run, a list of K.

    Raises:
        Diverged: the run's loss or gradient was not finite; its values are the last good ones.
    """
    task, model, tokens, batch_size, schedule = plan
    model.train()
    device = tokens.ids.device
    overhead = overhead_tokens(model, device)
    orders = np.stack([epoch_order(run, epoch, len(tokens.lengths)) for run in stack.runs])
    steps = math.ceil(orders.shape[1] / batch_size)
    bad_step = torch.full((len(stack.runs),), -1, device=device)
    loss_sum = torch.zeros(len(stack.runs), device=device)
    for step in range(steps):
        rows = orders[:, step * batch_size : (step + 1) * batch_size]  # (K, B)
        run_of_row = np.repeat(np.arange(len(rows)), rows.shape[1])
        losses = torch.zeros(len(rows), device=device)

        for part in micro_batches(tokens.lengths[rows.ravel()], overhead, MAX_TOKENS[device.type]):
            inputs, numbers = gather(tokens, rows.ravel()[part])
            each = row_losses(task, forward(model, inputs), tokens.labels[numbers])
            owner = torch.from_numpy(run_of_row[part]).to(device, non_blocking=True)
            part_losses = torch.zeros_like(losses).index_add(0, owner, each / rows.shape[1])
            part_losses.sum().backward()
            losses += part_losses.detach()

        loss_sum += losses * rows.shape[1]
        norms = clip_(stack.grads, MAX_GRAD_NORM)
        stack.finite &= norms.isfinite() & losses.isfinite()
        bad_step = bad_step.where(stack.finite | (bad_step >= 0), step)
        for run, optimizer, finite in zip(stack.runs, optimizers, stack.finite, strict=True):
            factor = schedule.factor(epoch * steps + step)
            optimizer.param_groups[0]["lr"] = run.learning_rate * factor
            optimizer.found_inf = (~finite).float()  # the fused step is skipped on the device
            optimizer.step()
        stack.write_back()
        stack.grads.zero_()

        if progress.update(rows.size) or step == steps - 1:
            check_finite(bad_step, epoch)
            progress.set_postfix(epoch=epoch + 1, loss=f"{losses.mean().item():.3f}", refresh=False)
    return (loss_sum / orders.shape[1]).tolist()


def check_finite(bad_step, epoch):
    """Raise for the first run whose loss or gradient was not finite."""
    bad = [step for step in bad_step.tolist() if step >= 0]
    if bad:
        raise Diverged(
            f"the loss or its gradient was not finite at epoch {epoch + 1}, step {bad[0] + 1}; "
            "training stopped there: try a lower --learning-rate, or --lr-schedule linear with "
            "--warmup-ratio"
        )


@torch.inference_mode()
def predict(model, tokens, rows=None):
    """Logits of some rows or of all, (rows, C) float32 on the host, in the order given."""
    model.eval()
    device = tokens.ids.device
    rows = np.arange(len(tokens.lengths)) if rows is None else rows
    logits = torch.empty(len(rows), model.config.num_labels, device=device)
    for part in evaluation_batches(tokens.lengths[rows], MAX_TOKENS[device.type]):
        inputs, _ = gather(tokens, rows[part])
        logits[torch.from_numpy(part).to(device)] = forward(model, inputs)
    return logits.cpu().numpy()


def score_split(task, model, tokens):
    """{metric: value} of a split with labels, as the model stands."""
    count = len(tokens.lengths)
    rows = np.linspace(0, count - 1, min(count, MOST_ROWS_SCORED)).astype(np.int64)
    return score(task, predict(model, tokens, rows), tokens.labels.cpu().numpy()[rows])
