"""The training loop, in reading order: step, epoch, evaluation.

Every function takes a `TrainState` and advances it by a step or an epoch.
"""

import time
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from bitfit.data.tasks import compact, row_losses, score
from bitfit.model.batching import (
    Batch,
    count_labels,
    gather_labels,
    split_into_micro_batches,
    to_device,
)
from bitfit.model.predict import predict_runs
from bitfit.model.run_routing import RunRouting
from bitfit.model.run_stack import RunStack, clip_grad_norms_
from bitfit.results.scores import best_epochs, format_epoch_scores, scores_frame
from bitfit.signals import Stopped
from bitfit.tracking.tracker import OFF, Tracker
from bitfit.training.graphs import StepGraphs
from bitfit.training.halving import stop_worse_half
from bitfit.training.plan import Plan
from bitfit.training.progress import Progress
from bitfit.training.state import TrainState
from utils import LOGGER

if TYPE_CHECKING:
    from bitfit.training.checkpoints import CheckpointManager

MAX_GRAD_NORM = 1.0  # as in the released code: over all of a run's gradients together
MIN_ROWS = 4  # of a run in a micro-batch, see `rows_to_compute`
READ_LOSS_SECONDS = 0.5  # between two readings of the loss, for which the host waits


def step_graphs(state: TrainState) -> StepGraphs | None:
    """Return the `StepGraphs` of a training within `RunStack.patched`, or None if it has none.

    Graphs compute in memory of the patched stack, so they must not be used after `patched` ends.
    """
    plan, device = state.plan, state.stack.params.device
    if device.type != "cuda" or plan.group.size > 1 or not plan.forward.uses_varlen:
        return None
    return StepGraphs(partial(whole_step, state), device)


def whole_step(state: TrainState, step: "Step") -> torch.Tensor:
    """Do one `Step` of tensors without waiting for the device, and return the losses (K,)."""
    return update(state, step, forward_backward(state.plan, state.stack, step))


class Step(NamedTuple):
    """The data of one step: NumPy arrays on the host; after `to_device`, tensors."""

    parts: tuple[tuple[Batch, RunRouting, int], ...]  # micro-batches, each of a group of runs
    number: torch.Tensor  # () int64, counted over all epochs
    labels: torch.Tensor  # (K,) float32, labels of each run: of examples, or of words
    rates: torch.Tensor  # (K,) float64, learning rates


def prepare_step(state: TrainState, active: np.ndarray, rows: np.ndarray) -> Step:
    """Return the arrays of one step, split into micro-batches.

    Args:
        active: indices of the runs that train.
        rows: (K, B) the training examples of all runs.
    """
    plan, runs, tokens = state.plan, state.stack.runs, state.plan.train.tokens
    parts: list[tuple[Batch, RunRouting, int]] = []
    for number, group in enumerate(state.stack.groups):
        for part in group_parts(plan, group.runs, active, rows=rows[group.runs]):
            routed = plan.forward.make_routed_batch(tokens, *part, num_runs=len(runs))
            parts.append((*routed, number))
    number = state.epoch * plan.steps_per_epoch + state.step
    rates = np.array([run.learning_rate for run in runs]) * plan.factors[number]
    labels = count_labels(tokens, rows).sum(axis=1).astype(np.float32)
    return Step(tuple(parts), np.array(number), labels, rates=rates)


