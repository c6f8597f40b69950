"""All epochs of a stack: train, score, keep, note what diverged."""

import logging
import time
from statistics import mean
from typing import NamedTuple

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bitfit.compute import predict_runs
from bitfit.data import Tokens
from bitfit.reports import best_index, one_line_scores
from bitfit.tasks import score
from bitfit.training import Position, mean_losses, steps_per_epoch, train_epoch
from utils import Diverged, Stopped

LOGGER = logging.getLogger("bitfit")


class Scored(NamedTuple):
    """A split that is scored, and which of its rows for each seed."""

    tokens: Tokens
    rows_of_seed: dict  # {seed: rows}


def fit(training, splits, num_epochs, frequency, write, saver):
    """Train up to `num_epochs` epochs; score every `frequency` of them and the last.

    Args:
        training: where it stands; its records are filled in.
        splits: {split: Scored}
        write: called after each evaluation.
        saver: writes the checkpoints, and raises Stopped where a signal asks for it.

    Raises:
        Diverged: no run is left whose losses and gradients are finite.
    """
    plan, stack, records = training.plan, training.stack, training.records
    total = num_epochs * len(records) * plan.rows_per_run
    done = training.position.epoch * plan.rows_per_run + training.position.step * plan.batch_size
    bar = tqdm(total=total, initial=min(total, done * len(records)), unit="ex", disable=None,
               desc=plan.task.name)  # fmt: skip
    with logging_redirect_tqdm(), bar:
        for epoch in range(training.position.epoch, num_epochs):
            train(training, bar, saver)
            # A last step may have been finite, and what it led to not.
            stack.note_bad(~stack.values.isfinite().all(1), (epoch + 1) * steps_per_epoch(plan) - 1)
            due = (epoch + 1) % frequency == 0 or epoch + 1 == num_epochs
            scores = evaluate(training, splits, saver) if due else {}
            note_losses(training)
            if scores:
                note_scores(training, scores)
                keep_best(plan.task, stack, records, training.best)
            training.position = Position(
                epoch + 1, 0, torch.zeros_like(training.position.loss_sum), 0.0
            )
            if scores:
                write()
            if not len(stack.alive()):
                raise Diverged(all_diverged(records))
            saver.after_epoch(training, last=epoch + 1 == num_epochs)


def train(training, bar, saver):
    """The steps that are left of an epoch."""
    steps = train_epoch(training.plan, training.stack, training.optimizers, training.position, bar)
    spent, begin = training.position.seconds, time.perf_counter()
    for _ in steps:
        training.position.seconds = spent + time.perf_counter() - begin
        before = time.perf_counter()
        saver.after_step(training)
        begin += time.perf_counter() - before


def evaluate(training, splits, saver):
    """{split: {run: {metric: value}}} of the runs that are alive, as they stand.

    A signal is not kept waiting: the checkpoint it leaves is that before the evaluation.
    """
    plan, stack = training.plan, training.stack
    scores = {}
    begin, alive = time.perf_counter(), stack.alive()
    try:
        with saver.at_once():
            for split, (tokens, rows_of_seed) in splits.items() if len(alive) else ():
                labels = tokens.labels.cpu().numpy()
                rows = {k: rows_of_seed[stack.runs[k].seed] for k in alive}
                scores[split] = {
                    k: score(plan.task, logits, labels[rows[k]])
                    for k, logits in predict_runs(plan.model, stack, tokens, plan.limit, rows)
                }
    except Stopped:
        saver.save(training)
        raise
    for k in alive:
        training.records[k].seconds["evaluation"] += (time.perf_counter() - begin) / len(alive)
    return scores


def note_losses(training):
    """Each run's loss and share of the time, and whether it went bad in this epoch."""
    plan, stack, position = training.plan, training.stack, training.position
    losses, bad_step = mean_losses(plan, stack, position), stack.bad_step.tolist()
    first = position.epoch * steps_per_epoch(plan)
    alive = stack.alive(first)
    for k in alive:
        record = training.records[k]
        record.seconds["training"] += position.seconds / len(alive)
        if bad_step[k] < 0:
            record.train_loss.append(losses[k])
            continue
        record.diverged = (
            f"the loss or its gradient was not finite at epoch {position.epoch + 1}, "
            f"step {bad_step[k] - first + 1}"
        )
        if len(training.records) > 1:
            LOGGER.warning("%s diverged: %s", record.run.name, record.diverged)


def note_scores(training, scores):
    """Put an evaluation into the records, and a line about it into the log."""
    epoch = training.position.epoch + 1
    for split, of_run in scores.items():
        for k, values in of_run.items():
            metrics = training.records[k].evaluations.setdefault(split, {})
            for metric, value in values.items():
                metrics.setdefault(metric, []).append(value)
    alive = [training.records[k] for k in next(iter(scores.values()))]
    for record in alive:
        record.epochs.append(epoch)
    LOGGER.info("epoch %d  %s", epoch, one_line(training.plan.task, alive))


def one_line(task, records):
    """The latest scores, for the log: all of one run, or the main one of the best of many."""
    if len(records) == 1:
        record = records[0]
        return f"loss {record.train_loss[-1]:.3f}  {one_line_scores(record.evaluations)}"
    split, metric = task.validation_splits[0], task.metrics[0]
    scores = [100 * record.evaluations[split][metric][-1] for record in records]
    best = max(range(len(scores)), key=scores.__getitem__)
    loss = mean(record.train_loss[-1] for record in records)
    return (
        f"{len(records)} runs: loss {loss:.3f}  {split} {metric} {mean(scores):.1f} on average, "
        f"{scores[best]:.1f} the best ({records[best].run.name})"
    )


def keep_best(task, stack, records, best):
    """Take into `best` the values of the runs whose latest evaluation is their best."""
    for k in stack.alive() if best is not None else ():
        if best_index(task, records[k].evaluations) == len(records[k].epochs) - 1:
            best[k] = stack.values[k]


def all_diverged(records):
    """What to say when no run is left."""
    what = records[0].diverged if len(records) == 1 else f"all {len(records)} runs diverged"
    return (
        f"{what}; training stopped there: try a lower --learning-rate, or --lr-schedule linear "
        "with --warmup-ratio"
    )
