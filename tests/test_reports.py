import json

import numpy as np
import pandas as pd
import pytest
import torch

from bitfit.artifacts import metrics_files
from bitfit.data.tasks import TASKS
from bitfit.model.run import Run
from bitfit.results import plots, scores
from bitfit.training.state import Record

pytestmark = pytest.mark.pictures
MRPC = TASKS["mrpc"]
EPOCHS = [2, 4, 5]
EVALUATIONS = {
    "train": {"F1": [0.5, 0.8, 0.9], "Accuracy": [0.6, 0.7, 0.8]},
    "validation": {"F1": [0.4, 0.7, 0.7], "Accuracy": [0.5, 0.6, 0.65]},
}
RECORD = Record(Run(1e-3, 3))
SCORES = scores.scores_frame(
    [
        ("lr0.001_seed3", epoch, split, metric, values[number])
        for number, epoch in enumerate(EPOCHS)
        for split, of in EVALUATIONS.items()
        for metric, values in of.items()
    ]
)


def test_metrics_files(tmp_path):
    metrics_files.write_run_metrics(tmp_path, MRPC, RECORD, SCORES, {"seed": 3})
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["seed"] == 3
    assert content["main_metric"] == "F1"
    assert content["last"]["epoch"] == 5
    assert content["best"] == {  # the earliest of equals
        "epoch": 4,
        "train": {"F1": 0.8, "Accuracy": 0.7},
        "validation": {"F1": 0.7, "Accuracy": 0.6},
    }
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == ["epoch", "split", "metric", "value"]
    assert len(table) == 12
    row = table.query("epoch == 5 and split == 'validation' and metric == 'Accuracy'")
    assert row["value"].item() == 0.65


def test_score_table_shows_the_last_and_names_the_best():
    text = scores.score_table(SCORES, MRPC)
    assert "last (epoch 5)" in text
    assert "best (epoch 4)" in text
    assert scores.score_table(scores.scores_frame([]), MRPC) == "nothing was evaluated"


def test_learning_curves():
    figures = plots.learning_curves(SCORES, MRPC, "a caption")
    assert list(figures) == ["F1", "Accuracy"]
    axes = figures["Accuracy"].axes[0]
    assert figures["Accuracy"].get_suptitle() == "a caption"
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert np.allclose(lines["validation (last 65.0, best epoch 60.0)"], [50, 60, 65])


def test_bias_changes_are_the_papers():
    start = {
        f"bert.encoder.layer.{layer}.{name}": torch.zeros(4)
        for layer in (0, 1)
        for name in ("attention.self.query.bias", "intermediate.dense.bias")
    } | {"bert.pooler.dense.bias": torch.zeros(4), "classifier.weight": torch.zeros(2, 4)}
    end = {n: t.clone() for n, t in start.items()}
    end["bert.encoder.layer.1.intermediate.dense.bias"] += torch.tensor([1.0, -1.0, 0.0, 2.0])
    end["bert.encoder.layer.0.attention.self.query.bias"] -= 0.5
    changes = plots.bias_changes(start, end)
    terms = ["intermediate.dense.bias", "attention.self.query.bias"]  # most change first
    assert list(changes.index) == terms
    assert changes.to_numpy().tolist() == [[0.0, 1.0], [0.5, 0.0]]


def test_layers_of_one_number_in_several_stacks():
    """CANINE has three stacks, each with a layer 0."""
    start = {
        f"canine.{stack}.layer.{layer}.output.dense.bias": torch.zeros(4)
        for stack, layers in (("initial", 1), ("encoder", 2))
        for layer in range(layers)
    }
    end = {name: values + 0.5 for name, values in start.items()}
    changes = plots.bias_changes(start, end)
    assert list(changes.index) == [
        "canine.encoder.layer: output.dense.bias",
        "canine.initial.layer: output.dense.bias",
    ]
    assert np.array_equal(changes, [[0.5, 0.5], [0.5, np.nan]], equal_nan=True)
    plots.bias_heatmap(changes, "a caption").canvas.draw()


@pytest.mark.parametrize("layers", [1, 12, 24])
def test_nothing_is_cut_off(layers):
    """All that is drawn lies inside the picture, long captions and names included."""
    caption = "STS-B, a-model-with-quite-a-long-name, bitfit (query, key, value, output, " * 2
    start = {f"m.layer.{i}.attention.output.LayerNorm.bias": torch.zeros(2) for i in range(layers)}
    moved = plots.bias_changes(start, {n: t + 0.1 for n, t in start.items()})
    heatmap = plots.bias_heatmap(moved, caption)
    for figure in (heatmap, *plots.learning_curves(SCORES, MRPC, caption).values()):
        figure.canvas.draw()
        drawn, canvas = figure.get_tightbbox(), figure.get_size_inches()
        assert drawn.x0 >= 0
        assert drawn.y0 >= 0
        assert drawn.x1 <= canvas[0]
        assert drawn.y1 <= canvas[1]


def test_heatmap_labels():
    names = ["attention.output.LayerNorm.bias", "an.unheard.of.bias"]
    start = {f"m.layer.{i}.{name}": torch.zeros(2) for i in range(3) for name in names}
    end = {n: t + 0.1 for n, t in start.items()}
    figure = plots.bias_heatmap(plots.bias_changes(start, end), "a caption")
    axes = figure.axes[0]
    figure.canvas.draw()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "3", "Avg."]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        r"attention_layernorm  $\mathbf{b_{LN_1}}^{\ell}$",
        "an.unheard.of",
    ]


def test_heatmaps_have_the_same_order_of_terms():
    terms = ["attention.self.query.bias", "intermediate.dense.bias", "output.dense.bias"]
    changes = pd.DataFrame(np.ones((3, 2)), index=terms, columns=[1, 2])
    figures = [plots.bias_heatmap(table, "a caption") for table in (changes, changes[::-1])]
    first, second = (
        [label.get_text().split()[0] for label in figure.axes[0].get_yticklabels()]
        for figure in figures
    )
    assert first == second == ["query", "intermediate", "output"]
    assert "Mean absolute change of each bias term" in figures[0].get_suptitle()


def test_ticks_are_evaluated_epochs():
    figure = plots.learning_curves(SCORES, MRPC, "a caption")["F1"]
    assert figure.axes[0].get_xticks().tolist() == EPOCHS
    assert figure.axes[0].get_ylabel() == "F1 × 100"
    assert plots.epoch_ticks(range(1, 25)) == list(range(2, 25, 2))


def test_methods_differ_without_color():
    styles = {(style.linestyle, style.marker) for style in plots.METHOD_STYLES.values()}
    assert len(styles) == len(plots.METHOD_STYLES)
    assert len({plots.series_style(number) for number in range(40)}) == 40


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_figure_formats(tmp_path, suffix, start):
    figure = plots.learning_curves(SCORES, MRPC, "a caption")["F1"]
    plots.save_figure(figure, tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("task", "predicted", "lines"),
    [
        ("rte", [1, 0], ["0\tnot_entailment", "1\tentailment"]),
        ("mnli", [2, 1, 0], ["0\tcontradiction", "1\tneutral", "2\tentailment"]),
        ("wnli", [1, 0], ["0\t1", "1\t0"]),
        ("stsb", [0.0, 4.23456], ["0\t0.0000", "1\t4.2346"]),
    ],
)
def test_prediction_files(tmp_path, task, predicted, lines):
    path = tmp_path / "file.tsv"
    scores.write_predictions(path, TASKS[task], predicted)
    assert path.read_text() == "\n".join(["index\tprediction", *lines]) + "\n"
