from itertools import combinations, product
from math import comb
from time import perf_counter

import numpy as np
import pytest
from scipy import stats

from bitfit.data.tasks import TASKS, score
from bitfit.study import statistics
from bitfit.study.statistics import Choice, Difference, Selected, main_scores

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
    scores = [score(task, own, labels)[task.metrics[0]] for own in flat]
    return np.reshape(scores, logits.shape[:-2])


def constants(task, logits):
    """Each class for all rows; for a regression the same score."""
    values = np.eye(task.num_labels, dtype=logits.dtype)
    return np.broadcast_to(values[:, None], (task.num_labels, *logits.shape[-2:]))


@pytest.mark.parametrize("name", TASKS)
def test_main_scores_are_those_of_the_tasks(name):
    task = TASKS[name]
    logits, labels = drawn(task, (2, 3, 4), 57)
    expected = slow_scores(task, logits, labels)
    assert main_scores(task, logits, labels) == pytest.approx(expected, abs=1e-12)
    assert main_scores(task, logits[0, 0, 0], labels) == pytest.approx(expected[0, 0, 0])
    constant = constants(task, logits)
    expected = slow_scores(task, constant, labels)
    assert main_scores(task, constant, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn, of its own MCC
@pytest.mark.parametrize("name", NAMES)
def test_labels_that_are_all_the_same(name):
    task = TASKS[name]
    logits = drawn(task, (3,), 20)[0]
    logits = np.concatenate([logits, constants(task, logits)])
    for label in {0, task.num_labels - 1}:
        labels = np.full(20, label)
        expected = slow_scores(task, logits, labels)
        assert main_scores(task, logits, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_run_has_no_score(name):
    task = TASKS[name]
    logits, labels = drawn(task, (2, 3), 30)
    whole = main_scores(task, logits, labels)
    logits[0, 1] = logits[1, 2, 7, 0] = np.nan
    whole[0, 1] = whole[1, 2] = np.nan
    np.testing.assert_array_equal(main_scores(task, logits, labels), whole)


@pytest.mark.parametrize("name", NAMES)
def test_resampled_scores_are_those_of_repeated_rows(name):
    task = TASKS[name]
    logits, labels = drawn(task, (2, 3), 40)
    logits[1, 1] = np.nan
    counts = np.random.default_rng(1).integers(0, 4, (5, 40))
    values = statistics.resampled(task, logits, labels, counts)
    assert values.shape == (5, 2, 3)
    for own, count in zip(values, counts, strict=True):
        rows = np.repeat(np.arange(40), count)
        expected = main_scores(task, logits[..., rows, :], labels[rows])
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-12)
        assert own[0] == pytest.approx(slow_scores(task, logits[0][:, rows], labels[rows]))


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


SCORES = np.array([  # two learning rates, two seeds, three epochs
    [[0.1, 0.7, 0.5], [0.9, 0.2, 0.5]],
    [[0.3, 0.4, 0.6], [0.6, 0.6, 0.6]],
])  # fmt: skip


def assert_selected(selected, values, rate, epoch, rows=7):
    np.testing.assert_array_equal(selected.values, values)
    (choice,) = selected.choices
    assert (choice.rate, choice.epoch.tolist()) == (rate, epoch)
    assert choice.rows.tolist() == list(range(rows))


def test_select_last():
    assert_selected(statistics.select_last(SCORES, 7), [0.6, 0.6], 1, [2, 2])


def test_select_best():
    assert_selected(statistics.select_best(SCORES, 7), [0.7, 0.9], 0, [1, 0])
    assert_selected(statistics.select_best(SCORES[1:], 7), [0.6, 0.6], 0, [2, 0])


def test_of_equals_the_lowest_rate_is_chosen():
    values = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]])
    assert len(set(values.mean(axis=1))) > 1  # equal, but for the last bit
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert statistics.best_mean(values[order]) == (0,)


def test_a_rate_that_diverged_is_chosen_only_when_no_rate_is_whole():
    scores = SCORES.copy()
    scores[1, 0, 2] = np.nan
    assert_selected(statistics.select_last(scores, 7), [0.5, 0.5], 0, [2, 2])
    assert_selected(statistics.select_best(scores, 7), [0.7, 0.9], 0, [1, 0])
    scores[0, 1] = np.nan
    assert_selected(statistics.select_last(scores, 7), [np.nan, 0.6], 1, [2, 2])
    selected = statistics.select_best(scores, 7)
    np.testing.assert_array_equal(selected.values, [0.7, np.nan])
    assert selected.choices[0].rate == 0


