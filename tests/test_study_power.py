"""Power of the study's tests and probability of improvement, against plain implementations."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from bitfit.data.tasks import TASKS
from bitfit.study import power, results, statistics


def rng(seed=0):
    return np.random.default_rng(seed)


def entry_of(task, split, scores, seeds=None, state="done"):
    """Return the table's entry of a cell with these scores by `split`."""
    cell = SimpleNamespace(seeds=list(seeds or range(len(scores))))
    found = SimpleNamespace(cell=cell, state=state, task=TASKS[task])
    selected = statistics.Selected(np.array(scores, float), [])
    return results.Entry(split, found, split, {"split": selected})


def frame_of(**columns):
    """Return the frame of {column: ((task, scores of bitfit, scores of frozen), options)}."""
    entries = {}
    for column, (task, *both) in columns.items():
        for row, scores in zip(("bitfit", "frozen"), both, strict=True):
            given = scores if isinstance(scores, dict) else {"scores": scores}
            entries["m", row, column, None] = entry_of(task, "validation", **given)
    frame = power.power_frame(entries, rng(), resamples=200)
    return frame.set_index("column") if len(frame) else frame


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
def test_the_simulated_test_is_the_test_of_the_report(n):
    """All flips of up to 13 differences, with ties and zeros among them."""
    studies = np.concatenate([rng(n).normal(0.4, 1, (12, n)).round(1), np.zeros((1, n)),
                              np.full((1, n), 0.01), -np.full((1, n), 0.3)])  # fmt: skip
    expected = [statistics.pooled([x], rng())[1] for x in studies]
    # A single difference has no p-value.
    np.testing.assert_allclose(power.sign_flip_p(studies, rng()), np.nan_to_num(expected, nan=1))


def test_many_signs_are_flipped_at_random():
    studies = rng(3).normal(0.4, 1, (10, 20))
    expected = [statistics.pooled([x], rng())[1] for x in studies]
    found = power.sign_flip_p(studies, rng())
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert power.sign_flip_p(np.full((1, 20), 0.1), rng()) == 2 / (power.RANDOM_FLIPS + 1)


def slow_power(deviations, seeds, studies=200):
    """Return the share of studies in which the report's test finds a point, one by one."""
    drawn, found = rng(5), 0
    for _ in range(studies):
        columns = [[0.01 + d * drawn.normal() for _ in range(seeds)] for d in deviations]
        found += statistics.pooled(columns, drawn)[1] <= 0.05
    return found / studies


@pytest.mark.parametrize("deviations", [[0.01], [0.008, 0.02], [0.01, 0, 0.02]])
def test_fewer_seeds_than_needed_have_less_power(deviations):
    """Three standard errors of 200 plain studies are 0.085."""
    n = power.seeds_needed(np.array(deviations), rng())
    assert n > 2
    assert slow_power(deviations, n) > 0.8 - 0.085
    assert slow_power(deviations, n - 1) < 0.8 + 0.085


@pytest.mark.parametrize("deviation", [0.014, 0.02, 0.03])
def test_seeds_needed_are_about_those_of_the_t_test(deviation):
    def power_of_t(n):
        limit = stats.t.ppf(0.975, n - 1)
        return stats.nct.sf(limit, n - 1, 0.01 / deviation * n**0.5)

    expected = next(n for n in range(2, 101) if power_of_t(n) >= 0.8)
    assert power.seeds_needed(np.array([deviation]), rng()) == pytest.approx(expected, rel=0.12)


def test_seeds_needed_at_the_limits():
    """Six signs are the fewest with p below 0.05; three tasks have as many with two seeds."""
    assert power.seeds_needed(np.zeros(1), rng()) == 6
    assert power.seeds_needed(np.zeros(3), rng()) == 2
    assert power.seeds_needed(np.full(1, 0.1), rng()) == power.MAX_SEEDS + 1
    (seeds,) = frame_of(**{"RTE": ("rte", [0.1, 0.9, 0.4], [0.9, 0.1, 0.2])})["seeds_needed"]
    assert seeds == "more than 100"


def slow_improvement(samples):
    """Return the share of pairs of runs in which a wins, a tie being half a win."""
    by_task = [np.mean([(x > y) + (x == y) / 2 for x, y in product(a, b)])
               for a, b in zip(samples[::2], samples[1::2], strict=True)]  # fmt: skip
    return np.mean(by_task)


