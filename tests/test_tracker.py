"""The tracker beside training: speeds, slow and failing services, missing packages."""

import sys
import threading
from types import SimpleNamespace

import pytest
import wandb
from conftest import GLUE, TINY_BERT
from tracked import ALL, OVER, TRACKED, fail, mlflow_runs, run, warnings

from bitfit.tracking import services
from bitfit.tracking import tracker as tracking
from bitfit.tracking.tracker import Tracker
from bitfit.versions import is_installed
from glue_evaluator import GLUEvaluator

pytestmark = TRACKED


def test_the_speed_is_that_since_the_epoch_began():
    """In examples of each run; the last batch has four."""
    plan = SimpleNamespace(examples_before=lambda epoch, step: 36 * epoch + min(36, 8 * step))
    state = SimpleNamespace(plan=plan, epoch=1, step=4, seconds=3.0)
    assert tracking.examples_per_second(state) == 32 / 3
    state.step = 5
    assert tracking.examples_per_second(state) == 36 / 3


def test_what_wandb_has_already_is_not_told_again():
    """Its step would go back; results go behind the last."""
    run, told = object.__new__(services.WandB), []
    run.run = SimpleNamespace(log=lambda values, step: told.append((step, values)))
    run.first_step = 12
    for step in (11, 12, 13):
        run.log(step, {"a": step})
    assert [step for step, _ in told] == [12, 13]
    run.results(10, [], "a table")
    assert told[-1][0] == 12


def test_mlflow_takes_parameters_of_any_length(tmp_path, caplog):
    output = tmp_path / "long"
    output.mkdir()
    with Tracker(["mlflow"], output, {"terms": "x" * 7000}) as tracker:
        tracker.log_results("run", output, "a table")
    assert warnings(caplog) == []
    ((run_, *_),) = mlflow_runs(output).values()
    assert run_.data.params["terms"] == "x" * 6000


def test_so_is_one_that_fails_at_once_or_at_the_end(tmp_path, monkeypatch, caplog):
    for when in ("__init__", "results", "close"):
        monkeypatch.setattr(services.TensorBoard, when, fail)
        caplog.clear()
        with Tracker(["tensorboard"], tmp_path) as tracker:
            tracker.log_results("run", tmp_path, "a table")
            tracker.log_results("other", tmp_path, "a table")
        assert warnings(caplog) == OVER
        monkeypatch.undo()


def frozen_evaluator():
    evaluator = GLUEvaluator("rte", str(TINY_BERT), None, 0, GLUE)
    evaluator.preprocess_dataset("longest", 64, 8, train_size=36)
    evaluator.training_preparation(1e-3, "adamw", False, verbose=False)
    return evaluator


def test_a_slow_tracker_keeps_nobody_waiting(tmp_path, monkeypatch):
    """It misses looks, but no score."""
    go, told = threading.Event(), []

    class Slow:
        def __init__(self, *given):
            pass

        def log(self, step, values):
            assert go.wait(60)
            told.append((step, values))

        def close(self, failed):
            told.append(failed)

    monkeypatch.setitem(services.KINDS, "slow", Slow)
    evaluator = frozen_evaluator()
    with Tracker(["slow"], tmp_path) as tracker:
        evaluator.train_and_evaluate(3, tmp_path, tracker=tracker)  # would wait for ever
        go.set()
    *told, failed = told
    assert failed  # nobody told it results
    assert sorted({s for s, logged in told if "validation/Accuracy" in logged}) == [5, 10, 15]
    assert len([s for s, logged in told if "train/loss" in logged]) < 3


def test_only_runs_with_a_folder_are_told(tmp_path):
    """So one rank of a group speaks."""
    evaluator = frozen_evaluator()
    with Tracker(["tensorboard"], tmp_path) as tracker:
        evaluator.train_and_evaluate(1, {}, tracker=tracker)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ALL)
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "--report-to", kind)
    assert stop.value.code == 2
    message = f"--report-to {kind} needs a package that is not there: pip install {kind}"
    assert capsys.readouterr().err == f"run_glue.py: error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_library(tmp_path, monkeypatch):
    """W&B leaves a folder of its name, which Python would import."""
    (tmp_path / "somebodys").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("somebodys") and is_installed("wandb")


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [("mlflow", "MLFLOW_TRACKING_URI", "nowhere://x", "unsupported URI 'nowhere://x'"),
     ("wandb", "WANDB_MODE", "online", "No API key configured.")],
)  # fmt: skip
def test_one_that_cannot_be_reached_is_one_line(
    tmp_path, monkeypatch, capsys, kind, name, value, message
):
    monkeypatch.setenv(name, value)
    wandb.teardown()  # it has read the environment
    assert run(tmp_path / "out", "--report-to", kind) == 2
    wandb.teardown()
    error = capsys.readouterr().err
    assert error.startswith(f"run_glue.py: error: --report-to {kind}: ") and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
