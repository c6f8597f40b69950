"""Bootstrap over examples and seeds, and the interval of a difference between two methods."""

from time import perf_counter

import numpy as np
import pytest
from drawn_scores import ACCURACY, NAMES, best_of, drawn, last_of, logits_of, slow_scores
from scipy import stats

from bitfit.data.tasks import TASKS
from bitfit.study import statistics
from bitfit.study.statistics import Choice, Selected, main_scores


@pytest.mark.parametrize("name", NAMES)
def test_resampled_scores_are_those_of_repeated_rows(name):
    task = TASKS[name]
    logits, labels = drawn(task, (2, 3), 40)
    logits[1, 1] = np.nan
    counts = np.random.default_rng(1).integers(0, 4, (5, 40))
    values = statistics.resampled(task, logits, labels, counts)
    assert values.shape == (5, 2, 3)
    for resampled, count in zip(values, counts, strict=True):
        rows = np.repeat(np.arange(40), count)
        expected = main_scores(task, logits[..., rows, :], labels[rows])
        np.testing.assert_allclose(resampled, expected, rtol=0, atol=1e-12)
        assert resampled[0] == pytest.approx(slow_scores(task, logits[0][:, rows], labels[rows]))


def test_resampling_is_fast_enough():
    for name, rows in (("stsb", 1500), ("qqp", 40_430)):
        task, start = TASKS[name], perf_counter()
        logits, labels = drawn(task, (10,), rows)
        rng = np.random.default_rng(0)
        values = statistics.row_bootstrap(task, logits, labels, rng, 300)
        assert values.shape == (300, 10)
        assert perf_counter() - start < 10
        assert np.ptp(values, axis=0).max() < 0.2


def test_draws():
    counts = statistics.draws(np.random.default_rng(0), 5, 20_000)
    assert (counts.sum(axis=1) == 5).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(5), abs=0.05)
    assert counts.var(axis=0) == pytest.approx(np.full(5, 0.8), abs=0.05)  # binomial (5, 1 / 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("select", [last_of, best_of, statistics.select_split])
def test_bootstrap_against_a_slow_version(name, select):
    task = TASKS[name]
    a_logits, labels = drawn(task, (2, 4, 3), 30, 0)
    b_logits = drawn(task, (3, 4, 2), 30, 1)[0]
    a_logits[:, 1, 1:] = np.nan
    a, b = (select(task, x, labels) for x in (a_logits, b_logits))
    args = task, a, b, a_logits, b_logits, labels
    drawn_seeds = statistics.draws(np.random.default_rng(3), 3, 9)
    fast = statistics.bootstrap_differences(*args, np.random.default_rng(2), drawn_seeds)

    rng, seeds, halves = np.random.default_rng(2), [0, 2, 3], []
    for mine, other in zip(a.choices, b.choices, strict=True):
        counts, of_half = statistics.draws(rng, len(mine.rows), 9), []
        for rows in (np.repeat(mine.rows, count) for count in counts):
            ours, theirs = (
                [slow_scores(task, x[c.rate, s, c.epoch[s]][rows], labels[rows]) for s in seeds]
                for c, x in ((mine, a_logits), (other, b_logits))
            )
            of_half.append(np.subtract(ours, theirs))
        halves.append(of_half)
    by_seed = np.mean(halves, axis=0)
    slow = [
        np.repeat(difference, count).mean()
        for difference, count in zip(by_seed, drawn_seeds, strict=True)
    ]
    assert fast == pytest.approx(slow, abs=1e-12)


def test_blocks_of_resamples_are_put_together():
    logits, labels = drawn(ACCURACY, (3,), 20)
    values = statistics.row_bootstrap(ACCURACY, logits, labels, np.random.default_rng(0), 250)
    assert values.shape == (250, 3)
    assert not np.array_equal(values[:100], values[100:200])
    assert values.mean(axis=0) == pytest.approx(main_scores(ACCURACY, logits, labels), abs=0.03)


def compare(a_right, b_right, rng, resamples=200):
    """The `difference` of two methods, given which rows each seed is right about: (S, rows)."""
    labels = np.ones(a_right.shape[1], int)
    logits = [logits_of(right)[None, :, None] for right in (a_right, b_right)]
    a, b = (last_of(ACCURACY, of_method, labels) for of_method in logits)
    return paired(a, b, logits[0], logits[1], labels, rng, resamples)


