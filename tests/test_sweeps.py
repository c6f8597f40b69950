import json

import numpy as np
import pandas as pd
import pytest

from bitfit.data.tasks import TASKS
from bitfit.model.run import Run
from bitfit.options import TERMS
from bitfit.results import seed_variance, sweeps
from utils import Diverged

RTE, NAN = TASKS["rte"], float("nan")


def result(rate, seed, scores, diverged=None):
    """(run, its metrics.json as far as it is read here, its main score by epoch)"""
    content = {"train_loss": [0.7], "seconds": {"training": 1.0, "evaluation": 0.5}}
    return Run(rate, seed), content | {"diverged": diverged}, scores


RESULTS = [
    result(1e-4, 0, [0.5, 0.52, 0.51]),
    result(1e-4, 1, [0.5, 0.50, 0.53]),
    result(1e-3, 0, [0.6, 0.70, 0.66]),
    result(1e-3, 1, [0.6, 0.65, 0.64]),
    result(1e-2, 0, [0.5, 0.50, 0.50]),
    result(1e-2, 1, [0.9], diverged="the loss was not finite at epoch 3, step 1"),
]


def write(folder, results):
    """{run: its folder}, each with its metrics files"""
    folders = {run: folder / run.name for run, _, _ in results}
    for run, content, scores in results:
        folders[run].mkdir(parents=True)
        (folders[run] / "metrics.json").write_text(json.dumps(content))
        rows = [
            (2 * (number + 1), split, "Accuracy", score)
            for split in ("train", "validation")
            for number, score in enumerate(scores)
        ]
        table = pd.DataFrame(rows, columns=["epoch", "split", "metric", "value"])
        table.to_csv(folders[run] / "metrics.csv", index=False)
    return folders


@pytest.mark.pictures
def test_report(tmp_path):
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, RESULTS), "a caption")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        "a caption: validation Accuracy × 100",
        "learning rate seeds last epoch best epoch of each best seed",
        "0.0001 2 52.0 ± 1.4 52.5 ± 0.7 53.0 (seed 1, epoch 6)",
        "0.001 2 65.0 ± 1.4 67.5 ± 3.5 70.0 (seed 0, epoch 4)",
        "0.01 1 (1 diverged) 50.0 50.0 50.0 (seed 0, epoch 2)",
        "best of 6 trials: 70.0 (lr0.001_seed0, epoch 4); chosen on the examples it is scored on, "
        "so it is optimistic",
    ]
    table = pd.read_csv(tmp_path / "results.csv").set_index("run")
    assert table.loc["lr0.001_seed0", ["last", "best", "best_epoch"]].tolist() == [66.0, 70.0, 4]
    assert table["diverged"].notna().sum() == 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["trials"], content["best"]["run"]) == (6, "lr0.001_seed0")
    assert (tmp_path / "learning_curves_accuracy.png").stat().st_size > 10_000


def test_a_score_is_printed_alike_wherever_it_stands(tmp_path):
    """66.8519 is 66.85 in the CSV, and rounded from there it would be 66.8."""
    results = [result(1e-3, 0, [0.668519]), result(1e-3, 1, [0.5])]
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, results), "a caption")
    assert text.count("66.9") == 2
    assert "66.8" not in text


def test_a_run_that_diverged_before_any_score_is_a_row_too(tmp_path):
    results = [result(1e-3, 0, [0.5, 0.6]), result(1e-1, 0, [], "not finite at epoch 1, step 3")]
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, results), "a caption")
    assert "0 (1 diverged)" in text
    table = pd.read_csv(tmp_path / "results.csv").set_index("run")
    assert np.isnan(table.loc["lr0.1_seed0", "last"])
    assert ",Accuracy,4,60.0,4,60.0," in (tmp_path / "results.csv").read_text()
    lonely = tmp_path / "lonely"
    with pytest.raises(Diverged, match="all 1 runs diverged"):
        sweeps.write_report(lonely, RTE, write(lonely, results[1:]), "a caption")


