"""Random logits and labels, and plain versions of the study's scores."""

import numpy as np

from bitfit.data.tasks import TASKS, score
from bitfit.study import statistics
from bitfit.study.statistics import main_scores

NAMES = "cola", "mrpc", "mnli", "stsb"  # one per metric

ACCURACY = TASKS["sst2"]


def drawn(task, shape, rows, seed=0, skill=1.0):
    """Random labels, and logits (*shape, rows, C) in float16 that know something of them."""
    rng = np.random.default_rng(seed)
    if task.is_regression:
        labels = rng.integers(0, 26, rows).astype(np.float32) / 5  # with ties, as STS-B's
        truth = labels[:, None] / 5
    else:
        labels = rng.integers(task.num_labels, size=rows)
        truth = np.eye(task.num_labels)[labels]
    logits = skill * truth + rng.normal(size=(*shape, rows, task.num_labels))
    return logits.astype(np.float16), labels


def logits_of(right):
    """Logits (..., rows, 2) that are right about these rows, all of label 1."""
    return np.stack([~right, right], axis=-1).astype(np.float32)


def slow_scores(task, logits, labels):
    flat = logits.reshape(-1, *logits.shape[-2:])
    scores = [score(task, run_logits, labels)[task.metrics[0]] for run_logits in flat]
    return np.reshape(scores, logits.shape[:-2])


def select_last(scores, rows):
    last = np.full(scores.shape[:2], scores.shape[2] - 1)
    return statistics.select_epochs(scores, last, rows)


def select_best(scores, rows):
    return statistics.select_epochs(scores, scores.argmax(axis=-1), rows)


def last_of(task, logits, labels):
    return select_last(main_scores(task, logits, labels), len(labels))


def best_of(task, logits, labels):
    return select_best(main_scores(task, logits, labels), len(labels))
