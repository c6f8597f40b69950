"""Scores of many evaluations at once, their selection, and tests of differences between methods.

Shapes: L learning rates, S seeds, E scored epochs, B resamples, C labels. A run that diverged has
NaN logits and counts nowhere: it is NaN in `Selected.values`, and n does not count its seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from bitfit.data.tasks import Task
from bitfit.results.scores import mean_std

BLOCK = 100  # resamples drawn at once; 1,000 for the 40,430 rows of QQP would take 0.6 GB
SIGN_FLIPS = 9999  # random flips; up to 13 differences have fewer flips, and all of them are tried
ENDS = 0.025, 0.975  # quantiles at the ends of an interval


class Choice(NamedTuple):
    """The evaluations that a selection reports, one for each seed."""

    rows: np.ndarray  # indices of the scored validation examples
    rate: int  # index of the learning rate
    epoch: np.ndarray  # (S,) index of the epoch


class Selected(NamedTuple):
    """The result of a selection: scores that are means over the choices."""

    values: np.ndarray  # (S,) NaN where the seed's run diverged
    choices: list[Choice]  # empty if all runs diverged


def main_scores(task: Task, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the main metric of logits (..., rows, C) and labels (rows,), NaN if a logit is NaN."""
    return resampled(task, logits, labels, counts=np.ones((1, len(labels)), int))[0]


