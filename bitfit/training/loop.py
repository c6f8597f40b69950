"""The loop, in reading order: state, optimizer, step, epoch, all epochs.

A training is one `TrainState`: its plan does not change, everything else does. Every function
here takes the state and leaves it one step or epoch further; a checkpoint writes it.
"""

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch

from bitfit.data.tasks import compact, row_losses, score
from bitfit.model.batching import split_into_micro_batches, to_device
from bitfit.model.predict import predict_runs
from bitfit.model.run_stack import Run, RunStack, clip_grad_norms_
from bitfit.model.token_budget import free_gpu_bytes, preserve_random_state
from bitfit.results.scores import best_epochs, format_epoch_scores, scores_frame
from bitfit.signals import Stopped
from bitfit.tracking.tracker import OFF
from bitfit.training.graphs import StepGraphs
from bitfit.training.plan import Plan
from bitfit.training.progress import Progress
from utils import CorruptFile

LOGGER = logging.getLogger("bitfit")
MAX_GRAD_NORM = 1.0  # as in the released code: over all of a run's gradients together
LOOK_SECONDS = 0.5  # how often the loss is read, for which the host waits for the device
SPENT = ("training", "evaluation", "checkpoints")


@dataclass
class Record:
    """What one run measured beside its scores."""

    run: Run
    train_loss: list = field(default_factory=list)  # per epoch
    seconds: dict = field(default_factory=lambda: dict.fromkeys(SPENT, 0.0))  # its share
    diverged: str | None = None  # where the loss or gradient was not finite


@dataclass
class TrainState:
    """One training: what it works on, and all that changes on the way."""

    plan: Plan
    stack: RunStack  # what trains: values, gradients, which runs went bad
    optimizer: torch.optim.Optimizer
    rates: torch.Tensor  # (K,) the learning rates of this step
    update: torch.Tensor | None  # (K, n) what the optimizer moves in place of many runs' values
    records: list  # of each run
    scores: list  # rows (run's name, epoch, split, metric, value) of the one table of scores
    logits: dict  # {validation split: (evaluations, K, rows, C)}, NaN where there are none
    best: torch.Tensor | None  # (K, n) values at each run's best evaluation, if those are kept
    loss_sum: torch.Tensor  # (K,) over the rows of this epoch
    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next one
    seconds: float = 0.0  # of training in this epoch
    graphs: StepGraphs | None = None  # whole steps as CUDA graphs


def init_state(plan, stack, optimizer="adamw"):
    """A `TrainState` before its first step.

    AdamW has no weight decay and eps 1e-6, as the released code's `transformers.AdamW` had. One
    kernel moves all runs, but knows one learning rate. Without decay a step is proportional to it:
    so zeros are moved at rate 1, and each run's values then go its own rate times as far.
    """
    one, rates = len(stack.runs) == 1, torch.zeros_like(stack.params[:, 0])
    # On a CPU the optimizer multiplies by a tensor in float64; on a GPU it reads float32 alone.
    rates = rates.double() if rates.device.type == "cpu" else rates
    moved = torch.nn.Parameter(stack.params if one else torch.zeros_like(stack.params))
    moved.grad = stack.grads
    make, settings = {
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-6}),
        "adam": (torch.optim.Adam, {}),
    }[optimizer]
    settings["capturable"] = moved.is_cuda
    return TrainState(
        plan=plan,
        stack=stack,
        optimizer=make([moved], lr=rates[0] if one else 1.0, fused=True, **settings),
        rates=rates,
        update=None if one else moved.detach(),
        records=[Record(run) for run in stack.runs],
        scores=[],
        logits=plan.empty_logits(len(stack.runs)),
        best=stack.params.clone() if plan.options.keep == "best" else None,
        loss_sum=torch.zeros_like(stack.params[:, 0]),
    )


