"""Successive halving: worse settings stop, all others are as if they were alone in the grid."""

import json
import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import GLUE, TINY_BERT
from interruption import differences, output_contents
from moments import at_evaluation, at_file, at_step, raises, send
from small_training import COLA
from test_sweeps import RTE, result, write

import run_glue
from bitfit.artifacts.run_folder import find_evaluator, run_folders
from bitfit.cli import experiment
from bitfit.model.run import Run
from bitfit.options import parse_args
from bitfit.results import sweeps
from bitfit.signals import StopSignals
from bitfit.training.halving import rank_candidates
from glue_evaluator import GLUEvaluator
from utils import UserError

WORST = float("-inf")
pytestmark = pytest.mark.usefixtures("one_thread")
HALVING = ["--halving", "1", "2"]
GRID = ["-l", "3e-4", "3e-3", "-s", "0", "1", "--bias-terms", "all", "--bias-terms", "none"]


def flags(output, model=TINY_BERT, more=(*GRID, *HALVING), data=GLUE):
    """The words of a command whose micro-batches end within the examples of a run."""
    return ["-o", str(output), "-t", "cola", "-m", str(model), "--data-dir", str(data), "-e", "3",
            "--train-size", "20", "-b", "8", "--max-tokens", "200", "-d", "cpu", "-f", "bitfit",
            "--train-score-rows", "0", "--save-evaluator", *more]  # fmt: skip


@pytest.fixture(scope="module")
def command(no_dropout, few_glue):
    """Return a function from a folder to the words of a command without dropout."""
    return partial(flags, model=no_dropout, data=few_glue)


@pytest.fixture(scope="module")
def halved(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("halved") / "out"
    assert run_glue.main(command(folder)) == 0
    return folder


def stopped_runs(folder):
    """Return {folder of a run: why it was stopped, or None}."""
    paths = sorted(folder.glob("lr*/metrics.json"))
    return {path.parent: json.loads(path.read_text())["stopped"] for path in paths}


def test_runs_that_go_on_equal_those_of_the_full_grid(halved, command, tmp_path):
    """Bit by bit, as stopped runs do until then."""
    assert run_glue.main(command(tmp_path / "out", more=GRID)) == 0
    last_epochs = []
    for folder, stopped in stopped_runs(halved).items():
        alone, found = output_contents(tmp_path / "out" / folder.name), output_contents(folder)
        table = pd.read_csv(folder / "metrics.csv")
        last_epochs.append(table["epoch"].max())
        if stopped is None:
            assert differences(alone, found) == ["args.json"]
            assert "evaluator/delta.safetensors" in found
        else:
            assert stopped.startswith(f"after epoch {last_epochs[-1]}: place ")
            assert not any(name.startswith("evaluator") for name in found)
            with pytest.raises(UserError, match=r"--save-evaluator \(a stopped run"):
                find_evaluator(folder)
            whole = pd.read_csv(tmp_path / "out" / folder.name / "metrics.csv")
            assert table.equals(whole[whole["epoch"] <= last_epochs[-1]].reset_index(drop=True))
    assert sorted(last_epochs) == [1, 1, 1, 1, 2, 2, 3, 3]


def shown_table(folder, output):
    """The table of a sweep's folder, written to another one."""
    table = pd.read_csv(folder / "results.csv")
    runs = [Run(*row) for row in table[["learning_rate", "seed"]].assign(
        data_seed=None, bias_terms=table["bias_terms"]).itertuples(index=False)]  # fmt: skip
    return sweeps.write_report(output, COLA, run_folders(folder, runs), "a caption")


def test_the_report_lists_stopped_settings(halved, tmp_path):
    """With the mean scores, which are those of results.csv."""
    table = pd.read_csv(halved / "results.csv")
    shown = shown_table(halved, tmp_path)
    for (terms, rate), of_setting in table.groupby(["bias_terms", "learning_rate"]):
        (reason,) = of_setting["stopped"].fillna("").unique()
        line = f"stopped: bias terms {terms}, learning rate {rate:g} {reason}"
        assert (line in shown) == bool(reason)
        if reason:
            mean = float(re.search(r"\((.+), n = 2; the last kept has ", reason)[1])
            assert mean == pytest.approx(of_setting["last"].mean(), abs=0.06)
    assert shown.count("0 (2 stopped)") == shown.count("stopped: ") == 3
    assert "--halving chose among the settings by validation scores" in shown


def test_the_table_counts_diverged_runs_apart_from_stopped_ones(halved, tmp_path):
    shutil.copytree(halved, tmp_path / "out")
    table = pd.read_csv(halved / "results.csv")
    stopped = table[table["stopped"].notna()]
    of_setting = stopped[stopped["learning_rate"] == stopped["learning_rate"].iloc[0]]
    path = tmp_path / "out" / of_setting["run"].iloc[0] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"diverged": "in epoch 1"}))
    shown = shown_table(tmp_path / "out", tmp_path)
    assert shown.count("0 (1 diverged, 1 stopped)") == 1
    assert shown.count("0 (2 stopped)") == 2


