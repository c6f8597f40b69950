"""Scores of a study's logits, and the selection of learning rate and epoch."""

from itertools import product

import numpy as np
import pytest
from drawn_scores import ACCURACY, NAMES, drawn, logits_of, select_best, select_last, slow_scores

from bitfit.data.tasks import TASKS
from bitfit.study import statistics
from bitfit.study.statistics import main_scores


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
    assert_selected(select_last(SCORES, 7), [0.6, 0.6], 1, [2, 2])


def test_select_best():
    assert_selected(select_best(SCORES, 7), [0.7, 0.9], 0, [1, 0])
    assert_selected(select_best(SCORES[1:], 7), [0.6, 0.6], 0, [2, 0])


def test_of_equals_the_lowest_rate_is_chosen():
    values = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]])
    assert len(set(values.mean(axis=1))) > 1  # equal, but for the last bit
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert statistics.best_mean(values[order]) == (0,)


def test_a_rate_that_diverged_is_chosen_only_when_no_rate_is_whole():
    scores = SCORES.copy()
    scores[1, 0, 2] = np.nan
    assert_selected(select_last(scores, 7), [0.5, 0.5], 0, [2, 2])
    assert_selected(select_best(scores, 7), [0.7, 0.9], 0, [1, 0])
    scores[0, 1] = np.nan
    assert_selected(select_last(scores, 7), [np.nan, 0.6], 1, [2, 2])
    selected = select_best(scores, 7)
    np.testing.assert_array_equal(selected.values, [0.7, np.nan])
    assert selected.choices[0].rate == 0


def test_nothing_is_chosen_when_all_runs_diverged():
    logits, labels = drawn(ACCURACY, (2, 3, 4), 20)
    logits[:, :, -1] = np.nan
    scores = main_scores(ACCURACY, logits, labels)
    for selected in (
        select_last(scores, 20),
        select_best(scores, 20),
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
        best += [*select_best(main_scores(ACCURACY, logits, labels), 100).values]
        split += [*statistics.select_split(ACCURACY, logits, labels).values]
    assert np.mean(best) > 0.56
    assert np.mean(split) == pytest.approx(0.5, abs=0.02)  # its deviation is about 0.005