def group_parts(
    plan: Plan, runs: list[int], active: np.ndarray, rows: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (rows, their runs) of the micro-batches of one group of runs, for `prepare_step`.

    Runs that have ended count where a step is cut: so the sums of other runs stay the same.
    """
    tokens, max_tokens = plan.train.tokens, plan.token_budget.max_tokens
    run_ids, flat = np.repeat(runs, rows.shape[1]), rows.ravel()
    shard = plan.group.shard_rows(tokens.lengths[flat])
    run_ids, flat = run_ids[shard], flat[shard]
    if not len(flat):
        return []
    packed, equal = plan.forward.packed_encoder is not None, plan.forward.equal_length
    micro_batches = split_into_micro_batches(
        tokens.lengths[flat], max_tokens, packed, equal_length=equal
    )
    trained = (part[rows_to_compute(run_ids[part], active)] for part in micro_batches)
    return [(flat[part], run_ids[part]) for part in trained if len(part)]


def rows_to_compute(run_ids: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Return which rows (B,) of a micro-batch to compute: bool, True for those of active runs.

    On a CPU a row of a matrix product is the same for any number of rows but 1 to 3. So some rows
    of other runs, first of the largest one, accompany runs that have fewer.
    """
    rows = np.isin(run_ids, active)
    if rows.any() and np.bincount(run_ids[rows]).max() < MIN_ROWS:
        others = np.flatnonzero(~rows)
        sizes = np.bincount(run_ids)[run_ids[others]]
        rows[others[np.argsort(-sizes, kind="stable")[:MIN_ROWS]]] = True
    return rows


def train_step(state: TrainState, active: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Train all active runs for one step and return the losses (K,).

    With packed rows the host never waits for the device. With padded rows transformers waits once
    per micro-batch to find out whether there is padding.

    A run whose loss or gradient is not finite keeps its last finite values from then on, and
    `stack.last_step` holds the number of the step.

    Args:
        active: indices of the runs that train.
        rows: (K, B) the training examples of all runs.
    """
    stack, device, budget = state.stack, state.stack.params.device, state.plan.token_budget
    tokens = budget.max_tokens

    def attempt() -> tuple[Step | None, torch.Tensor]:
        if budget.max_tokens < tokens:
            state.graphs = None  # The device is out of memory, and graphs hold some of it.
        planned = prepare_step(state, active, rows)
        if state.graphs and (run := state.graphs.find(planned)):
            return None, run()
        step = to_device(planned, device)
        return step, forward_backward(state.plan, stack, step)

    step, losses = budget.retry_on_oom(attempt)
    return losses if step is None else update(state, step, losses)


def update(state: TrainState, step: Step, losses: torch.Tensor) -> torch.Tensor:
    """Clip the gradients, update the trained values, and return the losses (K,)."""
    stack = state.stack
    state.plan.group.all_reduce_sum_(stack.grads, losses)
    parts = [param.grad for param in state.optimized]
    norms = torch.empty_like(losses)
    for group, part in zip(stack.groups, parts, strict=True):
        if len(parts) > 1:
            part.copy_(stack.grads[group.entries])
        norms[group.rows] = clip_grad_norms_(part, MAX_GRAD_NORM)
    stack.end_runs(~(norms + losses).isfinite(), step.number)
    bad = stack.last_step >= 0  # (K,)
    for group, part in zip(stack.groups, parts, strict=True):
        fixed = bad[group.rows, None]
        part.masked_fill_(fixed if group.fixed is None else fixed | group.fixed, 0.0)
    state.rates.copy_(step.rates.where(~bad, 0.0))
    optimizer_step(state)
    state.loss_sum += losses * step.labels
    return losses


def optimizer_step(state: TrainState) -> None:
    """Update the trained values by one step of the optimizer at the rates `state.rates`."""
    stack = state.stack
    state.optimizer.step()
    if len(stack.runs) > 1:
        for group, param in zip(stack.groups, state.optimized, strict=True):
            values, rates = stack.params[group.entries], state.rates[group.rows, None]
            values.addcmul_(param.detach(), rates.to(values.dtype))
            if len(stack.groups) > 1:
                stack.params[group.entries] = values
            param.detach().zero_()
    stack.sync_to_model()


def forward_backward(plan: Plan, stack: RunStack, step: Step) -> torch.Tensor:
    """Return the losses (K,) of one `Step` of tensors; `stack.grads` gets their gradients."""
    stack.zero_grad()
    tokens, losses = plan.train.tokens, torch.zeros_like(stack.params[:, 0])
    for batch, routing, group in step.parts:
        stack.select_group(group)
        with stack.routing(routing):
            logits = plan.forward(tokens, batch)
        labels, run_ids = gather_labels(tokens, batch), routing.run_ids_of(batch.label_index)
        shares = row_losses(plan.task, logits, labels) / step.labels[run_ids]
        # On a GPU `index_add` sums in an order that varies.
        part_losses = torch.zeros_like(losses).index_put((run_ids,), shares, accumulate=True)
        part_losses.sum().backward()
        stack.accumulate_grads()
        losses += part_losses.detach()
    return losses


def train_epoch(
    state: TrainState, checkpoints: "CheckpointManager", progress: Progress, tracker: Tracker = OFF
) -> None:
    """Train the remaining steps of an epoch. Runs that have ended do not train in the next."""
    plan, stack = state.plan, state.stack
    plan.forward.model.train()
    steps = plan.steps_per_epoch
    active = stack.active_runs(state.epoch * steps)
    orders = np.stack([plan.order(run, state.epoch) for run in stack.runs])  # (K, rows)
    seen = plan.examples_before(state.epoch, state.step)
    progress.expect(len(active) * (plan.epochs * plan.rows_per_run - seen))
    begin = time.perf_counter()
    while state.step < steps:
        first = state.step * plan.batch_size
        rows = orders[:, first : first + plan.batch_size]  # fewer in the last step
        losses = train_step(state, active, rows)
        state.step += 1
        progress.update(len(active) * rows.shape[1])
        reads_loss = progress.clock() - progress.read_at > READ_LOSS_SECONDS
        if reads_loss:
            finite = stack.active_runs()
            if plan.group.size == 1 and not len(finite):
                break  # Not with several ranks, which read the losses at different times.
            read = losses.cpu()[finite]
            progress.show(state, read.mean())
            progress.read_at = progress.clock()
        state.seconds += time.perf_counter() - begin
        if reads_loss:
            tracker.log_losses(state, dict(zip(finite.tolist(), read.tolist(), strict=True)))
        checkpoints.after_step(state)
        begin = time.perf_counter()
    # The last step may have been finite, but not the values after it.
    last = torch.full_like(stack.last_step[0], (state.epoch + 1) * steps - 1)
    stack.end_runs(~stack.params.isfinite().all(1), last)
    stack.active_runs()  # wait for the device, so that all training is timed
    state.seconds += time.perf_counter() - begin


def evaluate(state: TrainState, checkpoints: "CheckpointManager") -> list[tuple]:
    """Return the scores of the runs that have not ended, as tuples like `TrainState.scores`.

    Their logits on validation splits go to `TrainState.logits`.

    A signal stops the evaluation at once. The checkpoint then holds the state before it.
    """
    plan, stack, scores = state.plan, state.stack, []
    begin, active = time.perf_counter(), stack.active_runs()
    try:
        with checkpoints.signals.deferred(plan.group.size > 1):  # ranks evaluate together
            for name, split in plan.scored.items() if len(active) else ():
                rows = {k: split.rows_of_seed[stack.runs[k].effective_data_seed] for k in active}
                scored = plan.forward, stack, split.tokens, plan.token_budget
                for k, logits in predict_runs(*scored, rows=rows, group=plan.group):
                    if name in state.logits:
                        kept = state.logits[name][state.epoch // plan.evaluation_frequency]
                        kept[k] = compact(plan.task, logits)
                    labels = split.tokens.labels_of(rows[k])
                    sentences = split.tokens.sentences_of(rows[k])
                    of_run = score(plan.task, logits, labels, sentences=sentences)
                    for metric, value in of_run.items():
                        scores.append((stack.runs[k].name, state.epoch + 1, name, metric, value))
    except Stopped:
        checkpoints.save(state)
        raise
    for k in active:
        state.records[k].seconds["evaluation"] += (time.perf_counter() - begin) / len(active)
    return scores


def record_epoch(state: TrainState, scores: list[tuple]) -> None:
    """Record the losses, times, scores and best values of an epoch, and which runs ended."""
    stack, first = state.stack, state.epoch * state.plan.steps_per_epoch
    counts = torch.tensor([state.plan.labels_of(run) for run in stack.runs]).to(state.loss_sum)
    losses, last_step = (state.loss_sum / counts).tolist(), stack.last_step.tolist()
    trained, active = stack.active_runs(first), stack.active_runs()
    for k in trained:
        record = state.records[k]
        record.seconds["training"] += state.seconds / len(trained)
        if last_step[k] < 0:
            record.train_loss.append(losses[k])
            continue
        time_of = f"epoch {state.epoch + 1}, step {last_step[k] - first + 1}"
        record.diverged = f"the loss or its gradient was not finite at {time_of}"
        if len(state.records) > 1:
            LOGGER.warning("%s diverged: %s", record.run.name, record.diverged)
    if not scores:
        return
    state.scores += scores
    best = best_epochs(scores_frame(state.scores), state.plan.task)
    if state.best is not None:
        for k in active:
            if best[stack.runs[k].name] == state.epoch + 1:
                state.best[k] = stack.params[k]
    loss = mean(losses[k] for k in active)
    message = format_epoch_scores(scores_frame(scores), state.plan.task, loss)
    LOGGER.info("epoch %d  %s", state.epoch + 1, message)
    stop_worse_half(state, scores)