@pytest.mark.parametrize(
    "moment",
    [
        at_step(5, send(signal.SIGTERM)),
        at_evaluation(1, send(signal.SIGTERM)),
        at_file("checkpoints/*.json", 1, raises(OSError("full"))),
    ],
    ids=["after a halving", "before it", "before its checkpoint"],
)
def test_resuming_repeats_no_decision_and_loses_none(halved, command, tmp_path, caplog, moment):
    folder = tmp_path / "out"
    with moment:
        assert run_glue.main(command(folder)) != 0
    with caplog.at_level("INFO", "bitfit"):
        assert run_glue.main([*command(folder), "--resume"]) == 0
    assert caplog.text.count("halving: 1 of 2 candidates go on; stopped: bias terms ") == 1
    assert differences(output_contents(halved), output_contents(folder)) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-l", "1e-3", "-s", "0", "1", "--halving", "1"], "compares learning rates or sets of"),
        ([*GRID, "--halving", "2", "1"], "takes epochs in ascending order, all before the last, 3"),
        ([*GRID, "--halving", "1", "1"], "takes epochs in ascending order"),
        ([*GRID, "--halving", "3"], "takes epochs in ascending order, all before the last, 3"),
        (["-l", "1e-3", "2e-3", *HALVING], "takes at most 1 epochs for 2 candidates"),
        (
            [*GRID, "--halving", "1", "--evaluation-frequency", "2"],
            "1: scores exist every 2 epochs",
        ),
        (["-l", "1e-4", "2e-4", "-f", "full_ft", "--halving", "1"], "those of full_ft do not"),
    ],
)
def test_halvings_that_cannot_be_are_refused(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        run_glue.main(flags(tmp_path / "out", more=more))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--halving {message}" in line or message in line
    assert not (tmp_path / "out").exists()


def test_runs_that_share_no_pass_are_refused(tmp_path, monkeypatch, capsys):
    """Before the folder exists; ranks of torchrun before they meet."""
    monkeypatch.setattr("bitfit.model.forward_trials.reason_not_stackable", lambda *_: "a reason")
    assert run_glue.main(flags(tmp_path / "out")) == 2
    assert "share a pass, but a reason: leave it out" in capsys.readouterr().err
    options = parse_args("", flags(tmp_path / "out"))
    with pytest.raises(UserError, match="start it without torchrun"):
        experiment.run(options, StopSignals(), SimpleNamespace(size=2))
    assert not (tmp_path / "out").exists()


def test_halving_from_python_is_checked(tiny_bert):
    evaluator = GLUEvaluator("cola", tiny_bert, None, data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 32, 16, train_size=16)
    evaluator.prepare("bitfit", [1e-3, 2e-3], components=["bias"], verbose=False)
    with pytest.raises(UserError, match="halving takes epochs in ascending order, all before"):
        evaluator.train_and_evaluate(2, halving=[2])
    with pytest.raises(UserError, match="halving takes epochs in ascending order, all before"):
        evaluator.train_and_evaluate(4, halving=[2, 1])


@pytest.mark.parametrize(
    ("values", "stopped"),
    [
        ({"a": [0.1, 0.3], "b": [0.4, 0.4], "c": [0.2, 0.1], "d": [0.9, 0.8]}, ["a", "c"]),
        ({"a": [0.1], "b": [0.4], "c": [0.2]}, ["a"]),
        ({"a": [0.5], "b": [0.5], "c": [0.5], "d": [0.5]}, ["c", "d"]),
        ({"a": [0.9, WORST], "b": [0.1, 0.1]}, ["a"]),
        ({"a": [WORST, WORST], "b": [WORST, 0.1]}, ["a"]),
    ],
    ids=["means", "odd", "equal", "diverged", "more diverged"],
)
def test_the_worse_half_stops(values, stopped):
    reasons = rank_candidates(values, "after epoch 1", "MCC")
    assert list(reasons) == stopped
    for place, reason in enumerate(reasons.values(), len(values) - len(stopped) + 1):
        assert reason.startswith(f"after epoch 1: place {place} of {len(values)} by mean MCC × 100")
        assert "inf" not in reason


def test_a_stopped_run_is_never_the_best(tmp_path):
    """Even with the highest score; the grid was too narrow although one rate is left."""
    reason = "after epoch 2: place 2 of 2 by mean Accuracy × 100 (90.0, n = 1; the last kept ...)"
    results = [result(1e-3, 0, [0.9]), result(1e-2, 0, [0.5, 0.6])]
    results[0][1]["stopped"] = reason
    text = sweeps.write_report(tmp_path, RTE, write(tmp_path, results), "a caption")
    assert "best of 2 trials: 60.0 (lr0.01_seed0, epoch 4)" in text
    assert f"stopped: learning rate 0.001 {reason}" in text
    assert "0.01, is the highest of the grid: try higher ones too" in text
    metadata, scores = sweeps.read_sweep({run: tmp_path / run.name for run, *_ in results})
    axes = sweeps.sweep_curves(metadata, scores, RTE, "a caption")["Accuracy"].axes[0]
    labels = [line.get_label() for line in axes.get_lines()]
    assert "learning rate 0.001 (1 seed, stopped after epoch 2, last 90.0)" in labels
    assert Run(1e-3, 0).candidate == "learning rate 0.001"
