"""The variance of a grid of seeds, against plain loops and simulated grids."""

import numpy as np
import pytest

from bitfit.results import seed_variance


def plain_mean_squares(grid):
    """The textbook's sums over all cells of a two-way table."""
    inits, datas = len(grid), len(grid[0])
    mean = sum(map(sum, grid)) / (inits * datas)
    init_means = [sum(row) / datas for row in grid]
    data_means = [sum(row[j] for row in grid) / inits for j in range(datas)]
    init = datas * sum((m - mean) ** 2 for m in init_means) / (inits - 1)
    data = inits * sum((m - mean) ** 2 for m in data_means) / (datas - 1)
    rest = 0
    for i in range(inits):
        for j in range(datas):
            rest += (grid[i][j] - init_means[i] - data_means[j] + mean) ** 2
    return init, data, rest / (inits - 1) / (datas - 1)


def plain_shares(squares, inits, datas):
    variances = [max(0, squares[0] - squares[2]) / datas, max(0, squares[1] - squares[2]) / inits]
    variances.append(squares[2])
    return [variance / sum(variances) for variance in variances]


def simulate(rng, shape, variances):
    """A grid with independent normal effects of these variances."""
    init, data, rest = np.sqrt(variances)
    effects = init * rng.standard_normal((shape[0], 1)) + data * rng.standard_normal((1, shape[1]))
    return 50 + effects + rest * rng.standard_normal(shape)


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (5, 3)])
def test_shares_and_intervals_equal_plain_loops(shape):
    grid = simulate(np.random.default_rng(3), shape, (2, 1, 0.5))
    squares, degrees = seed_variance.mean_squares(grid)
    expected = plain_mean_squares(grid.tolist())
    assert squares == pytest.approx(expected)
    shares = seed_variance.variance_shares(squares, shape)
    assert shares == pytest.approx(plain_shares(expected, *shape))
    found = seed_variance.share_intervals(grid, np.random.default_rng(1))
    draws, resampled = np.random.default_rng(1).chisquare(degrees, (10_000, 3)), []
    for draw in draws:
        drawn = [m * n / x for m, n, x in zip(expected, degrees, draw, strict=True)]
        resampled.append(plain_shares(drawn, *shape))
    assert found[0] == pytest.approx(np.quantile(resampled, 0.025, axis=0))
    assert found[1] == pytest.approx(np.quantile(resampled, 0.975, axis=0))


@pytest.mark.parametrize("variances", [(0, 0, 1), (0.3, 0.2, 0.5), (0.6, 0.3, 0.1)])
def test_the_intervals_cover_the_truth(variances):
    """In at least 87 of 100 grids of 5 x 5 seeds; 95 are meant, and 90 measured without effects."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        low, high = seed_variance.share_intervals(simulate(rng, (5, 5), variances), rng)
        covered.append((low <= variances) & (variances <= high + 1e-12))
    assert (np.mean(covered, axis=0) >= 0.87).all()