def test_probability_of_improvement_by_hand():
    assert power.probability_of_improvement(np.array([0.3, 0.4]), np.array([0.1, 0.2])) == 1
    assert power.probability_of_improvement(np.array([0.1]), np.array([0.2, 0.3])) == 0
    assert power.probability_of_improvement(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0.5
    # Of six pairs 0.3 wins two, 0.2 wins one, and 0.2 ties with 0.2.
    ties = np.array([0.2, 0.3]), np.array([0.1, 0.2, 0.4])
    assert power.probability_of_improvement(*ties) == pytest.approx(3.5 / 6)


def test_probability_of_improvement_is_that_of_all_pairs():
    for seed in range(10):
        samples = [rng(seed).normal(0.6, 0.1, n).round(1) for n in (5, 5, 3, 4)]
        found = power.probability_of_improvement(*samples)
        assert found == pytest.approx(slow_improvement(samples))


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Each task and method has a draw of its seeds."""
    draw = rng(1)
    tasks = {"RTE": "rte", "CoLA": "cola"}
    scores = {c: [draw.normal(m, 0.1, 5).round(2) for m in (0.65, 0.6)] for c in tasks}
    frame = frame_of(**{c: (tasks[c], *scores[c]) for c in tasks})
    samples = [x for both in scores.values() for x in both]
    drawn = [slow_improvement([draw.choice(x, 5) for x in samples]) for _ in range(1000)]
    assert frame.loc["all", "probability"] == pytest.approx(slow_improvement(samples))
    ends = np.quantile(drawn, (0.025, 0.975))
    np.testing.assert_allclose(frame.loc["all", ["low", "high"]].astype(float), ends, atol=0.05)
    assert (frame["low"] <= frame["probability"]).all()
    assert (frame["high"] >= frame["probability"]).all()


def test_deviations_are_paired_by_seed_and_pooled():
    a, b, c = np.array([0.5, 0.6, 0.8]), np.array([0.4, 0.6, 0.6]), np.array([0.2, 0.3, 0.2])
    frame = frame_of(
        RTE=("rte", a, b), **{"MNLI-m": ("mnli", a, b), "MNLI-mm": ("mnli", b, c)}
    )  # fmt: skip
    assert frame.loc["RTE", "std"] == pytest.approx(100 * np.std(a - b, ddof=1))
    mnli = np.std((a + b) / 2 - (b + c) / 2, ddof=1)
    pooled = np.hypot(mnli, np.std(a - b, ddof=1)) / 2
    assert frame.loc["all", "std"] == pytest.approx(100 * pooled)
    assert frame["tasks"].tolist() == [1, 1, 1, 2]


def test_other_seeds_are_not_paired():
    a, b = [0.5, 0.6, 0.8], [0.4, 0.5, 0.7]
    frame = frame_of(
        RTE=("rte", a, b), CoLA=("cola", a, {"scores": b, "seeds": [7, 8, 9]}),
        QNLI=("qnli", a, {"scores": [0.4, 0.5], "seeds": [0, 1]}),
    )  # fmt: skip
    assert frame.loc["RTE", ["std", "seeds_needed"]].tolist() == [pytest.approx(0), "6"]
    assert frame.loc["CoLA", "std"] == pytest.approx(100 * 2**0.5 * np.std(a, ddof=1))
    expected = np.hypot(np.std(a, ddof=1), np.std([0.4, 0.5], ddof=1))
    assert frame.loc["QNLI", "std"] == pytest.approx(100 * expected)


def test_runs_that_diverged_and_single_seeds():
    nan = np.nan
    frame = frame_of(
        RTE=("rte", [0.5, nan, 0.8, 0.7], [0.4, 0.5, nan, 0.7]), CoLA=("cola", [0.6], [0.5]),
        QNLI=("qnli", [0.6, nan], [nan, 0.5]), MRPC=("mrpc", [0.6, 0.7], [nan, nan]),
        QQP=("qqp", [0.6, 0.7], {"scores": [0.1, 0.2], "state": "interrupted"}),
    )  # fmt: skip
    assert frame.index.tolist() == ["RTE", "CoLA", "QNLI", "all"]
    assert frame.loc["RTE", "std"] == pytest.approx(100 * np.std([0.1, 0], ddof=1))
    assert frame.loc["RTE", "probability"] == pytest.approx(7 / 9)
    assert frame.loc[["CoLA", "QNLI"], "seeds_needed"].tolist() == ["too few seeds"] * 2
    assert frame.loc[["CoLA", "QNLI"], ["std", "probability", "low", "high"]].isna().all(axis=None)
    pooled = frame.loc["all", ["tasks", "std", "probability"]].tolist()
    assert pooled == frame.loc["RTE", ["tasks", "std", "probability"]].tolist()


def test_scores_that_differ_in_the_last_bit_are_equal():
    a, b = [0.1 + 0.2, 0.3], [0.3, 0.3]
    assert frame_of(RTE=("rte", a, b)).loc["RTE", ["probability", "low", "high"]].eq(0.5).all()


def test_the_same_entries_give_the_same_table():
    columns = {"RTE": ("rte", rng(1).random(5), rng(2).random(5))}
    assert frame_of(**columns).equals(frame_of(**columns))
    assert frame_of(RTE=("rte", [np.nan], [0.5])).empty


def test_the_table_has_the_last_row_of_each_pair():
    frame = frame_of(
        RTE=("rte", [0.5, 0.6], [0.4, 0.4]), CoLA=("cola", [0.6, 0.6], [0.5, 0.7])
    ).reset_index()
    shown = power.power_table(frame, {"RTE": "RTE (Accuracy)"})
    assert shown[["model", "a", "b", "column", "tasks"]].to_numpy().tolist() == [
        ["m", "bitfit", "frozen", "all", 2]
    ]
    shown = power.power_table(frame[:1], {"RTE": "RTE (Accuracy)"})
    assert shown[["column", "std", "P(a > b)"]].to_numpy().tolist() == [
        ["RTE (Accuracy)", "7.07", "1.00"]
    ]
    single = power.power_table(
        frame_of(RTE=("rte", [0.5], [0.4])).reset_index(), {}
    )  # fmt: skip
    assert single[["std", "seeds needed", "to"]].to_numpy().tolist() == [["", "too few seeds", ""]]
    assert power.power_table(frame[:0], {}).empty