def resampled(task: Task, logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the main metric (B, ...) with examples counted by `counts` (B, rows)."""
    values = METRICS[task.metrics[0]](logits, labels, counts)  # (..., B)
    diverged = np.isnan(logits).any(axis=(-2, -1))
    return np.moveaxis(np.where(diverged[..., None], np.nan, values), -1, 0)


def total(true: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the number of resampled examples that are true: (..., rows), (B, rows) -> (..., B)."""
    # Whole numbers below 2 ** 24 are exact in float32, where multiplication is fastest.
    return (true.astype(np.float32) @ counts.T.astype(np.float32)).astype(float)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return numerator / denominator; 0 where the denominator is 0, as `tasks.score` does."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def accuracy(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return total(logits.argmax(-1) == labels, counts) / counts.sum(axis=1)


def f1(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    predicted, true = logits.argmax(-1) == 1, labels == 1
    either = total(predicted, counts) + total(true, counts)
    return ratio(2 * total(predicted & true, counts), either)


def matthews(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return Matthews correlation for two classes; CoLA is the only task with this metric."""
    predicted, true = logits.argmax(-1) == 1, labels == 1
    n, p, t = counts.sum(axis=1), total(predicted, counts), total(true, counts)
    covariance = n * total(predicted & true, counts) - p * t
    return ratio(covariance, np.sqrt(p * (n - p)) * np.sqrt(t * (n - t)))


def spearman(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    drawn = [np.repeat(np.arange(len(labels)), resample) for resample in counts]
    return np.stack([rank_correlation(logits[..., r, 0], labels[r]) for r in drawn], axis=-1)


def rank_correlation(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rank correlation (...) of predictions (..., rows) with labels (rows,)."""
    x, y = (stats.rankdata(v, axis=-1) - (len(labels) + 1) / 2 for v in (predicted, labels))
    return ratio(x @ y, np.sqrt((x * x).sum(axis=-1) * (y @ y)))


METRICS = {"Accuracy": accuracy, "F1": f1, "MCC": matthews, "Spearman": spearman}


def counted(scores: np.ndarray) -> np.ndarray:
    """Return scores (L, S, E) with NaN in all epochs of a run that has NaN in one epoch."""
    return np.where(np.isnan(scores).any(axis=-1, keepdims=True), np.nan, scores)


def best_mean(values: np.ndarray) -> tuple:
    """Return the index (...) with the best mean over seeds of values (..., S), the first if equal.

    Indices without a missing seed come first. If all lack one, the mean is over the other seeds.
    """
    means = np.ma.masked_invalid(values).mean(axis=-1).filled(-np.inf)
    complete = ~np.isnan(values).any(axis=-1)
    means = np.where(complete | ~complete.any(), means, -np.inf)
    # Equal scores, summed in another order, may differ in the last bit.
    return np.unravel_index(means.round(12).argmax(), means.shape)


def select_epochs(scores: np.ndarray, epochs: np.ndarray, rows: int) -> Selected:
    """Select the given epoch (L, S) of each run at the learning rate with the best mean."""
    values = np.take_along_axis(counted(scores), epochs[..., None], axis=-1)[..., 0]
    if np.isnan(values).all():
        return Selected(np.full(values.shape[1], np.nan), [])
    (rate,) = best_mean(values)
    return Selected(values[rate], [Choice(np.arange(rows), int(rate), epochs[rate])])


def halves(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random disjoint halves of the indices of examples, sorted."""
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[: rows // 2]), np.sort(order[rows // 2 :])


def select_split(task: Task, logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> Selected:
    """Select on one half of the examples and score on the other, and the other way round.

    The choice is the learning rate and epoch, common to all seeds, with the best mean.

    Args:
        logits: (L, S, E, rows, C).
        labels: (rows,).
        seed: draws the halves; only methods with the same halves can be compared.
    """
    parts, seeds = halves(len(labels), seed), logits.shape[1]
    scores = [counted(main_scores(task, logits[..., rows, :], labels[rows])) for rows in parts]
    if np.isnan(scores).all():
        return Selected(np.full(seeds, np.nan), [])
    values, choices = [], []
    for chosen_on, scored_on, rows in zip(scores, scores[::-1], parts[::-1], strict=True):
        rate, epoch = best_mean(chosen_on.swapaxes(1, 2))
        values.append(scored_on[rate, :, epoch])
        choices.append(Choice(rows, int(rate), np.full(seeds, epoch)))
    return Selected(np.mean(values, axis=0), choices)


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return Student's interval (low, high) for the mean of the values that are not NaN."""
    mean, std, n = mean_std(values, skip_nan=True)
    if n < 2:
        return np.nan, np.nan
    # Not scaled by SciPy, which returns NaN for the scale 0 of equal values.
    low, high = stats.t.interval(level, n - 1)
    return float(mean + low * std / n**0.5), float(mean + high * std / n**0.5)


def pairs(a: Selected, b: Selected) -> np.ndarray:
    """Return the indices of the seeds that count in both; ValueError for unequal numbers."""
    if a.values.shape != b.values.shape:
        raise ValueError(f"{len(a.values)} seeds against {len(b.values)}")
    return np.flatnonzero(np.isfinite(a.values) & np.isfinite(b.values))


def differences(a: Selected, b: Selected) -> np.ndarray:
    """Return a - b (n,) for the seeds that count in both."""
    return (a.values - b.values)[pairs(a, b)]


def draws(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Return how often each of n items is drawn, for n draws with replacement: (size, n)."""
    drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)


def bootstrap_differences(
    task: Task, a: Selected, b: Selected, a_logits: np.ndarray, b_logits: np.ndarray,
    labels: np.ndarray, rng: np.random.Generator, seeds: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Return the mean differences a - b on resampled examples and seeds, (B,).

    A resample has the same examples and the same seeds for both methods. The choices of learning
    rate and epoch are not repeated, and the examples of a choice are resampled among themselves.

    Args:
        a_logits, b_logits: the logits that a and b were selected from, (L, S, E, rows, C).
        labels: (rows,).
        seeds: (B, n), how often each of `pairs` is drawn, as from `draws`; columns of the table
            with the same runs need the same array.

    Raises:
        ValueError: the numbers of seeds or the scored examples differ.
    """
    kept, values = pairs(a, b), []
    for choices in zip(a.choices, b.choices, strict=True):
        rows = choices[0].rows
        if not np.array_equal(rows, choices[1].rows):
            raise ValueError("they are not scored on the same examples")
        both = zip(choices, (a_logits, b_logits), strict=True)
        chosen = np.stack([x[c.rate, kept, c.epoch[kept]][:, rows] for c, x in both])
        values.append(row_bootstrap(task, chosen, labels[rows], rng=rng, resamples=len(seeds)))
    a_values, b_values = np.mean(values, axis=0).swapaxes(0, 1)
    return ((a_values - b_values) * seeds).sum(axis=1) / len(kept)


def row_bootstrap(
    task: Task, logits: np.ndarray, labels: np.ndarray, rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """Return the main metric (B, ...) on examples resampled with replacement."""
    sizes = (min(BLOCK, resamples - done) for done in range(0, resamples, BLOCK))
    counts = (draws(rng, len(labels), size) for size in sizes)
    return np.concatenate([resampled(task, logits, labels, counts=block) for block in counts])


def difference(
    columns: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> dict[str, float]:
    """Return the difference of two methods in points, the mean over columns of a table.

    The interval `low` to `high` covers new examples and new seeds. The p-value of the sign-flip
    test is for new seeds on the same examples, so the two may disagree.

    Args:
        columns: (`differences` (n,), `bootstrap_differences` (B,)) of every column.
    """
    by_seed = [values for values, _ in columns]
    (mean, p), (low, high), n = pooled(by_seed, rng), interval(columns), sum(map(len, by_seed))
    points = {"difference": 100 * mean, "low": 100 * low, "high": 100 * high}
    return points | {"pairs": n, "p": p, "least_p": least_p(n)}


def pooled(
    columns: Sequence[Sequence[float] | np.ndarray], rng: np.random.Generator
) -> tuple[float, float]:
    """Return (mean, p) of the differences in several columns of a table, with equal weights.

    p is the two-sided p-value of the sign-flip test over all differences, NaN for a single one.
    Both are NaN if a column has no finite difference.
    """
    finite = [np.asarray(values, float)[np.isfinite(values)] for values in columns]
    if not finite or not all(map(len, finite)):
        return np.nan, np.nan
    terms = np.concatenate([values / len(values) / len(finite) for values in finite])
    if len(terms) < 2:
        return float(terms.sum()), np.nan
    # Rounded, because equal sums of other terms might differ in the last bit.
    args = (terms,), lambda x, axis: x.sum(axis=axis).round(12)
    options = {"permutation_type": "samples", "n_resamples": SIGN_FLIPS, "rng": rng}
    return float(terms.sum()), float(stats.permutation_test(*args, **options).pvalue)


def interval(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of the mean over columns; NaN for n < 2.

    A bootstrap over n seeds has (n - 1) / n of the variance between seeds, and treats this variance
    as known: with five seeds the percentiles cover the truth in 84 of 100 cases. So the interval is
    widened by the root of n / (n - 1), and by the ratio of Student's quantile to the normal one.
    The part of the width that comes from examples is widened too.

    Args:
        columns: as in `difference`.
    """
    sizes = np.array([len(values) for values, _ in columns])
    if sizes.min() < 2:
        return np.nan, np.nan
    mean = np.mean([values.mean() for values, _ in columns])
    drawn = np.mean([drawn for _, drawn in columns], axis=0)
    student = stats.t.ppf(ENDS[1], (sizes - 1).sum()) / stats.norm.ppf(ENDS[1])
    wider = student * np.sqrt(sizes.min() / (sizes.min() - 1))
    low, high = mean + wider * (np.quantile(drawn, ENDS) - mean)
    return float(low), float(high)


def holm(p: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p-values (n,); NaN stays NaN and is not counted as a test."""
    values = np.asarray(p, float)
    order = values.argsort()[: np.isfinite(values).sum()]  # NaN is sorted last
    adjusted = np.full(values.shape, np.nan)
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def least_p(n: int) -> float:
    """Return the smallest two-sided p of the sign-flip test of n differences, as in `pooled`."""
    return min(1.0, max(2.0 / 2**n, 2.0 / (SIGN_FLIPS + 1) if 2**n > SIGN_FLIPS else 0.0))


def expected_best(scores: ArrayLike, budgets: ArrayLike) -> np.ndarray:
    """Return the expected best score of n trials for each n of the budgets: (N,), (K,) -> (K,).

    This is the unbiased estimator of Tang et al. (2020), the mean over all sets of n different
    trials out of N. A diverged trial, NaN, counts as the worst finite score. NaN where n > N.
    """
    trials, n = np.ravel(scores), np.reshape(budgets, (-1, 1))
    values = np.sort(np.fmax(trials, np.fmin.reduce(trials)))
    # The probability that all n are among the i lowest; the differences weight the sorted values.
    below = stats.hypergeom.pmf(n, len(trials), np.arange(len(trials) + 1), n)
    return np.diff(below) @ values