def test_nothing_is_chosen_when_all_runs_diverged():
    logits, labels = drawn(ACCURACY, (2, 3, 4), 20)
    logits[:, :, -1] = np.nan
    scores = main_scores(ACCURACY, logits, labels)
    for selected in (
        statistics.select_last(scores, 20),
        statistics.select_best(scores, 20),
        statistics.select_split(ACCURACY, logits, labels),
    ):
        np.testing.assert_array_equal(selected.values, np.full(3, np.nan))
        assert selected.choices == []


def test_halves():
    for rows in (10, 11):
        first, second = statistics.halves(rows, 3)
        assert sorted([*first, *second]) == list(range(rows))
        assert abs(len(first) - len(second)) == rows % 2
    assert not np.array_equal(statistics.halves(10, 3)[0], statistics.halves(10, 4)[0])


@pytest.mark.parametrize("name", NAMES)
def test_select_split_against_a_slow_version(name):
    task = TASKS[name]
    logits, labels = drawn(task, (3, 2, 4), 61, skill=0.3)
    selected = statistics.select_split(task, logits, labels, seed=5)
    parts, values = statistics.halves(61, 5), []
    for i, choice in enumerate(selected.choices):
        means = {
            (rate, epoch): slow_scores(task, logits[rate, :, epoch][:, parts[i]], labels[parts[i]])
            for rate, epoch in product(range(3), range(4))
        }
        rate, epoch = max(means, key=lambda pair: means[pair].mean())
        rows = parts[1 - i]
        assert (choice.rate, choice.epoch.tolist()) == (rate, [epoch] * 2)
        assert choice.rows.tolist() == rows.tolist()
        values.append(slow_scores(task, logits[rate, :, epoch][:, rows], labels[rows]))
    assert selected.values == pytest.approx(np.mean(values, axis=0))


def test_select_split_never_scores_on_the_rows_it_selected_on():
    logits, labels = drawn(ACCURACY, (3, 2, 4), 60, skill=0.3)
    before = statistics.select_split(ACCURACY, logits, labels)
    for i, choice in enumerate(before.choices):
        changed = logits.copy()
        changed[..., choice.rows, :] = changed[..., choice.rows, ::-1]
        after = statistics.select_split(ACCURACY, changed, labels).choices[i]
        assert (choice.rate, *choice.epoch) == (after.rate, *after.epoch)


def test_select_split_with_diverged_runs():
    logits, labels = drawn(ACCURACY, (2, 3, 4), 40)
    logits[0] = logits_of(labels == 1)  # perfect, but that one of its runs diverges
    logits[0, 1, 3:] = np.nan
    selected = statistics.select_split(ACCURACY, logits, labels)
    assert [choice.rate for choice in selected.choices] == [1, 1]
    assert np.isfinite(selected.values).all()
    logits[1, :, 2:] = np.nan
    selected = statistics.select_split(ACCURACY, logits, labels)
    assert [choice.rate for choice in selected.choices] == [0, 0]
    np.testing.assert_array_equal(selected.values, [1, np.nan, 1])


def test_best_is_optimistic_on_noise_and_split_is_not():
    best, split = [], []
    for seed in range(20):
        logits, labels = drawn(ACCURACY, (4, 5, 10), 100, seed, skill=0)
        best += [*statistics.select_best(main_scores(ACCURACY, logits, labels), 100).values]
        split += [*statistics.select_split(ACCURACY, logits, labels).values]
    assert np.mean(best) > 0.56
    assert np.mean(split) == pytest.approx(0.5, abs=0.02)  # its deviation is about 0.005


def test_mean_std():
    assert statistics.mean_std([1, 3, np.nan]) == (2, pytest.approx(2**0.5), 2)
    np.testing.assert_equal(statistics.mean_std([2, np.nan]), (2, np.nan, 1))
    np.testing.assert_equal(statistics.mean_std([np.nan]), (np.nan, np.nan, 0))


def test_mean_interval():
    values = np.array([0.61, 0.65, 0.59, 0.7, 0.66])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert statistics.mean_interval([*values, np.nan], 0.9) == pytest.approx(tuple(expected))
    assert statistics.mean_interval([0.5, 0.5]) == (0.5, 0.5)
    np.testing.assert_equal(statistics.mean_interval([0.5]), (np.nan, np.nan))


def last_of(task, logits, labels):
    return statistics.select_last(main_scores(task, logits, labels), len(labels))


def best_of(task, logits, labels):
    return statistics.select_best(main_scores(task, logits, labels), len(labels))


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
    slow = [np.repeat(own, count).mean() for own, count in zip(by_seed, drawn_seeds, strict=True)]
    assert fast == pytest.approx(slow, abs=1e-12)


