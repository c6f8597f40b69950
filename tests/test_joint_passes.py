"""Joint passes of `paper.py run`: one command trains cells with different parameters."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import paper
import pytest
from conftest import ROOT, TINY_BERT, wait_for
from interruption import differences, output_contents
from toy_study import plan, replace_python, states

import run_glue
from bitfit.study import cell_states, cells

ROWS = ["--rows", "bitfit", "b_q", "frozen", "--no-predict-test", "--start-from", "rte"]


@pytest.fixture(autouse=True)
def one_thread_of_commands(monkeypatch, one_thread):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def planned(output, model, *more):
    assert plan(output, "--models", str(model), *ROWS, *more) == 0
    return cells.read_study(output)


def run(study, *more):
    return paper.main(["run", "-o", str(study.output), "--gpus", "cpu", *more])


def contents(study, cell):
    """Return the contents of a cell's files, without the number of runs in the pass."""
    content = output_contents(cell_states.cell_folder(study, cell))
    for name in content:
        if name.endswith("metrics.json"):
            content[name].pop("runs_in_one_pass")
    return content


def check_equal(study, alone, capsys):
    """Check that all cells are done, and have the files of their commands."""
    assert states(study) == ["done"] * 3
    for cell in study.cells:
        expected, found = contents(alone, cell), contents(study, cell)
        assert "lr0.001_seed1/evaluator/delta.safetensors" in expected
        assert differences(expected, found) == []
        folder = cell_states.cell_folder(study, cell)
        args = [json.loads(path.read_text()) for path in folder.rglob("args.json")]
        assert [values["output_path"] for values in args] == [str(folder)] * 3
        capsys.readouterr()
        assert run_glue.main(cell.command(study.output)[2:]) == 0
        assert "is finished: there is nothing to resume" in capsys.readouterr().out


def test_cells_of_a_stopped_and_killed_pass_equal_their_own_commands(
    quick_python, no_dropout, tmp_path, capsys, monkeypatch
):
    """Bit by bit: evaluators, logits, scores, figures, reports and args.json.

    The command gets a signal and is resumed. Then its worker is stopped before every third folder
    that it moves.
    """
    study, rename, count = planned(tmp_path / "study", no_dropout), Path.rename, 0
    command = [sys.executable, "scripts/paper.py", "run", "--output-path", str(study.output)]
    worker = subprocess.Popen([*command, "--gpus", "cpu"], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: list(study.output.glob("*/.together-*/rte/args.json")))
    assert states(study) == ["running"] * 3  # for other workers
    worker.send_signal(signal.SIGTERM)
    assert b"the same command goes on" in worker.communicate()[1]
    assert worker.returncode == 128 + signal.SIGTERM

    def stop_at_times(path, target):
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop_at_times)
    statuses = [run(study)]
    while statuses[-1] and len(statuses) < 10:
        assert set(states(study)) <= {"missing", "done"}
        statuses.append(run(study))
    assert statuses == [128 + signal.SIGINT] * 4 + [0]  # nine folders, two at a time
    alone = planned(tmp_path / "alone", no_dropout)
    for cell in alone.cells:
        assert run_glue.main(cell.command(alone.output, "-d", "cpu")[2:]) == 0
    check_equal(study, alone, capsys)
    (log,) = study.output.glob("*/.together-*/*")
    assert log.read_text().count("$ python run_glue.py") == 2  # one was stopped
    for cell in study.cells:
        text = cell_states.sibling_file(study, cell, ".log").read_text()
        assert text == f"trained with bitfit, b_q, frozen: the log is {log}\n" * 2


def commands(study, tmp_path, monkeypatch, *more):
    """Return the folders of the commands that a worker starts; each is stopped at once."""
    replace_python(monkeypatch, tmp_path, f'echo "$*" >>{tmp_path}/commands; kill -TERM $$')
    run(study, *more)
    text = (tmp_path / "commands").read_text()
    (tmp_path / "commands").unlink()
    return re.findall(rf"--output-path {study.output}/tiny_bert/(\S+)", text)


def test_a_pass_that_fails_before_the_training(tmp_path, capsys, monkeypatch):
    """All its cells get the reason. They are tried again one by one."""
    study = planned(tmp_path / "study", TINY_BERT)
    capsys.readouterr()
    replace_python(monkeypatch, tmp_path, "echo run_glue.py: error: no such term; exit 2")
    assert run(study) == 1
    total, *lines = capsys.readouterr().out.splitlines()
    assert total == "3 failed"
    assert all("rte, status 2: run_glue.py: error: no such term (" in line for line in lines)
    assert len(lines) == 3
    more = ["--retry-failed"]
    assert commands(study, tmp_path, monkeypatch, *more) == ["bitfit/rte", "b_q/rte", "frozen/rte"]


def test_a_pass_that_is_killed_after_its_beginning(tmp_path, monkeypatch):
    """It goes on with all its cells, but not while one of them is not for this worker."""
    study = planned(tmp_path / "study", TINY_BERT)
    body = """for word; do [ "$before" = --output-path ] && folder=$word; before=$word; done
mkdir -p "$folder"; echo '{"bias_terms": [["all"], ["query"], ["none"]]}' >"$folder/args.json"
kill -KILL $$"""
    replace_python(monkeypatch, tmp_path, body)
    assert run(study) == 1
    assert states(study) == ["failed"] * 3
    more = ["--retry-failed", "--shard", "1/2"]
    assert commands(study, tmp_path, monkeypatch, *more) == ["bitfit/rte", "frozen/rte"]
    (found,) = commands(study, tmp_path, monkeypatch, "--retry-failed")
    assert found.startswith(".together-")


@pytest.mark.parametrize(
    ("planning", "running", "expected"),
    [
        (["--seeds", "0"], [], ["bitfit", "b_q", "frozen"]),
        (["--learning-rates", "1e-3", "frozen=1e-2"], [], [".together-", "frozen"]),
        ([], ["--nproc-per-node", "2"], ["bitfit", "b_q", "frozen"]),
        (["--rows", "full_ft", "rand_uniform"], [], ["full_ft", "rand_uniform"]),
    ],
)
def test_cells_that_run_alone(tmp_path, monkeypatch, planning, running, expected):
    """A single run, other rates, several ranks, and methods that change matrices."""
    study = planned(tmp_path / "study", TINY_BERT, *planning)
    found = commands(study, tmp_path, monkeypatch, *running)
    assert [re.sub(r"(?<=-)\w{16}$", "", path.split("/")[0]) for path in found] == expected