def step_graphs(state):
    """Return the `StepGraphs` of a training within `RunStack.patched`, or None if it has none.

    Graphs compute in memory of the patched stack: do not use them after `patched` ends.
    """
    plan, device = state.plan, state.stack.params.device
    if device.type != "cuda" or plan.group.size > 1 or not plan.forward.uses_varlen:
        return None
    return StepGraphs(partial(whole_step, state), device)


def whole_step(state, step):
    """Do one `Step` of tensors, wait for nothing, and return the losses (K,)."""
    return update(state, step, forward_backward(state.plan, state.stack, step))


def evaluations(state):
    """How many there have been."""
    return len({epoch for _, epoch, *_ in state.scores})


class Step(NamedTuple):
    """All of a step that changes from one to the next: arrays of the host, then tensors."""

    parts: tuple  # its passes, each (Batch, RunRouting)
    number: np.ndarray  # () int64, counted over all epochs
    count: np.ndarray  # () float32, rows of each run
    rates: np.ndarray  # (K,) float64, the schedule's


def plan_step(state, alive, rows):
    """The host's share of a step of the runs `alive` (R,): their `rows` (R, B) in passes."""
    plan, runs = state.plan, state.stack.runs
    owner, flat = np.repeat(alive, rows.shape[1]), rows.ravel()
    own = plan.group.shard_rows(plan.train.tokens.lengths[flat])
    owner, flat = owner[own], flat[own]
    lengths = plan.train.tokens.lengths[flat]
    number = state.epoch * plan.steps_per_epoch + state.step
    packed, parts = plan.forward.packed_encoder is not None, []
    equal = plan.forward.equal_length
    for part in (
        split_into_micro_batches(lengths, plan.token_budget.max_tokens, packed, equal)
        if len(flat)
        else ()
    ):
        tokens = plan.train.tokens
        parts.append(plan.forward.make_routed_batch(tokens, flat[part], owner[part], len(runs)))
    rates = np.array([run.learning_rate for run in runs]) * plan.factors[number]
    return Step(tuple(parts), np.array(number), np.array(rows.shape[1], np.float32), rates)


def take_step(state, alive, rows):
    """One step of all runs: forward, backward, clip, step.

    On packed rows nothing in it waits for the device; on padded ones transformers asks once a pass
    whether there is padding.

    A run whose loss or gradient is not finite is held at its last good values from then on, and
    `stack.bad_step` says since which step.
    """
    stack, device, budget = state.stack, state.stack.params.device, state.plan.token_budget
    tokens = budget.max_tokens

    def attempt():
        if budget.max_tokens < tokens:
            state.graphs = None  # the device is out of memory, of which they hold some
        planned = plan_step(state, alive, rows)
        if state.graphs and (run := state.graphs.find(planned)):
            return None, run()
        step = to_device(planned, device)
        return step, forward_backward(state.plan, stack, step)

    step, losses = budget.retry_on_oom(attempt)
    return losses if step is None else update(state, step, losses)


def update(state, step, losses):
    """Clip the gradients of one `Step` of tensors, move the values, and return the losses (K,)."""
    stack = state.stack
    state.plan.group.all_reduce_sum_(stack.grads, losses)
    norms = clip_grad_norms_(stack.grads, MAX_GRAD_NORM)
    stack.mark_diverged(~(norms + losses).isfinite(), step.number)
    bad = stack.bad_step >= 0
    mask = stack.zero_gradient_mask
    still = bad[:, None] if mask is None else bad[:, None] | mask
    stack.grads.masked_fill_(still, 0.0)
    state.rates.copy_(step.rates.where(~bad, 0.0))
    move(state)
    state.loss_sum += losses * step.count
    return losses


def move(state):
    """One step of the optimizer, at `state.rates`."""
    values = state.stack.params
    state.optimizer.step()
    if state.update is not None:
        values.addcmul_(state.update, state.rates[:, None].to(values.dtype))
        state.update.zero_()
    state.stack.sync_to_model()


