"""The paper's finding in small, over several seeds, and that the examples are what they claim."""

import json

import numpy as np
import pytest
from conftest import GLUE, ROOT, TINY_BERT

from bitfit.data.splits import read_split
from bitfit.data.tasks import TASKS
from bitfit.results.scores import main_scores
from glue_evaluator import GLUEvaluator

SEEDS = (0, 1, 2)
RUNS = {  # as in scripts/demo.sh: all?, components, learning rate, epochs, random encoder
    "bitfit": (False, ["bias"], 3e-3, 24, False),
    "full_ft": (True, None, 3e-4, 8, False),
    "frozen": (False, None, 1e-2, 24, False),
    "random": (False, ["bias"], 3e-3, 8, True),
}
# Lowest and highest Matthews correlation: BitFit does nearly as well as full fine-tuning, a frozen
# encoder stays behind, and one that was never trained learns nothing.
EXPECTED = {"bitfit": (0.85, 1), "full_ft": (0.95, 1), "frozen": (-1, 0.5), "random": (-1, 0.3)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "seeds"),
    [("bitfit", SEEDS), *(("full_ft", (seed,)) for seed in SEEDS), ("frozen", SEEDS),
     ("random", SEEDS)],
)  # fmt: skip
def test_the_papers_finding_in_small(method, seeds):
    """All seeds that share a pass train together."""
    encoder_trainable, components, learning_rate, epochs, random_encoder = RUNS[method]
    evaluator = GLUEvaluator(
        "cola", TINY_BERT, None, seed=list(seeds), data_dir=GLUE, random_encoder=random_encoder
    )
    evaluator.preprocess_dataset("longest", 128, 8)
    evaluator.training_preparation(learning_rate, "adamw", encoder_trainable, components, False)
    evaluator.train_and_evaluate(epochs, evaluation_frequency=epochs)
    scores = main_scores(evaluator.result.scores, evaluator.task).iloc[-1].to_numpy()
    lowest, highest = EXPECTED[method]
    assert len(scores) == len(seeds)
    assert scores.min() > lowest and scores.max() <= highest, scores


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