def test_blocks_of_resamples_are_put_together():
    logits, labels = drawn(ACCURACY, (3,), 20)
    values = statistics.row_bootstrap(ACCURACY, logits, labels, np.random.default_rng(0), 250)
    assert values.shape == (250, 3)
    assert not np.array_equal(values[:100], values[100:200])
    assert values.mean(axis=0) == pytest.approx(main_scores(ACCURACY, logits, labels), abs=0.03)


def compare(a_right, b_right, rng, resamples=200):
    """The `Difference` of two methods, given which rows each seed is right about: (S, rows)."""
    labels = np.ones(a_right.shape[1], int)
    logits = [logits_of(right)[None, :, None] for right in (a_right, b_right)]
    selected = [last_of(ACCURACY, own, labels) for own in logits]
    return paired(*selected, *logits, labels, rng, resamples)


def paired(a, b, a_logits, b_logits, labels, rng, resamples=200):
    own = statistics.differences(a, b)
    seeds = statistics.draws(rng, len(own), resamples) if len(own) else np.zeros((resamples, 0))
    args = ACCURACY, a, b, a_logits, b_logits, labels, rng, seeds
    drawn = statistics.bootstrap_differences(*args) if len(own) > 1 else np.full(resamples, np.nan)
    return statistics.difference([(own, drawn)], rng)


def test_the_interval_covers_a_known_difference():
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(40):
        hard = rng.random(400) < 0.1  # for all seeds of both methods
        a = ~hard & (rng.random((6, 400)) < 0.9)
        b = ~hard & (rng.random((6, 400)) < 0.8)
        found = compare(a, b, rng)
        covered += found.low <= 0.09 <= found.high
        widths.append(found.high - found.low)
    assert covered >= 36
    assert np.mean(widths) < 0.11


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    right = rng.random((5, 80)) < rng.random((5, 1))
    assert compare(right, right, rng) == Difference(0, 0, 0, 1, 5)


def test_the_interval_has_no_width_where_seeds_and_rows_are_alike():
    found = compare(np.ones((5, 30), bool), np.zeros((5, 30), bool), np.random.default_rng(0))
    assert found == Difference(1, 1, 1, 0.0625, 5)


def test_the_interval_is_over_seeds_and_over_rows():
    right = np.zeros((4, 50), bool)
    of_seeds, of_rows = right.copy(), right.copy()
    of_seeds[:2], of_rows[:, :25] = True, True
    for own, deviation in ((of_seeds, 4), (of_rows, 50)):
        found = compare(own, right, np.random.default_rng(0), 2000)
        wider = stats.t.ppf(0.975, 3) / 1.96 * (4 / 3) ** 0.5
        half = wider * 1.96 * 0.5 / deviation**0.5
        assert found.mean == 0.5
        assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.06)


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
    assert (found.n, found.mean) == (3, pytest.approx((a.values - b.values)[kept].mean()))
    less = [x[:, kept] for x in (logits, other)]
    a, b = (last_of(ACCURACY, x, labels) for x in less)
    again = paired(a, b, *less, labels, np.random.default_rng(0))
    assert found == again


def test_too_few_seeds():
    logits, labels = drawn(ACCURACY, (1, 3, 1), 20)
    other = logits.copy()
    other[:, :, :, :5] = other[:, :, :, :5, ::-1]
    for lost, n in ((2, 1), (3, 0)):
        logits[:, :lost] = np.nan
        a, b = (last_of(ACCURACY, x, labels) for x in (logits, other))
        found = paired(a, b, logits, other, labels, np.random.default_rng(0))
        assert found.n == n
        np.testing.assert_array_equal(found[1:4], np.full(3, np.nan))
        assert np.isfinite(found.mean) == (n == 1)


def test_what_cannot_be_compared():
    logits, labels = drawn(ACCURACY, (1, 3, 1), 20)
    rng = np.random.default_rng(0)
    a = last_of(ACCURACY, logits, labels)
    with pytest.raises(ValueError, match="3 seeds against 1"):
        statistics.differences(a, Selected(a.values[:1], a.choices))
    b = Selected(a.values, [Choice(np.arange(10), 0, np.zeros(3, int))])
    with pytest.raises(ValueError, match="not scored on the same rows"):
        paired(a, b, logits, logits, labels, rng)


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
        own = rng.normal(0.5, 1, (columns, n))
        drawn = [(x * statistics.draws(rng, n, 300)).sum(axis=1) / n for x in own]
        low, high = statistics.interval(list(zip(own, drawn, strict=True)))
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
