"""All epochs of a stack: train, score, keep, note what diverged."""

import logging
import time
from statistics import mean
from typing import NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bitfit.compute import predict_runs
from bitfit.data import Tokens
from bitfit.reports import best_index, one_line_scores
from bitfit.tasks import score
from bitfit.training import steps_per_epoch, train_epoch
from utils import Diverged

LOGGER = logging.getLogger("bitfit")


class Scored(NamedTuple):
    """A split that is scored, and which of its rows for each seed."""

    tokens: Tokens
    rows_of_seed: dict  # {seed: rows}


def fit(plan, stack, optimizers, records, splits, num_epochs, frequency, best, write):
    """Train `num_epochs` epochs; score every `frequency` of them and the last.

    Args:
        records: a `Record` for each run, filled in.
        splits: {split: Scored}
        best: (K, n), to hold each run's values at its best evaluation; or None.
        write: called after each evaluation.

    Raises:
        Diverged: no run is left whose losses and gradients are finite.
    """
    total = num_epochs * len(records) * plan.rows_per_run
    bar = tqdm(total=total, unit="ex", disable=None, desc=plan.task.name)
    with logging_redirect_tqdm(), bar:
        for epoch in range(num_epochs):
            train_and_note(plan, stack, optimizers, records, epoch, bar)
            alive = stack.alive()
            if len(alive) and ((epoch + 1) % frequency == 0 or epoch + 1 == num_epochs):
                evaluate(plan, stack, records, splits, epoch, alive)
                keep_best(plan.task, stack, records, alive, best)
                write()
            if not len(alive):
                raise Diverged(all_diverged(records))


def train_and_note(plan, stack, optimizers, records, epoch, bar):
    """One epoch; each run's share of the time, its loss, and whether it went bad."""
    begin, alive = time.perf_counter(), stack.alive()
    losses = train_epoch(plan, stack, optimizers, epoch, bar)
    elapsed, bad_step = time.perf_counter() - begin, stack.bad_step.tolist()
    for k in alive:
        records[k].seconds["training"] += elapsed / len(alive)
        if bad_step[k] < 0:
            records[k].train_loss.append(losses[k])
            continue
        step = bad_step[k] - epoch * steps_per_epoch(plan)
        records[
            k
        ].diverged = (
            f"the loss or its gradient was not finite at epoch {epoch + 1}, step {step + 1}"
        )
        if len(records) > 1:
            LOGGER.warning("%s diverged: %s", records[k].run.name, records[k].diverged)


def evaluate(plan, stack, records, splits, epoch, alive):
    """Score the runs that are alive on every split, as they stand."""
    begin = time.perf_counter()
    for split, (tokens, rows_of_seed) in splits.items():
        labels = tokens.labels.cpu().numpy()
        rows = {k: rows_of_seed[records[k].run.seed] for k in alive}
        for k, logits in predict_runs(plan.model, stack, tokens, plan.limit, rows):
            metrics = records[k].evaluations.setdefault(split, {})
            for metric, value in score(plan.task, logits, labels[rows[k]]).items():
                metrics.setdefault(metric, []).append(value)
    elapsed = time.perf_counter() - begin
    for k in alive:
        records[k].seconds["evaluation"] += elapsed / len(alive)
        records[k].epochs.append(epoch + 1)
    LOGGER.info("epoch %d  %s", epoch + 1, one_line(plan.task, [records[k] for k in alive]))


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


def keep_best(task, stack, records, alive, best):
    """Take into `best` the values of the runs whose latest evaluation is their best."""
    if best is None:
        return
    for k in alive:
        if best_index(task, records[k].evaluations) == len(records[k].epochs) - 1:
            best[k] = stack.values[k]


def all_diverged(records):
    """What to say when no run is left."""
    what = records[0].diverged if len(records) == 1 else f"all {len(records)} runs diverged"
    return (
        f"{what}; training stopped there: try a lower --learning-rate, or --lr-schedule linear "
        "with --warmup-ratio"
    )
