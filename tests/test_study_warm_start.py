"""Cells that start from the cell of another task: plan, states, workers and report."""

import json
import threading
import time

import pandas as pd
import paper
import pytest
from conftest import ROOT, TINY_BERT
from toy_study import plan, states

from bitfit.study import cell_states, cells, worker

WARM = ["--start-from", "wnli", "--rows", "bitfit", "full_ft", "--learning-rates", "1e-3", "5e-3",
        "full_ft=1e-4", "--no-predict-test", "--epochs", "1"]  # fmt: skip


@pytest.fixture
def warm(tmp_path, capsys):
    """Cells of wnli and of rte from wnli, in two rows."""
    assert plan(tmp_path / "study", *WARM) == 0
    assert capsys.readouterr().out.count("waiting") == 2
    return cells.read_study(tmp_path / "study")


def run(study, *more):
    return paper.main(["run", "-o", str(study.output), "--gpus", "cpu", *more])


def test_sources_are_planned_first_and_save_evaluators(warm):
    names = [cell.name.removeprefix("tiny_bert/") for cell in warm.cells]
    assert names == ["bitfit/wnli", "full_ft/wnli", "bitfit/rte-from-wnli", "full_ft/rte-from-wnli"]
    assert [cell.args["save_evaluator"] for cell in warm.cells] == [True, True, False, False]
    assert states(warm) == ["missing", "missing", "waiting", "waiting"]
    # Its command starts from the folder of wnli's cell.
    words = warm.cells[2].command(warm.output)
    assert words.count("--start-from") == 1
    start = words[words.index("--start-from") + 1]
    assert start == str(warm.output / "tiny_bert/bitfit/wnli")
    # The same tasks from the base model are other cells of the study.
    cold = ["--rows", "bitfit", "--no-predict-test", "--epochs", "1"]
    assert plan(warm.output, *cold) == 0
    assert cells.read_study(warm.output).cells[-1].name == "tiny_bert/bitfit/rte"


def test_taggers_cannot_start_from_a_task_of_sentences(tmp_path, capsys):
    task = str(ROOT / "examples/tagging/toy-pos.json")
    command = ["plan", "-o", str(tmp_path / "study"), "--tables", "3", "--tasks", task]
    assert paper.main([*command, "--models", str(TINY_BERT), "--start-from", "mnli"]) == 2
    assert "toy-pos tags words, which mnli does not: plan it without" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_cells_start_from_the_best_run_of_the_source(warm, capsys):
    """The best mean over seeds of wnli chooses the learning rate, and then the seed."""
    assert run(warm) == 0
    assert states(warm) == ["done"] * 4
    for row in ("bitfit", "full_ft"):
        table = pd.read_csv(warm.output / f"tiny_bert/{row}/wnli/results.csv")
        means = table.groupby("learning_rate")["last"].mean()
        of_rate = table[table["learning_rate"] == means.idxmax()]
        best = of_rate.loc[of_rate["last"].idxmax(), "run"]
        folder = warm.output / f"tiny_bert/{row}"
        args = json.loads((folder / "rte-from-wnli/args.json").read_text())
        start = str(folder / "wnli" / best / "evaluator")
        assert args["start_from"] == start
        command = (folder / "rte-from-wnli.log").read_text().splitlines()[0].split()
        assert command[command.index("--start-from") + 1] == start
    assert paper.main(["report", "-o", str(warm.output), "--resamples", "10"]) == 0
    assert "RTE-from-wnli (Accuracy)" in capsys.readouterr().out
    assert "rte starts from wnli" in (warm.output / "report.html").read_text()
    # A folder of a training from the base model is not the cell's.
    path = warm.output / "tiny_bert/bitfit/rte-from-wnli/args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start_from": None}))
    assert states(warm)[2] == "foreign"


def test_a_cell_whose_source_failed_waits_and_is_named(warm, capsys):
    """It is run as soon as the source is done."""
    cell_states.sibling_file(warm, warm.cells[0], ".log").parent.mkdir(parents=True)
    cell_states.write_failure(warm, warm.cells[0], 1, "broken")
    chosen = warm.cells[::2]
    worker.run_cells(warm, chosen, worker.states_to_run(retry_failed=False), "cpu")
    assert states(warm)[::2] == ["failed", "waiting"]
    assert run(warm, "--shard", "1/2") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "waiting: tiny_bert/bitfit/rte-from-wnli, until the cell of wnli is done" in lines
    assert run(warm, "--shard", "1/2", "--retry-failed") == 0
    assert states(warm)[::2] == ["done", "done"]


def test_a_worker_waits_while_another_runs_the_source(warm, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    ran = []
    monkeypatch.setattr(worker, "run_cell", lambda study, cell, *_, **__: ran.append(cell.name))
    chosen, wanted = warm.cells[2:3], worker.states_to_run(retry_failed=False)
    with cell_states.lock_cell(warm, warm.cells[0]):
        thread = threading.Thread(target=worker.run_cells, args=(warm, chosen, wanted, "cpu"))
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    assert ran == []