def forward_backward(plan, stack, step):
    """The losses of one `Step` of tensors, (K,), and in `stack.grads` their gradients."""
    stack.zero_grad()
    losses = torch.zeros_like(stack.params[:, 0])
    for batch, rows in step.parts:
        with stack.routing(rows):
            logits = plan.forward(plan.train.tokens, batch)
        each = row_losses(plan.task, logits, plan.train.tokens.labels[batch.rows])
        # On a GPU `index_add` sums in any order.
        owner = (rows.rows.run_ids,)
        part_losses = torch.zeros_like(losses).index_put(owner, each / step.count, accumulate=True)
        part_losses.sum().backward()
        stack.accumulate_grads()
        losses += part_losses.detach()
    return losses


def train_epoch(state, saver, progress, tracker=OFF):
    """The steps that are left of an epoch. A run that went bad is left out from the next one on."""
    plan, stack = state.plan, state.stack
    plan.forward.model.train()
    steps = plan.steps_per_epoch
    alive = stack.finite_runs(state.epoch * steps)
    orders = np.stack([plan.order(stack.runs[k], state.epoch) for k in alive])  # (R, rows)
    begin = time.perf_counter()
    while state.step < steps:
        first = state.step * plan.batch_size
        rows = orders[:, first : first + plan.batch_size]  # the last are fewer
        losses = take_step(state, alive, rows)
        state.step += 1
        progress.update(rows.size)
        look = progress.clock() - progress.looked > LOOK_SECONDS
        if look:
            good = stack.finite_runs()
            if plan.group.size == 1 and not len(good):
                break  # ranks look at different times
            seen = losses.cpu()[good]
            progress.look(state, seen.mean())
            progress.looked = progress.clock()
        state.seconds += time.perf_counter() - begin
        if look:
            tracker.log_losses(state, dict(zip(good.tolist(), seen.tolist(), strict=True)))
        saver.after_step(state)
        begin = time.perf_counter()
    # A last step may have been finite, and what it led to not.
    last = torch.full_like(stack.bad_step[0], (state.epoch + 1) * steps - 1)
    stack.mark_diverged(~stack.params.isfinite().all(1), last)
    stack.finite_runs()  # waits for the device: its work is training too
    state.seconds += time.perf_counter() - begin


def fit(state, write, saver, tracker=OFF):
    """Train the epochs that are left; score those that are due, and the last.

    Args:
        write: called after each evaluation.
        saver: writes the checkpoints, and raises Stopped where a signal asks for it.
        tracker: is told what there is to see.

    Returns:
        None, or what to say when no run is left whose losses and gradients are finite.
    """
    plan, runs = state.plan, len(state.records)
    each = plan.rows_per_run
    done = runs * (state.epoch * each + min(each, state.step * plan.batch_size))
    progress = Progress(plan, runs, done, plan.group.shows_progress)
    if plan.token_budget.device.type == "cuda":
        fit_limit_to_memory(state, free_gpu_bytes(plan.token_budget.device))
    state.graphs = step_graphs(state)
    with progress.shown():
        while state.epoch < plan.epochs:
            train_epoch(state, saver, progress, tracker)
            if not plan.group.replicas_equal(state.stack.params):
                raise CorruptFile(f"ranks {plan.group.ranks} hold different values")
            ended = state.epoch + 1
            due = ended % plan.evaluation_frequency == 0 or ended == plan.epochs
            scores = evaluate(state, saver) if due else []
            note(state, scores)
            tracker.log_scores(state, scores)
            state.loss_sum.zero_()
            state.epoch, state.step, state.seconds = ended, 0, 0.0
            if scores:
                write()
            if not len(state.stack.finite_runs()):
                what = f"all {runs} runs diverged" if runs > 1 else state.records[0].diverged
                return (f"{what}; training stopped there: try a lower --learning-rate, or "
                        "--lr-schedule linear with --warmup-ratio")  # fmt: skip
            saver.after_epoch(state, last=ended == plan.epochs)
    return None


