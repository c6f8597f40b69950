"""States and locks of a study's cells."""

import fcntl
import json
import os
import shlex
import subprocess
import threading

import pytest
from conftest import ROOT, TINY_BERT
from toy_study import replace_python, states

import run_glue
from bitfit import output_paths
from bitfit.study import cell_states, cost, worker


def test_a_cell_pasted_from_the_plan_is_done(study, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert states(study) == ["missing", "missing"]
    words = shlex.split(study.cells[0].shell(study.output))
    assert words[:2] == ["python", "run_glue.py"]
    assert words[words.index("--model-name") + 1] == str(TINY_BERT)
    assert run_glue.main(words[2:]) == 0
    assert states(study) == ["done", "missing"]
    # A second plan takes the hours of its kind from what was done.
    costs = cost.Costs(study)
    seconds = cost.training_seconds(study, study.cells[0])
    assert seconds is not None and costs.seconds(study.cells[0]) == pytest.approx(
        seconds + cost.START_SECONDS + cost.LOAD_SECONDS
    )
    assert costs.seconds(study.cells[1]) is None


def test_done_is_what_finished_under_the_same_settings(study):
    folder = cell_states.cell_folder(study, study.cells[0])
    folder.mkdir(parents=True)
    assert states(study)[0] == "missing"
    metadata = study.cells[0].args | {"finished": False, "precision": "fp32"}

    def state(**changes):
        (folder / "args.json").write_text(json.dumps(metadata | changes))
        return states(study)[0]

    assert state() == "interrupted"
    assert state(finished=True) == "done"
    assert state(finished="true") == "interrupted"
    assert state(finished=True, epochs=3) == "foreign"
    for damaged in ("{", "[]", "null"):
        (folder / "args.json").write_text(damaged)
        assert states(study)[0] == "missing"
    for changes, expected in (({"finished": True}, "done"), ({"epochs": 3}, "foreign")):
        with cell_states.lock_cell(study, study.cells[0]):  # such a cell is left at once
            assert state(**changes) == expected


def test_who_looks_whether_a_lock_is_held_holds_nothing(study):
    """Neither for others who look, nor for long against one who takes it."""
    cell = study.cells[0]
    with cell_states.lock_cell(study, cell):
        pass
    looking = os.open(cell_states.sibling_file(study, cell, ".lock"), os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert states(study)[0] == "missing"
    threading.Timer(0.2, os.close, [looking]).start()
    with cell_states.lock_cell(study, cell) as file:
        assert file is not None


def test_a_lock_is_held_as_long_as_anybody_has_it(study):
    cell = study.cells[0]
    with cell_states.lock_cell(study, cell) as file:
        assert states(study) == ["running", "missing"]
        with cell_states.lock_cell(study, cell) as second:
            assert second is None
        child = subprocess.Popen(["sleep", "60"], pass_fds=(file,))
    assert states(study)[0] == "running"  # who began it is gone, the command is not
    child.kill()
    child.wait()
    assert states(study)[0] == "missing"


def test_a_command_begun_by_hand_is_running(study, tmp_path, monkeypatch):
    """It holds the lock in its folder; whoever takes the cell beside it leaves it alone."""
    replace_python(monkeypatch, tmp_path, f'echo "$*" >>{tmp_path}/log; kill -TERM $$')
    first, second = (cell_states.cell_folder(study, cell) for cell in study.cells)
    with output_paths.lock_folder(first):
        metadata = study.cells[0].args | {"finished": False, "precision": "fp32"}
        (first / "args.json").write_text(json.dumps(metadata))
        assert states(study) == ["running", "missing"]
        worker.run_cells(study, study.cells, worker.states_to_run(retry_failed=True))
        (command,) = (tmp_path / "log").read_text().splitlines()
        assert f"--output-path {second}" in command
    assert states(study)[0] == "interrupted"


def test_a_failure_counts_under_its_own_configuration(study):
    cell = study.cells[0]
    cell_states.cell_folder(study, cell).mkdir(parents=True)
    cell_states.write_failure(study, cell._replace(hash="of another epoch"), 1, "a fault")
    assert states(study)[0] == "missing"
    cell_states.write_failure(study, cell, 1, "a fault")
    assert states(study)[0] == "failed"
    assert cell_states.read_failure(study, cell)["line"] == "a fault"
    cell_states.sibling_file(study, cell, ".failed.json").write_text("[]")  # damaged
    assert states(study)[0] == "missing"


def test_a_kill_in_the_first_moments_leaves_nothing_to_resume(study, monkeypatch):
    folder = cell_states.cell_folder(study, study.cells[0])
    folder.mkdir(parents=True)
    (folder / ".args.123.tmp.json").write_text("{")
    (folder / ".lock").touch()
    assert states(study)[0] == "missing"
    assert run_glue.main(study.cells[0].command(study.output)[2:]) == 0
    assert states(study)[0] == "done"
    assert not list(folder.glob(".*"))