def test_a_score_that_is_no_number_hides_nothing(tmp_path):
    """STS-B's correlation after a last step that blew up but stayed finite."""
    nan = float("nan")
    results = [
        result(1e-3, 0, [0.5, 0.6]),
        result(1e-3, 1, [0.5, nan]),
        result(1e-1, 0, [nan, nan]),
    ]
    folders = write(tmp_path, results)
    lines = sweeps.write_report(tmp_path, RTE, folders, "a caption").splitlines()
    assert lines[2].split()[:3] == ["0.001", "2", "nan"]
    table = pd.read_csv(tmp_path / "results.csv").set_index("run")
    assert table["last_epoch"].tolist() == [4, 4, 4]
    assert table["last"].isna().tolist() == [False, True, True]
    assert "best of 3 trials: 60.0 (lr0.001_seed0, epoch 4)" in lines[4]
    alone = {run: folder for run, folder in folders.items() if run.learning_rate == 0.1}
    assert sweeps.best_run(*sweeps.read_sweep(alone), RTE) == "lr0.1_seed0"


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({1e-4: [0.5, 0.4], 1e-3: [0.7, 0.6], 1e-2: [0.5, 0.4]}, []),
        ({1e-4: [0.5, 0.4], 1e-3: [0.7, 0.6]}, ["0.001, is the highest of the grid: try higher"]),
        ({1e-4: [0.8, 0.7], 1e-3: [0.7, 0.6]}, ["0.0001, is the lowest of the grid: try lower"]),
        ({1e-4: [0.9, 0.9], 1e-3: [0.9, 0.9]}, []),
        ({1e-3: [0.7, 0.8]}, ["0.001 still rise at the last epoch, 4: train for more"]),
        ({1e-3: [0.8, 0.8]}, []),
        ({1e-3: [0.8]}, []),
        ({1e-4: [0.5, 0.4], 1e-3: [0.7, 0.8]}, ["the highest of the grid", "still rise"]),
        ({1e-3: [0.9, 0.5, 0.7]}, []),  # it rises, but not above what it was
        ({1e-4: [0.9, 0.1], 1e-3: [0.7, 0.6]}, ["0.001, is the highest"]),  # by the last epoch
        ({1e-4: [0.5, 0.4], 1e-3: [0.7, 0.6], 1e-2: None}, []),  # diverged, but it was tried
        ({1e-4: [0.5, 0.4], 1e-3: [NAN, 0.6]}, ["the highest of the grid", "still rise"]),
        ({1e-4: [0.5, 0.4], 1e-3: [0.7, NAN]}, ["0.0001, is the lowest"]),
        ({1e-4: [NAN, NAN], 1e-3: [NAN, NAN]}, []),
    ],
)
def test_warnings(tmp_path, curves, expected):
    results = [
        result(rate, 0, scores or [0.5], None if scores else "diverged")
        for rate, scores in curves.items()
    ]
    folders = write(tmp_path, results)
    warnings = sweeps.sweep_warnings(
        sweeps.scores_by_learning_rate(*sweeps.read_sweep(folders), RTE)
    )
    assert len(warnings) == len(expected)
    for warning, part in zip(warnings, expected, strict=True):
        assert part in warning


def test_a_rate_with_a_score_that_is_no_number_is_not_the_best(tmp_path):
    """The mean of the other seeds would be above."""
    results = [
        result(1e-4, 0, [0.6]), result(1e-3, 0, [0.5]), result(1e-2, 0, [0.9]),
        result(1e-4, 1, [0.6]), result(1e-3, 1, [0.5]), result(1e-2, 1, [NAN]),
    ]  # fmt: skip
    groups = sweeps.scores_by_learning_rate(*sweeps.read_sweep(write(tmp_path, results)), RTE)
    (warning,) = sweeps.sweep_warnings(groups)
    assert "0.0001, is the lowest of the grid" in warning


def test_curves_show_mean_and_range(tmp_path):
    metadata, scores = sweeps.read_sweep(write(tmp_path, RESULTS))
    figures = sweeps.sweep_curves(metadata, scores, RTE, "a caption")
    axes = figures["Accuracy"].axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    assert np.allclose(lines["learning rate 0.001 (2 seeds, last 65.0)"], [60, 67.5, 65])
    assert "learning rate 0.01 (1 seed, last 50.0)" in lines
    band = np.asarray(axes.collections[1].get_paths()[0].vertices)[:, 1]
    assert (band.min(), band.max()) == pytest.approx((60, 70))


def grid_results(shape, scores=None, diverged=()):
    """Runs of a grid of seeds at two learning rates."""
    rng, results = np.random.default_rng(0), []
    for rate in (1e-4, 1e-3):
        for i, j in np.ndindex(shape):
            _, content, curve = result(rate, 0, [0.5, scores or rng.random()])
            run = Run(rate, i, None if i == j else j)
            content["diverged"] = "at epoch 1" if run in diverged else None
            results.append((run, content, curve[:1] if run in diverged else curve))
    return results