def fit_limit_to_memory(state, free):
    """Lower the limit of tokens in one pass to a power of two that fits into `free` bytes.

    A trial pass of the longest row counts what autograd keeps for the backward pass. Twice as much
    is left for gradients and for the grouped attention of `packing`, whose weights are not counted.
    """
    plan, stack = state.plan, state.stack
    tokens = plan.train.tokens
    row = np.array([tokens.lengths.argmax()])
    step = plan.forward.make_routed_batch(tokens, row, np.zeros(1, np.int64), len(stack.runs))
    batch, rows = to_device(step, stack.params.device)
    plan.forward.model.train()
    with (
        preserve_random_state(plan.token_budget.device),
        count_kept_bytes(plan.forward.model) as kept,
        stack.routing(rows),
    ):
        plan.forward(tokens, batch)
    most = free / 3 / (sum(kept.values()) / batch.token_index.numel())
    fitting = max(64, 2 ** int(math.log2(most)))
    if fitting < plan.token_budget.max_tokens:
        plan.token_budget.max_tokens = fitting
        LOGGER.info("--max-tokens %d: more does not fit into %.1f GiB of free memory", fitting,
                    free / 2**30)  # fmt: skip


@contextmanager
def count_kept_bytes(model):
    """Yield {storage: bytes} of what autograd keeps for the backward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def evaluate(state, saver):
    """The scores of the runs that are alive, as they stand: rows like those of `TrainState.scores`.

    Their logits on validation splits go to `TrainState.logits`.

    A signal is not kept waiting: the checkpoint it leaves is that before the evaluation.
    """
    plan, stack, scores = state.plan, state.stack, []
    begin, alive = time.perf_counter(), stack.finite_runs()
    try:
        with saver.held(waits=plan.group.size > 1):  # several ranks go through it together
            for name, split in plan.scored.items() if len(alive) else ():
                labels = split.tokens.labels.cpu().numpy()
                rows = {k: split.rows_of_seed[stack.runs[k].seed] for k in alive}
                for k, logits in predict_runs(
                    plan.forward, stack, split.tokens, plan.token_budget, rows, plan.group
                ):
                    if name in state.logits:
                        kept = state.logits[name][state.epoch // plan.evaluation_frequency]
                        kept[k] = compact(plan.task, logits)
                    for metric, value in score(plan.task, logits, labels[rows[k]]).items():
                        scores.append((stack.runs[k].name, state.epoch + 1, name, metric, value))
    except Stopped:
        saver.save(state)
        raise
    for k in alive:
        state.records[k].seconds["evaluation"] += (time.perf_counter() - begin) / len(alive)
    return scores


def note(state, scores):
    """What an epoch gave: each run's loss and time, whether it went bad, scores, best values."""
    stack, first = state.stack, state.epoch * state.plan.steps_per_epoch
    losses, bad_step = (state.loss_sum / state.plan.rows_per_run).tolist(), stack.bad_step.tolist()
    trained, alive = stack.finite_runs(first), stack.finite_runs()
    for k in trained:
        record = state.records[k]
        record.seconds["training"] += state.seconds / len(trained)
        if bad_step[k] < 0:
            record.train_loss.append(losses[k])
            continue
        where = f"epoch {state.epoch + 1}, step {bad_step[k] - first + 1}"
        record.diverged = f"the loss or its gradient was not finite at {where}"
        if len(state.records) > 1:
            LOGGER.warning("%s diverged: %s", record.run.name, record.diverged)
    if not scores:
        return
    state.scores += scores
    best = best_epochs(scores_frame(state.scores), state.plan.task)
    for k in alive if state.best is not None else ():
        if best[stack.runs[k].name] == state.epoch + 1:
            state.best[k] = stack.params[k]
    loss = mean(losses[k] for k in alive)
    said = format_epoch_scores(scores_frame(scores), state.plan.task, loss)
    LOGGER.info("epoch %d  %s", state.epoch + 1, said)
