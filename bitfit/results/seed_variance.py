"""The shares of init seeds, data seeds and the rest in the variance of a grid of seeds.

The model of a score is: mean + effect of the init seed + effect of the data seed + rest. The
effects are independent and normal. The rest is their interaction and the noise of dropout, since
each pair of seeds has one run.
"""

import numpy as np
import pandas as pd

SOURCES = ("init seed", "data seed", "rest")
RESAMPLES = 10_000


def mean_squares(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean squares (3,) of the `SOURCES` and their degrees of freedom (3,).

    Args:
        scores: (I, D), one for each pair of an init seed and a data seed.
    """
    init = scores.mean(axis=1, keepdims=True) - scores.mean()
    data = scores.mean(axis=0, keepdims=True) - scores.mean()
    rest = scores - scores.mean() - init - data
    squares = [np.broadcast_to(part, scores.shape) ** 2 for part in (init, data, rest)]
    first, second = scores.shape[0] - 1, scores.shape[1] - 1
    degrees = np.array([first, second, first * second])
    return np.array([part.sum() for part in squares]) / degrees, degrees


def variance_shares(squares: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the share of each source in the variance of a score, (..., 3), from mean squares.

    The mean square of a factor includes the rest: Var(init) = (MS(init) - MS(rest)) / D. Negative
    estimates count as 0.

    Args:
        squares: (..., 3).
        shape: (I, D), the numbers of seeds.
    """
    rest = squares[..., 2:]
    factors = np.maximum(0, squares[..., :2] - rest) / shape[::-1]
    variances = np.concatenate([factors, rest], axis=-1)
    return variances / variances.sum(axis=-1, keepdims=True)


def share_intervals(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the 95 % intervals (2, 3) of the shares, by a parametric bootstrap.

    A resample divides each sum of squares by a draw of its chi-squared distribution (a generalized
    confidence interval, Weerahandi 1993). Resampling seeds instead would repeat some of them:
    its intervals cover the share of the rest in less than half of 2 x 2 grids.
    """
    squares, degrees = mean_squares(scores)
    drawn = squares * degrees / rng.chisquare(degrees, (RESAMPLES, 3))
    return np.quantile(variance_shares(drawn, scores.shape), (0.025, 0.975), axis=0)


def seed_variance(metadata: pd.DataFrame, groups: dict[float, pd.DataFrame]) -> pd.DataFrame:
    """Return a row for each learning rate and source, with its share and interval.

    Learning rates without a complete grid of two by two seeds, or with equal scores, have no row.

    Args:
        metadata: one row per run: run, seed, data_seed.
        groups: {learning rate: scores (epochs, runs)}; the last epoch counts.
    """
    rows = []
    for rate, scores in groups.items():
        if scores.empty:  # all runs diverged
            continue
        of_runs = metadata.set_index("run").loc[scores.columns].assign(score=scores.iloc[-1])
        grid = of_runs.pivot(index="seed", columns="data_seed", values="score").to_numpy()
        if min(grid.shape) < 2 or np.isnan(grid).any() or not np.ptp(grid):
            continue
        shares = variance_shares(mean_squares(grid)[0], grid.shape)
        low, high = share_intervals(grid, np.random.default_rng(0))
        columns = zip(SOURCES, shares, low, high, strict=True)
        rows += [(rate, *grid.shape, *values) for values in columns]
    names = ["learning_rate", "init_seeds", "data_seeds", "source", "share", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def format_seed_variance(table: pd.DataFrame) -> str:
    """Return the shares in percent as text, one line per learning rate."""
    percent = 100 * table[["share", "low", "high"]].to_numpy()
    cells = [f"{share:.0f} ({low:.0f} to {high:.0f})" for share, low, high in percent]
    keys = [name for name in table if name not in ("source", "share", "low", "high")]
    # Not pivot(), which sorts the sets of bias terms.
    wide = table.assign(cell=cells).set_index([*keys, "source"])["cell"].unstack(sort=False)
    shown = wide[list(SOURCES)].reset_index().rename(columns=lambda name: name.replace("_", " "))
    title = "percent of the variance of the last epoch's scores that seeds explain (95 % interval):"
    return f"{title}\n{shown.to_string(index=False, float_format='{:g}'.format)}"
