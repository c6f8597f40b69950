"""The paper's finding in small, over several seeds, and that the examples are what they claim."""

import json

import numpy as np
import pytest
from conftest import GLUE, ROOT, TINY_BERT

from bitfit.data.splits import read_split
from bitfit.data.tasks import TASKS
from bitfit.results.scores import main_scores
from glue_evaluator import GLUEvaluator

SEEDS = (0, 1)
RUNS = {  # as in scripts/demo.sh: all?, components, learning rate, epochs, random encoder
    "bitfit": (False, ["bias"], 3e-3, 24, False),
    "full_ft": (True, None, 3e-4, 8, False),
    "frozen": (False, None, 1e-2, 24, False),
    "random": (False, ["bias"], 3e-3, 8, True),
}


def matthews(method):
    """The last validation score of each seed; what can be trained in one pass is."""
    encoder_trainable, components, learning_rate, epochs, random_encoder = RUNS[method]
    scores = []
    for seeds in [[seed] for seed in SEEDS] if encoder_trainable else [list(SEEDS)]:
        evaluator = GLUEvaluator(
            "cola", TINY_BERT, None, seed=seeds, data_dir=GLUE, random_encoder=random_encoder
        )
        evaluator.preprocess_dataset("longest", 128, 8)
        evaluator.training_preparation(learning_rate, "adamw", encoder_trainable, components, False)
        evaluator.train_and_evaluate(epochs, evaluation_frequency=epochs)
        scores += main_scores(evaluator.result.scores, evaluator.task).iloc[-1].tolist()
    return np.array(scores)


def test_the_papers_finding_in_small():
    """Biases do nearly what everything does; frozen stays behind; unlearned encoders fail."""
    scores = {method: matthews(method) for method in RUNS}
    shown = {method: values.round(3).tolist() for method, values in scores.items()}
    assert scores["full_ft"].min() > 0.8, shown
    assert (scores["bitfit"] > scores["full_ft"] - 0.1).all(), shown
    assert (scores["frozen"] < scores["bitfit"] - 0.2).all(), shown
    assert (scores["random"] < 0.3).all(), shown


def test_the_demo_runs_the_same():
    demo = (ROOT / "scripts" / "demo.sh").read_text()
    for kind, (_, _, rate, epochs, random) in RUNS.items():
        words = [line for line in demo.splitlines() if line.startswith("run ")]
        (line,) = [w for w in words if ("--random-encoder" in w) == random and
                   f"-type {'bitfit' if random else kind} " in w]  # fmt: skip
        shown = line.split("--learning-rate ")[1].split()[0]
        assert float(shown) == rate
        assert f"--epochs {epochs}" in line


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_scored_row_stands_in_train(task):
    seen = set(zip(*read_split(task, "train", GLUE).columns, strict=True))
    for split in task.splits:
        assert not seen & set(zip(*read_split(task, split, GLUE).columns, strict=True))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "stsb"])
def test_labels_are_balanced(name):
    for split in ("train", *TASKS[name].validation_splits):
        counts = np.bincount(read_split(TASKS[name], split, GLUE).labels)
        assert counts.min() > 0.7 * counts.max()


def test_the_examples_are_small():
    files = [path for path in (ROOT / "examples").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    config = json.loads((TINY_BERT / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["hidden_dropout_prob"] == 0.1
