"""Statistics of a study: intervals, sign-flip tests, Holm's correction, expected best scores."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from scipy import stats

from bitfit.results.scores import format_mean_std, mean_std
from bitfit.study import statistics


def test_mean_std():
    assert mean_std([1, 3, np.nan], skip_nan=True) == (2, pytest.approx(2**0.5), 2)
    np.testing.assert_equal(mean_std([2, np.nan], skip_nan=True), (2, np.nan, 1))
    np.testing.assert_equal(mean_std([np.nan], skip_nan=True), (np.nan, np.nan, 0))
    np.testing.assert_equal(mean_std([2, np.nan]), (np.nan, np.nan, 2))


def test_format_mean_std():
    assert format_mean_std(61.04, 2.26) == "61.0 ± 2.3"
    assert format_mean_std(61.04, np.nan) == "61.0"
    assert format_mean_std(np.nan, np.nan) == "nan"


def test_mean_interval():
    values = np.array([0.61, 0.65, 0.59, 0.7, 0.66])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert statistics.mean_interval([*values, np.nan], 0.9) == pytest.approx(tuple(expected))
    assert statistics.mean_interval([0.5, 0.5]) == (0.5, 0.5)
    np.testing.assert_equal(statistics.mean_interval([0.5]), (np.nan, np.nan))


def slow_p(columns):
    """Over all signs: how often a mean is at least as far from 0."""
    weights = np.concatenate([np.full(len(of), 1 / len(of)) for of in columns])
    terms = weights * np.concatenate(columns)
    sums = np.abs([terms @ signs for signs in product((-1, 1), repeat=len(terms))])
    return np.mean(sums >= abs(terms.sum()) - 1e-9)


def test_signs_are_flipped_exactly_where_there_are_few():
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = rng.normal(0.3, 1, 6).round(1)
        mean, p = statistics.pooled([values], rng)
        assert (mean, p) == pytest.approx((values.mean(), slow_p([values])))
    positive = np.array([0.01, 0.02, 0.01, 0.03, 0.02])
    assert statistics.pooled([positive], rng)[1] == statistics.least_p(5) == 0.0625
    assert statistics.pooled([-positive], rng)[1] == 0.0625
    assert statistics.pooled([np.zeros(5)], rng) == (0, 1)
    assert statistics.pooled([np.full(5, 0.1)], rng)[1] == 0.0625
    assert statistics.pooled([[0.5, 0.2, -0.5, -0.2]], rng)[1] == 1  # 0 but for the last bit


def test_columns_weigh_the_same_whatever_their_seeds():
    rng = np.random.default_rng(0)
    columns = [rng.normal(0.5, 1, n) for n in (2, 3, 5)]
    mean, p = statistics.pooled([*columns[:2], [*columns[2], np.nan]], rng)
    assert mean == pytest.approx(np.mean([of.mean() for of in columns]))
    assert p == pytest.approx(slow_p(columns))


def test_many_signs_are_flipped_at_random():
    rng = np.random.default_rng(0)
    columns = [rng.normal(0.3, 1, n) for n in (8, 10)]
    mean, p = statistics.pooled(columns, np.random.default_rng(1))
    assert p == pytest.approx(slow_p(columns), abs=0.03)
    assert (mean, p) == statistics.pooled(columns, np.random.default_rng(1))
    assert statistics.pooled([np.full(40, 0.1)], rng)[1] == pytest.approx(2 / 10_000)


def test_a_column_without_differences_leaves_nothing_to_pool():
    rng = np.random.default_rng(0)
    for columns in ([[0.1, 0.2], [np.nan]], [[0.1, 0.2], []], []):
        np.testing.assert_equal(statistics.pooled(columns, rng), (np.nan, np.nan))
    np.testing.assert_equal(statistics.pooled([[0.25]], rng), (0.25, np.nan))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("columns", [1, 4])
def test_the_interval_covers_with_few_seeds(n, columns):
    """Nothing but the seeds' noise, many times: bare percentiles would cover 50, 75 and 84 %."""
    rng, tries, covered = np.random.default_rng(0), 400, 0
    for _ in range(tries):
        values = rng.normal(0.5, 1, (columns, n))
        drawn = [(x * statistics.draws(rng, n, 300)).sum(axis=1) / n for x in values]
        low, high = statistics.interval(list(zip(values, drawn, strict=True)))
        covered += low <= 0.5 <= high
    assert covered / tries > 0.90


def test_holm_by_hand():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not fall below the one before
    adjusted = statistics.holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = statistics.holm([0.01, np.nan, 0.04, 0.03, np.nan, 0.005])
    assert adjusted == pytest.approx([0.03, np.nan, 0.06, 0.06, np.nan, 0.02], nan_ok=True)
    assert statistics.holm([0.6, 0.7]).tolist() == [1, 1]
    assert statistics.holm([0.2]).tolist() == [0.2]
    assert statistics.holm([]).tolist() == []


def test_holm_rejects_as_the_step_down_procedure_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, level = rng.random(6) ** 3, 0.2
        rejected = set()
        for step, i in enumerate(p.argsort()):
            if p[i] > level / (6 - step):
                break
            rejected.add(int(i))
        assert rejected == set(np.flatnonzero(statistics.holm(p) <= level).tolist())


def test_least_p():
    assert [statistics.least_p(n) for n in (1, 2, 5, 10)] == [1, 0.5, 0.0625, 2 / 1024]
    assert statistics.least_p(40) == 2 / 10_000  # of so many signs, some are flipped at random
    assert statistics.least_p(0) == 1


def test_expected_best_over_all_sets_of_trials():
    scores = np.random.default_rng(0).normal(size=7).round(1)
    expected = [np.mean([max(some) for some in combinations(scores, n)]) for n in range(1, 8)]
    assert statistics.expected_best(scores, range(1, 8)) == pytest.approx(expected)


def test_expected_best_of_many_trials():
    scores, n = np.random.default_rng(0).random(320), [1, 2, 160, 319, 320]
    formula = [
        sum(comb(i, k - 1) * v for i, v in enumerate(sorted(scores))) / comb(320, k) for k in n
    ]
    found = statistics.expected_best(scores.reshape(8, 5, 8), n)
    assert found == pytest.approx(formula, abs=1e-10)
    assert found[[0, -1]] == pytest.approx([scores.mean(), scores.max()])
    assert np.isfinite(statistics.expected_best(np.arange(5000), [1, 2500, 5000])).all()


def test_expected_best_of_trials_that_diverged():
    found = statistics.expected_best([0.2, np.nan, 0.6], [1, 3, 4])
    assert found == pytest.approx([1 / 3, 0.6, np.nan], nan_ok=True)
    assert np.isnan(statistics.expected_best([np.nan, np.nan], [1, 2])).all()