def test_the_report_of_a_grid(tmp_path):
    results = grid_results((2, 3))
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, results), "a caption")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2].startswith("0.0001 6 pairs ")
    assert "(init seed 1, data seed 2, epoch " in text
    title = "percent of the variance of the last epoch's scores that seeds explain (95 % interval):"
    head = lines.index(title) + 1
    assert lines[head] == "learning rate init seeds data seeds init seed data seed rest"
    saved = pd.read_csv(tmp_path / "seed_variance.csv")
    for number, (rate, of_rate) in enumerate(saved.groupby("learning_rate")):
        last = [scores[-1] for run, _, scores in results if run.learning_rate == rate]
        grid = 100 * np.reshape(last, (2, 3))
        shares = seed_variance.variance_shares(seed_variance.mean_squares(grid)[0], (2, 3))
        assert of_rate["share"].to_numpy() == pytest.approx(shares)
        cells = [f"{100 * s:.0f} ({100 * a:.0f} to {100 * b:.0f})"
                 for s, a, b in of_rate[["share", "low", "high"]].to_numpy()]  # fmt: skip
        assert lines[head + 1 + number] == f"{rate:g} 2 3 {' '.join(cells)}"
    table = pd.read_csv(tmp_path / "results.csv")
    assert table.columns[:4].tolist() == ["run", "learning_rate", "init_seed", "data_seed"]
    assert table["init_seed"].tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert table["data_seed"].tolist() == [0, 1, 2] * 4
    metadata, scores = sweeps.read_sweep({run: tmp_path / run.name for run, *_ in results})
    axes = sweeps.sweep_curves(metadata, scores, RTE, "a caption")["Accuracy"].axes[0]
    assert "(6 seed pairs, last " in str(axes.get_lines()[0].get_label())


@pytest.mark.parametrize(
    ("results", "rows"),
    [
        (grid_results((1, 4)), 0),
        (grid_results((3, 1)), 0),
        (grid_results((2, 2), scores=0.6), 0),
        (grid_results((2, 2), diverged=[Run(1e-4, 0, 1)]), 3),
        (
            grid_results(
                (2, 2), diverged=[Run(1e-4, 0), Run(1e-4, 0, 1), Run(1e-4, 1, 0), Run(1e-4, 1)]
            ),
            3,
        ),
        ([result(1e-3, seed, [0.5 + seed / 100]) for seed in range(4)], 0),
    ],
    ids=[
        "one init seed",
        "one data seed",
        "equal scores",
        "a diverged run",
        "a diverged rate",
        "no grid",
    ],
)
def test_only_complete_grids_are_decomposed(tmp_path, results, rows):
    metadata, scores = sweeps.read_sweep(write(tmp_path, results))
    groups = sweeps.scores_by_learning_rate(metadata, scores, RTE)
    table = seed_variance.seed_variance(metadata, groups)
    assert len(table) == rows
    text = sweeps.write_report(tmp_path, RTE, {run: tmp_path / run.name for run, *_ in results}, "")
    assert ("percent of the variance" in text) == (tmp_path / "seed_variance.csv").exists()
    assert (tmp_path / "seed_variance.csv").exists() == (rows > 0)


def test_the_report_of_sets_of_terms_of_which_one_diverged(tmp_path):
    results = []
    for terms in ("all", "none"):
        for run, content, curve in grid_results((2, 2)):
            content["diverged"] = "at epoch 1" if terms == "all" else None
            results.append((run._replace(terms=terms), content, curve))
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, results), "a caption")
    assert "all 0.0001 0 pairs (4 diverged) - - -" in " ".join(text.split())
    saved = pd.read_csv(tmp_path / "seed_variance.csv", keep_default_na=False)
    assert saved["bias_terms"].unique().tolist() == ["none"]


def test_the_variance_has_the_sets_of_terms_in_the_order_of_the_flags(tmp_path):
    results = [(run._replace(terms=terms), *files)
               for terms in ("query", "none", "all")
               for run, *files in grid_results((2, 2))]  # fmt: skip
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, results), "a caption")
    first, second = text.split("best of ")
    for part in (first, second.partition("percent of the variance")[2]):
        places = [part.index(f" {terms} ") for terms in ("query", "none", "all")]
        assert places == sorted(places)


@pytest.mark.parametrize("terms", [None, "none", " ".join(TERMS)])
def test_the_legend_of_a_sweep_is_within_the_figure(tmp_path, terms):
    results = [(run._replace(terms=terms), *files) for run, *files in grid_results((1, 2))]
    results += [(run._replace(learning_rate=rate), content, scores)
                for rate in (2e-4, 3e-4) for run, content, scores in results[:2]]  # fmt: skip
    metadata, scores = sweeps.read_sweep(write(tmp_path, results))
    figure = sweeps.sweep_curves(metadata, scores, RTE, "a caption")["Accuracy"]
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().height > 0.5 * figure.bbox.height
