"""Sweeps of run_glue.py: their runs equal single runs, and diverged runs are left out."""

import errno
import io
import json
import os
import sys

import pandas as pd
import pytest
from small_command import flags

import run_glue
from glue_evaluator import GLUEvaluator

GRID = ["-l", "1e-3", "3e-3", "-s", "0", "4"]

NAMES = ["lr0.001_seed0", "lr0.001_seed4", "lr0.003_seed0", "lr0.003_seed4"]

WHAT_A_RUN_LEAVES = {
    "args.json", "metrics.json", "metrics.csv", "learning_curves_f1.png",
    "learning_curves_accuracy.png", "validation_logits.safetensors", "evaluator", "MRPC.tsv",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bitfit", "frozen", "full_ft", "rand_uniform", "rand_row_col"])
def test_a_sweep_leaves_what_its_single_runs_leave(tmp_path, kind, capsys, caplog):
    """In one pass or one after the other: the same files, and runs that differ."""
    more = ["--save-evaluator", "--predict-test", "--train-size", "20"]
    with caplog.at_level("INFO", "bitfit"):
        argv = flags(tmp_path / "out", *more, *GRID, task="mrpc", kind=kind)
        assert run_glue.main(argv) == 0
    in_one_pass = kind in ("bitfit", "frozen")
    assert ("4 runs in one pass" in caplog.text) == in_one_pass
    assert ("4 runs one after the other: " in caplog.text) == (not in_one_pass)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *NAMES, "args.json", "results.csv", "results.json", "learning_curves_f1.png",
        "learning_curves_accuracy.png",
    }  # fmt: skip
    changes = {"bias_term_changes.png", "bias_term_changes.csv"} if kind == "bitfit" else set()
    scores = []
    for name in NAMES:
        folder = tmp_path / "out" / name
        assert {path.name for path in folder.iterdir()} == WHAT_A_RUN_LEAVES | changes
        args = json.loads((folder / "args.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
        assert f"lr{args['learning_rate']}_seed{args['seed']}" == name
        assert (metrics["learning_rate"], metrics["seed"]) == (args["learning_rate"], args["seed"])
        scores.append(metrics["train_loss"][0])
        loaded = GLUEvaluator.load(folder / "evaluator", None)
        assert loaded.evaluations == metrics["evaluations"]
        found = loaded.evaluate("validation")
        assert found == pytest.approx(metrics["last"]["validation"])
    assert len(set(scores)) == 4
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert list(table["run"]) == NAMES
    printed = capsys.readouterr().out
    assert "best of 4 trials: " in printed
    assert "best epoch of each" in printed


def test_a_run_one_by_one_is_the_run_alone(tmp_path):
    """Exactly: the runs that cannot share a pass do not meet at all."""
    assert run_glue.main(flags(tmp_path / "all", *GRID, kind="rand_row_col")) == 0
    single = ["-l", "3e-3", "-s", "4"]
    assert run_glue.main(flags(tmp_path / "one", *single, kind="rand_row_col")) == 0
    here, there = tmp_path / "all" / NAMES[3] / "metrics.csv", tmp_path / "one" / "metrics.csv"
    assert here.read_text() == there.read_text()


@pytest.mark.parametrize("kind", ["bitfit", "full_ft"])
def test_keep_best_of_many_saves_the_best_run_alone(tmp_path, kind, capsys):
    more = ["--save-evaluator", "--predict-test", "--export-model", "--keep", "best"]
    assert run_glue.main(flags(tmp_path / "out", *more, *GRID, kind=kind)) == 0
    best = json.loads((tmp_path / "out/results.json").read_text())
    assert best["trials"] == 4
    table = pd.read_csv(tmp_path / "out/results.csv").set_index("run")["best"]
    assert table[best["best"]["run"]] == table.max()
    for name in ("evaluator", "RTE.tsv", "model"):
        found = [path.parent.name for path in (tmp_path / "out").glob(f"*/{name}")]
        assert found == [best["best"]["run"]]
    assert f"best of 4 trials: {table.max():.1f} ({best['best']['run']}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bitfit", "full_ft"])
def test_a_run_of_many_that_diverges_is_reported_and_left_out(tmp_path, monkeypatch, kind, caplog):
    """A learning rate so high that the numbers overflow; the sensible one is not touched."""
    grid = ["-l", "1e-3", "1e38", "--epochs", "3"]
    assert run_glue.main([*flags(tmp_path / "out", kind=kind), *grid]) == 0
    table = pd.read_csv(tmp_path / "out/results.csv").set_index("run")
    assert table["diverged"].notna().tolist() == [False, True]
    message = "the loss or its gradient was not finite at epoch"
    assert table.loc["lr1e+38_seed0", "diverged"].startswith(message)
    assert message in caplog.text
    assert table.loc["lr0.001_seed0", "last_epoch"] == 3


def test_when_all_runs_diverge_the_status_is_1(tmp_path, capsys):
    grid = ["-l", "1e37", "1e38", "--epochs", "3"]
    assert run_glue.main([*flags(tmp_path / "out"), *grid]) == 1
    assert "stopped: all 2 runs diverged" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out/results.csv").exists()


class Output(io.RawIOBase):
    """A standard output whose writes end with an error number, or are kept."""

    def __init__(self, number=None):
        self.number, self.kept = number, b""

    def writable(self):
        return True

    def write(self, data):
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        self.kept += bytes(data)
        return len(data)


@pytest.mark.parametrize(
    ("number", "status"), [(None, 0), (errno.EPIPE, 0), (errno.ENOSPC, 1)],
    ids=["ascii", "closed pipe", "full disk"],
)  # fmt: skip
def test_a_finished_sweep_is_finished_whatever_takes_its_table(
    tmp_path, monkeypatch, capsys, number, status
):
    output = Output(number)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(output), "ascii"))
    assert run_glue.main(flags(tmp_path / "out", "-s", "0", "1")) == status
    assert (rb" \xb1 " in output.kept) == (number is None)
    assert json.loads((tmp_path / "out/args.json").read_text())["finished"]
    last = (capsys.readouterr().err.splitlines() or [""])[-1]
    full = "run_glue.py: stopped: No space left on device: 'standard output'; "
    assert last.startswith(full) == (status == 1)
