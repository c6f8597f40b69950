"""Workers of a study: shards, signals, kills, failures, ranks, and locks that are missing."""

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import paper
import pytest
from conftest import GLUE, ROOT
from toy_study import plan, replace_python, states

from bitfit.study import cell_states, cells, worker
from utils import UserError


def test_run_goes_past_a_failure_and_says_so(quick_python, tmp_path, capsys, monkeypatch):
    data = tmp_path / "glue"
    shutil.copytree(GLUE / "RTE", data / "RTE")
    shutil.copytree(GLUE / "CoLA", data / "CoLA")
    output = tmp_path / "study"
    more = ["--data-dir", str(data), "--tasks", "cola", "rte", "--rows", "bitfit"]
    assert plan(output, *more) == 0
    study = cells.read_study(output)
    hidden = data / "CoLA" / "train.tsv"
    text = hidden.read_bytes()
    hidden.write_bytes(b"not a table\n")
    capsys.readouterr()
    command = ["run", "--output-path", str(output), "--gpus", "cpu"]
    assert paper.main(command) == 1
    assert states(study) == ["failed", "done"]
    printed = capsys.readouterr().out
    assert "1 failed, 1 done" in printed
    assert "tiny_bert/bitfit/cola, status 2: run_glue.py: error:" in printed
    failure = cell_states.read_failure(study, study.cells[0])
    assert failure["status"] == 2
    assert "CoLA" in failure["line"]
    assert "run_glue.py" in cell_states.sibling_file(study, study.cells[0], ".log").read_text()
    hidden.write_bytes(text)
    assert paper.main(command) == 1  # it is not tried again unasked
    assert states(study) == ["failed", "done"]
    begun = time.time()
    assert paper.main([*command, "--retry-failed"]) == 0
    assert states(study) == ["done", "done"]
    done = cell_states.cell_folder(study, study.cells[1]) / "args.json"
    assert done.stat().st_mtime < begun  # what is done is not done again


RUNS = ["--rows", "bitfit", "rand_uniform", "full_ft", "b_q", "b_m2", "frozen"]


def results(study):
    """{file: content} of all that must not depend on who worked, and when."""
    found = {}
    for cell in study.cells:
        folder = cell_states.cell_folder(study, cell)
        for path in sorted(folder.rglob("*")):
            if path.name in ("metrics.csv", "validation_logits.safetensors", "RTE.tsv"):
                found[str(path.relative_to(study.output))] = path.read_bytes()
    return found


