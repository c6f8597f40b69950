"""The power of the tests between methods, and the probability that one method beats another."""

from bisect import bisect_left
from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bitfit.study import tables
from bitfit.study.cells import slug
from bitfit.study.protocol import ROWS
from bitfit.study.results import PAIRS, Entries, Entry, finished_pairs
from bitfit.study.statistics import SIGN_FLIPS

POINT = 0.01  # the true difference to detect; scores are at most 1
POWER, LEVEL = 0.8, 0.05
MAX_SEEDS = 100
SIMULATIONS = 1000  # the standard error of a power of 0.8 is 0.013
RANDOM_FLIPS = 999  # of each simulated study with too many flips to try all
TITLE = "Power and probability of improvement"
NOTE = (
    "`seeds needed`: with this number of seeds, the sign-flip test finds a true difference of one "
    f"point (p ≤ {LEVEL}) in {100 * POWER:.0f} % of {SIMULATIONS:,} simulated studies, which have "
    "the observed standard deviation of a - b over seeds (`std`, in points) in each task and are "
    "pooled as the differences are. `P(a > b)`: the probability that a scores above b on a new "
    "seed, the mean over the tasks, where equal scores count half; the 95 % CI is a bootstrap over "
    "the seeds of each task (Agarwal et al. 2021), which is too narrow for few seeds. One seed has "
    "no deviation, so it is `too few seeds`. power.csv also has a row for each column."
)


def power_frame(entries: Entries, rng: np.random.Generator, resamples: int = 1000) -> pd.DataFrame:
    """Return power.csv: a row for each model, pair of finished methods and column.

    The column `all` pools the tasks of a pair, as in `results.comparisons`.
    """
    rows = []
    for model in dict.fromkeys(key[0] for key in entries):
        for pair in combinations(ROWS, 2):
            a, b = pair[::-1] if pair[::-1] in PAIRS else pair
            key, of_task = {"model": model, "a": a, "b": b}, defaultdict(list)
            for column, both in finished_pairs(entries, model, (a, b)).items():
                scores = tuple(map(seed_scores, both))
                if all(x.notna().any() for x in scores):
                    rows.append(key | {"column": column} | power_row([scores], rng, resamples))
                    of_task[both[0].results.task.name].append(scores)
            if len(of_task) > 1:
                # The two columns of MNLI are of the same runs, so they count as their mean.
                tasks = [tuple(sum(x) / len(x) for x in zip(*columns, strict=True))
                         for columns in of_task.values()]  # fmt: skip
                rows.append(key | {"column": "all"} | power_row(tasks, rng, resamples))
    return pd.DataFrame(rows)


def seed_scores(entry: Entry) -> pd.Series:
    """Return the scores of a cell by `split`, indexed by seed."""
    # Equal scores, summed in another order, may differ in the last bit.
    return pd.Series(entry.selected["split"].values, entry.results.cell.seeds).round(12)


def difference_std(a: pd.Series, b: pd.Series) -> float:
    """Return the standard deviation of a - b over seeds, paired if both have the same seeds."""
    return (a - b).std() if a.index.equals(b.index) else float(np.hypot(a.std(), b.std()))


def power_row(
    tasks: list[tuple[pd.Series, pd.Series]], rng: np.random.Generator, resamples: int
) -> dict[str, Any]:
    """Return the values of a row of `power_frame`, from the tasks with at least two differences."""
    known = [scores for scores in tasks if np.isfinite(difference_std(*scores))]
    if not known:
        unknown = dict.fromkeys(("std", "probability", "low", "high"), np.nan)
        return {"tasks": 0, "seeds_needed": "too few seeds"} | unknown
    deviations = np.array([difference_std(*scores) for scores in known])
    seeds = seeds_needed(deviations, rng)
    samples = [x.dropna().to_numpy() for scores in known for x in scores]
    interval = stats.bootstrap(
        samples, probability_of_improvement, n_resamples=resamples, method="percentile", rng=rng
    ).confidence_interval
    return {
        "tasks": len(known),
        "seeds_needed": f"more than {MAX_SEEDS}" if seeds > MAX_SEEDS else str(seeds),
        "std": 100 * np.linalg.norm(deviations) / len(known),
        "probability": float(probability_of_improvement(*samples)),
        **interval._asdict(),
    }


def probability_of_improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the probability that a run of a scores above one of b, the mean over tasks.

    The samples are the scores of a, then of b, for each task, with the seeds on `axis`.
    """
    u = [stats.mannwhitneyu(a, b, axis=axis, method="asymptotic").statistic
         / (a.shape[axis] * b.shape[axis])
         for a, b in zip(samples[::2], samples[1::2], strict=True)]  # fmt: skip
    return np.mean(u, axis=0)


def seeds_needed(deviations: np.ndarray, rng: np.random.Generator) -> int:
    """Return the number of seeds for `POWER` at each task's deviation, at most MAX_SEEDS + 1."""
    noise = rng.standard_normal((SIMULATIONS, MAX_SEEDS, len(deviations)))
    differences = POINT + deviations * noise

    def power(seeds: int) -> float:
        drawn = differences[:, :seeds].reshape(SIMULATIONS, -1)
        return float((sign_flip_p(drawn, rng) <= LEVEL).mean())

    return 2 + bisect_left(range(2, MAX_SEEDS + 1), POWER, key=power)


def sign_flip_p(differences: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return p of `statistics.pooled` for each of R studies with n differences: (R, n) -> (R,).

    The studies share the random flips, so that one matrix product gives all sums.
    """
    n = differences.shape[1]
    exact = 2**n <= SIGN_FLIPS
    all_flips = np.arange(2**n if exact else 0)[:, None] >> np.arange(n) & 1
    flips = all_flips if exact else rng.integers(2, size=(RANDOM_FLIPS, n))
    sums, observed = differences @ (1.0 - 2 * flips).T, differences.sum(axis=1, keepdims=True)
    tails = (sums <= observed + 1e-12).sum(axis=1), (sums >= observed - 1e-12).sum(axis=1)
    p = 2 * (np.minimum(*tails) + (not exact)) / (len(flips) + (not exact))
    return np.minimum(p, 1)


def power_table(frame: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Return the last row of each pair, over all tasks, as texts; labels: {column: with metric}."""
    if frame.empty:
        return frame
    last = frame.groupby(["model", "a", "b"], sort=False).tail(1)
    texts = tables.format_numbers(last)
    texts["model"] = last["model"].map(slug)
    texts["column"] = last["column"].map(lambda column: labels.get(column, column))
    names = {"seeds_needed": "seeds needed", "probability": "P(a > b)",
             "low": "95 % CI from", "high": "to"}  # fmt: skip
    return texts.rename(columns=names)