def paired(a, b, a_logits, b_logits, labels, rng, resamples=200):
    measured = statistics.differences(a, b)
    seeds = (
        statistics.draws(rng, len(measured), resamples)
        if len(measured)
        else np.zeros((resamples, 0))
    )
    args = ACCURACY, a, b, a_logits, b_logits, labels, rng, seeds
    drawn = (
        statistics.bootstrap_differences(*args) if len(measured) > 1 else np.full(resamples, np.nan)
    )
    return statistics.difference([(measured, drawn)], rng)


def test_the_interval_covers_a_known_difference():
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(40):
        hard = rng.random(400) < 0.1  # for all seeds of both methods
        a = ~hard & (rng.random((6, 400)) < 0.9)
        b = ~hard & (rng.random((6, 400)) < 0.8)
        found = compare(a, b, rng)
        covered += found["low"] <= 9 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert covered >= 36
    assert np.mean(widths) < 11


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    right = rng.random((5, 80)) < rng.random((5, 1))
    assert list(compare(right, right, rng).values()) == [0, 0, 0, 5, 1, 0.0625]


def test_the_interval_has_no_width_where_seeds_and_rows_are_alike():
    found = compare(np.ones((5, 30), bool), np.zeros((5, 30), bool), np.random.default_rng(0))
    assert list(found.values()) == [100, 100, 100, 5, 0.0625, 0.0625]


def test_the_interval_is_over_seeds_and_over_rows():
    right = np.zeros((4, 50), bool)
    of_seeds, of_rows = right.copy(), right.copy()
    of_seeds[:2], of_rows[:, :25] = True, True
    for varied, deviation in ((of_seeds, 4), (of_rows, 50)):
        found = compare(varied, right, np.random.default_rng(0), 2000)
        wider = stats.t.ppf(0.975, 3) / 1.96 * (4 / 3) ** 0.5
        half = 100 * wider * 1.96 * 0.5 / deviation**0.5
        assert found["difference"] == 50
        assert (found["low"], found["high"]) == pytest.approx((50 - half, 50 + half), abs=6)


def test_the_interval_is_widened_for_the_column_with_the_fewest_seeds():
    columns = [(np.array([0.0, 0.2]), np.linspace(-1, 1, 201)),
               (np.full(5, 0.1), np.linspace(-1, 1, 201))]  # fmt: skip
    wider = stats.t.ppf(0.975, 1 + 4) / stats.norm.ppf(0.975) * 2**0.5  # 2 / (2 - 1)
    expected = [0.1 + wider * (end - 0.1) for end in (-0.95, 0.95)]
    assert statistics.interval(columns) == pytest.approx(tuple(expected))


def test_seeds_that_one_method_lacks_are_left_out():
    logits, labels = drawn(ACCURACY, (1, 5, 2), 40)
    other = drawn(ACCURACY, (1, 5, 2), 40, 1)[0]
    logits[0, 0], other[0, 3, 1] = np.nan, np.nan
    a, b = (last_of(ACCURACY, x, labels) for x in (logits, other))
    found = paired(a, b, logits, other, labels, np.random.default_rng(0))
    kept = [1, 2, 4]
    expected = 100 * (a.values - b.values)[kept].mean()
    assert (found["pairs"], found["difference"]) == (3, pytest.approx(expected))
    less = [x[:, kept] for x in (logits, other)]
    a, b = (last_of(ACCURACY, x, labels) for x in less)
    again = paired(a, b, less[0], less[1], labels, np.random.default_rng(0))
    assert found == again


def test_too_few_seeds():
    logits, labels = drawn(ACCURACY, (1, 3, 1), 20)
    other = logits.copy()
    other[:, :, :, :5] = other[:, :, :, :5, ::-1]
    for lost, n in ((2, 1), (3, 0)):
        logits[:, :lost] = np.nan
        a, b = (last_of(ACCURACY, x, labels) for x in (logits, other))
        found = paired(a, b, logits, other, labels, np.random.default_rng(0))
        assert found["pairs"] == n
        assert np.isnan([found[name] for name in ("low", "high", "p")]).all()
        assert np.isfinite(found["difference"]) == (n == 1)


def test_what_cannot_be_compared():
    logits, labels = drawn(ACCURACY, (1, 3, 1), 20)
    rng = np.random.default_rng(0)
    a = last_of(ACCURACY, logits, labels)
    with pytest.raises(ValueError, match="3 seeds against 1"):
        statistics.differences(a, Selected(a.values[:1], a.choices))
    b = Selected(a.values, [Choice(np.arange(10), 0, np.zeros(3, int))])
    with pytest.raises(ValueError, match="not scored on the same examples"):
        paired(a, b, logits, logits, labels, rng)