@pytest.mark.long
def test_four_workers_killed_at_random_do_each_run_once(
    quick_python, no_dropout, tmp_path, monkeypatch
):
    """Without dropout, because the workers may divide the cells of a pass among themselves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rng, many, one = random.Random(0), tmp_path / "many", tmp_path / "one"
    for output in (many, one):
        assert plan(output, *RUNS, "--models", str(no_dropout)) == 0
    assert paper.main(["run", "--output-path", str(one), "--gpus", "cpu"]) == 0
    command = [sys.executable, "scripts/paper.py", "run", "--output-path", str(many)]

    def begin():
        return subprocess.Popen([*command, "--gpus", "cpu"], cwd=ROOT, stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    study, workers, kills = cells.read_study(many), [begin() for _ in range(4)], 0
    deadline = time.monotonic() + 300
    while states(study) != ["done"] * len(study.cells):
        assert time.monotonic() < deadline
        time.sleep(rng.uniform(0.2, 0.6))
        if kills < 8:
            # SIGKILL leaves the command behind; SIGTERM is passed on to it.
            victim = rng.randrange(4)
            workers[victim].send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            kills += 1
        for i, process in enumerate(workers):
            if process.poll() is not None:
                workers[i] = begin()
    assert kills >= 6
    for process in workers:
        process.wait()
    assert results(study) == results(cells.read_study(one))
    for cell in study.cells:
        log = cell_states.sibling_file(study, cell, ".log").read_text()
        assert "in use" not in log
        assert log.count("nothing to resume") == 0


def test_a_signal_reaches_the_command_and_the_next_worker_goes_on(quick_python, study):
    command = [sys.executable, "scripts/paper.py", "run", "--output-path", str(study.output)]
    worker = subprocess.Popen([*command, "--gpus", "cpu"], cwd=ROOT, stderr=subprocess.PIPE,
                              text=True)  # fmt: skip
    while states(study)[0] in ("missing", "running") and not list(study.output.rglob("args.json")):
        time.sleep(0.05)
    worker.send_signal(signal.SIGINT)
    assert "the same command goes on" in worker.communicate()[1]
    assert worker.returncode == 130
    assert "running" not in states(study)
    assert paper.main(["run", "--output-path", str(study.output), "--gpus", "cpu"]) == 0
    assert states(study) == ["done", "done"]


TORCHRUN = 'echo "  exitcode  : -9 (pid: 7)"; exit 1'  # as torchrun reports a killed rank


@pytest.mark.parametrize("body", ["kill -KILL $$", TORCHRUN])
def test_a_killed_command_has_failed(study, tmp_path, monkeypatch, body):
    """The kernel kills what takes too much memory."""
    replace_python(monkeypatch, tmp_path, body)
    worker.run_cells(study, study.cells[:1], worker.states_to_run(retry_failed=False), "cpu")
    assert states(study) == ["failed", "missing"]
    failure = cell_states.read_failure(study, study.cells[0])
    assert failure["line"].startswith("killed (SIGKILL): memory may have run out")


def test_a_shard_is_one_of_several():
    assert cells.shard("3/8") == (2, 8)
    for word in ("9/8", "0/8", "3", "", "a/b", "1/2/3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not I/N with 1 <= I <= N"):
            cells.shard(word)


def test_shards_are_the_whole(quick_python, study, capsys):
    for part in ("1/2", "2/2"):
        command = ["run", "-o", str(study.output), "--gpus", "cpu", "--shard", part]
        assert paper.main(command) == 0
        assert "1 done" in capsys.readouterr().out
    assert states(study) == ["done", "done"]


def test_a_file_system_without_locks(study, tmp_path, capsys, monkeypatch):
    def fails(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fails)
    replace_python(monkeypatch, tmp_path, "kill -TERM $$")  # the command is stopped at once
    command = ["run", "-o", str(study.output), "--gpus", "cpu"]
    assert paper.main(command) == 2
    assert "divide the cells with --shard I/N" in capsys.readouterr().err
    assert paper.main([*command, "--shard", "1/1"]) == 0


def test_a_worker_for_each_gpu(quick_python, study, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert paper.main(["run", "-o", str(study.output), "--gpus", "cpu", "cpu"]) == 0
    assert states(study) == ["done", "done"]


def test_ranks_for_each_command(quick_python, tmp_path, monkeypatch, capsys):
    output = tmp_path / "study"
    assert plan(output, "--rows", "bitfit") == 0
    command = ["run", "-o", str(output), "--gpus", "cpu"]
    assert paper.main([*command, "--nproc-per-node", "2"]) == 0
    args = output / "tiny_bert/bitfit/rte/args.json"
    metadata = json.loads(args.read_text())
    assert metadata["finished"] and metadata["ranks"] == 2
    args.write_text(json.dumps(metadata | {"finished": False}))
    replace_python(monkeypatch, tmp_path, f'echo "$*" >{tmp_path}/log; kill -TERM $$')
    paper.main(command)
    log = (tmp_path / "log").read_text()
    assert "--nproc-per-node 2 " in log  # a cell begun by two ranks is resumed by two


@pytest.mark.parametrize(
    ("ranks", "gpu", "seen", "refused"),
    [(8, None, 4, True), (4, None, 4, False), (8, None, 0, False), (8, "cpu", 4, False),
     (2, 0, 4, True), (1, 0, 4, False)],
)  # fmt: skip
def test_more_ranks_than_gpus_fail_no_cell(ranks, gpu, seen, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    if not refused:
        return worker.check_gpus_for_ranks(ranks, gpu)
    with pytest.raises(UserError, match="GPUs, but this machine has 4: leave --gpus out"):
        worker.check_gpus_for_ranks(ranks, gpu)


def test_the_line_that_tells_a_failure(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ python a\nrun_glue.py: error: old\n$ python a\nmore\n\n")
    assert worker.failure_reason(log, 1) == "more"
    log.write_text("$ python a\nrun_glue.py: error: bad\nTraceback of torchrun\n===\n")
    assert worker.failure_reason(log, 1) == "run_glue.py: error: bad"


def test_a_gpu_that_is_not_there_fails_no_cell(study, capsys):
    assert paper.main(["run", "-o", str(study.output), "--gpus", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert states(study) == ["missing", "missing"]


def test_workers_that_are_killed_are_no_success(study, tmp_path, monkeypatch):
    replace_python(monkeypatch, tmp_path, f"mkdir {tmp_path}/first && kill -KILL $$")
    assert paper.main(["run", "-o", str(study.output), "--gpus", "cpu", "cpu"]) == 1


def test_workers_of_a_shard_divide_it(study, tmp_path, monkeypatch):
    replace_python(monkeypatch, tmp_path, f'echo "$*" >>{tmp_path}/log')
    words = ["run", "-o", str(study.output), "--shard", "2/3", "--gpus", "cpu", "cpu"]
    assert paper.main(words) == 0
    shards = re.findall(r"--shard (\S+)", (tmp_path / "log").read_text())
    parts_of_cells = [list(range(60))[part::parts] for part, parts in map(cells.shard, shards)]
    assert sorted(parts_of_cells[0] + parts_of_cells[1]) == list(range(60))[1::3]
