"""All epochs of a stack, on the toy language."""

import numpy as np
import pytest
from conftest import GLUE, TINY_BERT, set_dropout
from moments import at_passes, at_step
from safetensors.numpy import load_file
from scipy.stats import ks_2samp

from bitfit.artifacts.metrics_files import LOGITS
from bitfit.data.tasks import score
from bitfit.results.scores import main_scores
from bitfit.training import loop
from glue_evaluator import GLUEvaluator
from utils import Diverged, UserError


def trained(seeds, rates=3e-3, epochs=6, dropout=None, rows=150, components=("bias",), **options):
    evaluator = GLUEvaluator("cola", TINY_BERT, None, seed=seeds, data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 128, 8, train_size=rows)
    evaluator.training_preparation(rates, "adamw", False, list(components), verbose=False)
    if dropout is not None:
        set_dropout(evaluator.model, dropout)
    options = {"evaluation_frequency": epochs} | options
    evaluator.train_and_evaluate(epochs, **options)
    return evaluator


def loss_and_score(evaluator):
    """(runs, 2)"""
    losses = [record.train_loss[-1] for record in evaluator.result.records]
    return np.column_stack([losses, main_scores(evaluator.result.scores, evaluator.task).iloc[-1]])


@pytest.mark.long
def test_with_dropout_a_stack_has_the_distribution_of_single_runs():
    """16 seeds together and 16 alone draw other dropout: two-sample Kolmogorov-Smirnov tests.

    That 16 are enough to tell is shown by a stack that leaves dropout out: its losses differ.
    """
    seeds = list(range(16))
    together = loss_and_score(trained(seeds, epochs=3))
    alone = np.concatenate([loss_and_score(trained(seed, epochs=3)) for seed in seeds])
    without = loss_and_score(trained(seeds, epochs=3, dropout=0.0))
    for column in range(2):
        assert ks_2samp(together[:, column], alone[:, column]).pvalue > 0.001
        assert ks_2samp(together[:, column], without[:, column]).pvalue < 0.001


def test_train_size_draws_rows_of_its_own_for_each_seed():
    """And a run among others has the rows, order and classifier that it has alone."""
    together = trained([3, 5], epochs=2, rows=40, dropout=0.0)
    assert len(together.tokens("train").lengths) > 40
    for run, seed in enumerate((3, 5)):
        alone = trained(seed, epochs=2, rows=40, dropout=0.0)
        assert len(alone.tokens("train").lengths) == 40
        together.select(run)
        assert together.record.train_loss == pytest.approx(alone.record.train_loss, rel=1e-4)
        scores = together.evaluations["train"]["MCC"]
        assert scores == pytest.approx(alone.evaluations["train"]["MCC"], abs=0.06)


@pytest.mark.parametrize("task", ["cola", "stsb", "mnli"])
def test_the_logits_of_every_evaluation_are_kept(tmp_path, task):
    """The scores come out of them again; a run that diverged has none."""
    evaluator = GLUEvaluator(task, TINY_BERT, None, seed=0, data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 128, 8, train_size=40)
    evaluator.prepare("bitfit", [3e-3, 1e30], components=["bias"], verbose=False)
    evaluator.train_and_evaluate(3, tmp_path)
    kept, gone = (load_file(tmp_path / run.name / LOGITS) for run in evaluator.runs)
    for split in evaluator.task.validation_splits:
        labels = kept[f"{split}.labels"]
        assert kept[split].shape == (3, len(labels), evaluator.num_labels)
        assert np.isnan(gone[split]).all()
        for metric, values in evaluator.evaluations[split].items():
            again = [
                score(evaluator.task, epoch_logits, labels)[metric] for epoch_logits in kept[split]
            ]
            assert again == pytest.approx(values, abs=1e-6)


def test_select_turns_every_result_to_that_run(tmp_path):
    evaluator = trained([0, 1], rates=[1e-3, 4e-3], epochs=2, rows=80)
    assert [run.name for run in evaluator.runs] == [
        "lr0.001_seed0", "lr0.001_seed1", "lr0.004_seed0", "lr0.004_seed1",
    ]  # fmt: skip
    logits = []
    for k, run in enumerate(evaluator.runs):
        evaluator.select(k)
        assert evaluator.record.run == run
        assert f"{run.learning_rate:g}, seed {run.seed}" in evaluator.caption
        evaluator.save(tmp_path / run.name)
        logits.append(evaluator.predict("validation"))
        last = {m: v[-1] for m, v in evaluator.evaluations["validation"].items()}
        assert evaluator.evaluate("validation") == pytest.approx(last)
        loaded = GLUEvaluator.load(tmp_path / run.name, None)
        assert np.array_equal(loaded.predict("validation"), logits[-1])
        assert loaded.caption == evaluator.caption
    assert not any(np.allclose(logits[0], other) for other in logits[1:])
    with pytest.raises(UserError, match="there is no run 4"):
        evaluator.select(4)


def test_each_run_keeps_its_own_best_epoch():
    evaluator = trained([0, 1, 2], epochs=5, rows=80, keep="best", evaluation_frequency=1)
    for k in range(3):
        evaluator.select(k)
        best = max(evaluator.evaluations["validation"]["MCC"])
        assert evaluator.evaluate("validation")["MCC"] == pytest.approx(best)


def test_memory_does_not_grow_with_the_runs():
    """64 runs: whatever their number, no pass is above the cap."""
    sizes = []
    with at_passes(lambda number, ids: sizes.append(ids.numel())):
        evaluator = trained(list(range(64)), epochs=1, rows=16)
    assert max(sizes) <= evaluator.prepared.token_budget.max_tokens == 2048
    assert sum(sizes) > 2 * 2048
    assert len({tuple(values.tolist()) for values in evaluator.result.stack.params[:, -2:]}) == 64


def test_all_diverged_is_one_error_and_keeps_the_last_good_values():
    with pytest.raises(Diverged, match="all 2 runs diverged; training stopped there"):
        trained([0, 1], rates=1e38, epochs=3)


def test_when_all_have_diverged_an_epoch_is_not_finished(monkeypatch):
    """Off a terminal too, where the bar does not draw."""
    monkeypatch.setattr(loop, "READ_LOSS_SECONDS", 0.0)
    steps = []
    with pytest.raises(Diverged), at_step(5, lambda: steps.append(5)):
        trained([0, 1], rates=1e38, epochs=1, rows=150)  # 19 steps
    assert not steps


def test_runs_that_cannot_share_a_pass_say_so():
    evaluator = GLUEvaluator("cola", TINY_BERT, None, seed=[0, 1], data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 128, 8, train_size=16)
    evaluator.training_preparation(1e-3, "adamw", True, verbose=False)
    with pytest.raises(UserError, match=r"2 runs cannot train in one pass, .*one after the other"):
        evaluator.train_and_evaluate(1)
    evaluator.training_preparation(1e-3, "adamw", True, verbose=False, seed=1)
    evaluator.train_and_evaluate(1)
    with pytest.raises(UserError, match="seed 7 is not one of this evaluator's"):
        evaluator.training_preparation(1e-3, "adamw", True, verbose=False, seed=7)
