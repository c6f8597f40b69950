"""Joint passes of `paper.py run`: cells that differ in what trains are trained by one command."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import paper
import pytest
import torch
from conftest import GLUE, ROOT, wait_for
from interruption import differences, output_contents
from toy_study import plan, states

import run_glue
from bitfit.study import cell_states, cells

ROWS = ["--rows", "bitfit", "b_q", "frozen", "--no-predict-test", "--start-from", "rte"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def logs(study):
    return [cell_states.sibling_file(study, cell, ".log").read_text() for cell in study.cells]


def passes(study):
    """Return the files and folders of joint passes, without the rows' name."""
    return [path.name for path in sorted(study.output.glob("*/.together-*/*"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, no_dropout):
    """A study whose cells were trained by their own commands."""
    study = planned(tmp_path_factory.mktemp("alone") / "study", no_dropout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for cell in study.cells:
        assert run_glue.main(cell.command(study.output, "-d", "cpu")[2:]) == 0
    torch.set_num_threads(threads)
    return study


def check_equal(study, alone, capsys):
    """Check that all cells are done, and have the files of their own commands."""
    assert states(study) == ["done"] * 3
    for cell, other in zip(study.cells, alone.cells, strict=True):
        expected, found = contents(alone, other), contents(study, cell)
        assert "lr0.001_seed1/evaluator/delta.safetensors" in expected
        assert differences(expected, found) == []
        capsys.readouterr()
        assert run_glue.main(cell.command(study.output)[2:]) == 0
        assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert passes(study) == ["rte.log"]


def test_cells_equal_their_own_commands(quick_python, alone, no_dropout, tmp_path, capsys):
    """Bit by bit: evaluators, logits, scores, figures, reports and args.json."""
    study = planned(tmp_path / "study", no_dropout)
    assert run(study) == 0
    check_equal(study, alone, capsys)
    (log,) = study.output.glob("*/.together-*/rte.log")
    assert log.read_text().count("$ python run_glue.py") == 1
    assert logs(study) == [f"trained with bitfit, b_q, frozen: the log is {log}\n"] * 3


def test_a_worker_killed_between_any_two_files_loses_nothing(
    quick_python, alone, no_dropout, tmp_path, capsys, monkeypatch
):
    """The worker that divides the folder is stopped after every second renaming of a folder."""
    study, rename, count = planned(tmp_path / "study", no_dropout), Path.rename, 0

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
    assert statuses == [128 + signal.SIGINT] * 4 + [0]
    check_equal(study, alone, capsys)
    (log,) = study.output.glob("*/.together-*/rte.log")
    assert log.read_text().count("$ python run_glue.py") == 1


def test_a_pass_stopped_by_a_signal_is_resumed(quick_python, alone, no_dropout, tmp_path, capsys):
    study = planned(tmp_path / "study", no_dropout)
    command = [sys.executable, "scripts/paper.py", "run", "--output-path", str(study.output)]
    worker = subprocess.Popen([*command, "--gpus", "cpu"], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: list(study.output.glob("*/.together-*/rte/args.json")))
    assert states(study) == ["running"] * 3  # for other workers
    worker.send_signal(signal.SIGTERM)
    assert b"the same command goes on" in worker.communicate()[1]
    assert worker.returncode == 128 + signal.SIGTERM
    assert states(study) == ["missing"] * 3
    assert run(study) == 0
    check_equal(study, alone, capsys)


def test_a_pass_that_fails(quick_python, alone, no_dropout, tmp_path, capsys, monkeypatch):
    """All cells get its reason; after a failure before the training, each is tried on its own."""
    data = tmp_path / "glue"
    shutil.copytree(GLUE / "RTE", data / "RTE")
    study = planned(tmp_path / "study", no_dropout, "--data-dir", str(data))
    text = (data / "RTE/train.tsv").read_bytes()
    (data / "RTE/train.tsv").write_bytes(b"not a table\n")
    capsys.readouterr()
    assert run(study) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "3 failed"
    assert (
        len({line.partition(", status 2: run_glue.py: error: ")[2][:60] for line in printed}) == 2
    )
    (data / "RTE/train.tsv").write_bytes(text)
    assert run(study) == 1
    assert run(study, "--retry-failed") == 0
    assert states(study) == ["done"] * 3
    assert [text.count("$ python run_glue.py") for text in logs(study)] == [1] * 3
