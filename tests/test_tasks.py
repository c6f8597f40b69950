import numpy as np
import pytest
import torch

from bitfit import options
from bitfit.data.tasks import TASKS, compact, predictions, row_losses, score
from bitfit.model import trainable
from bitfit.tracking import services

# paper.md's facts, written down a second time on purpose
LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
    "stsb": (),
}
FILES = {
    "cola": ["CoLA.tsv"],
    "sst2": ["SST-2.tsv"],
    "mrpc": ["MRPC.tsv"],
    "qqp": ["QQP.tsv"],
    "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"],
    "qnli": ["QNLI.tsv"],
    "rte": ["RTE.tsv"],
    "wnli": ["WNLI.tsv"],
    "stsb": ["STS-B.tsv"],
}


def test_label_order_and_server_files():
    assert {name: task.labels for name, task in TASKS.items()} == LABELS
    assert {name: list(task.server_files.values()) for name, task in TASKS.items()} == FILES
    named = {name for name, task in TASKS.items() if task.labels_by_name}
    assert named == {"mnli", "qnli", "rte"}


def test_main_metrics():
    main = {name: task.metrics[0] for name, task in TASKS.items()}
    assert main.pop("cola") == "MCC"
    assert main.pop("stsb") == "Spearman"
    assert main.pop("mrpc") == main.pop("qqp") == "F1"
    assert set(main.values()) == {"Accuracy"}


def one_hot(numbers, classes):
    return np.eye(classes)[numbers]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "stsb"])
def test_perfect_and_constant_classifiers(name):
    task = TASKS[name]
    labels = np.arange(12) % task.num_labels
    perfect = score(task, one_hot(labels, task.num_labels), labels)
    assert perfect == dict.fromkeys(task.metrics, 1.0)
    constant = score(task, one_hot(np.zeros(12, int), task.num_labels), labels)
    assert constant.get("MCC", 0.0) == 0.0
    assert constant.get("F1", 0.0) == 0.0


def test_known_scores():
    labels = np.array([1, 1, 0, 0, 1])
    logits = one_hot([1, 0, 0, 1, 1], 2)
    assert score(TASKS["mrpc"], logits, labels) == pytest.approx({"F1": 2 / 3, "Accuracy": 0.6})
    assert score(TASKS["cola"], logits, labels)["MCC"] == pytest.approx(1 / 6)


def test_correlations():
    labels = np.array([0.0, 1.0, 2.0, 5.0], np.float32)
    scores = score(TASKS["stsb"], np.array([[0.0], [1.0], [8.0], [9.0]]), labels)
    assert scores["Spearman"] == pytest.approx(1.0)
    assert scores["Pearson"] == pytest.approx(np.corrcoef(labels, [0, 1, 8, 9])[0, 1])
    constant = np.full((4, 1), 2.5)
    assert score(TASKS["stsb"], constant, labels) == {"Spearman": 0.0, "Pearson": 0.0}


def test_regression_predictions_are_clipped():
    assert predictions(TASKS["stsb"], np.array([[-1.0], [2.5], [7.0]])).tolist() == [0.0, 2.5, 5.0]


def test_row_losses_are_those_of_torch():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert torch.allclose(
        row_losses(TASKS["mnli"], logits, labels).mean(),
        torch.nn.CrossEntropyLoss()(logits, labels),
    )
    scores, targets = torch.randn(5, 1), torch.rand(5)
    expected = torch.nn.MSELoss()(scores[:, 0], targets)
    assert torch.allclose(row_losses(TASKS["stsb"], scores, targets).mean(), expected)


def test_compact_logits_keep_their_order():
    """Whatever is largest stays so, and all are finite."""
    close = np.array([[0.0, 1e-8], [3.0, 3.0], [1e6, -1e6], [0.1, 0.2]], np.float32)
    kept = compact(TASKS["rte"], close)
    assert kept.dtype == np.float16
    assert np.isfinite(kept).all()
    assert kept.argmax(axis=1).tolist() == [1, 0, 0, 1]
    assert kept[1].tolist() == [0, 0]
    scores = np.array([[1.23456789]], np.float32)
    assert compact(TASKS["stsb"], scores) is scores


def test_flags_name_what_can_be_chosen():
    assert tuple(TASKS) == options.TASK_NAMES
    assert trainable.SELECTORS.keys() - {"none"} == set(options.FINE_TUNE_TYPES)  # --evaluate-only
    assert tuple(services.KINDS) == options.TRACKERS
