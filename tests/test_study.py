"""The study: cells, ledger, cost, workers."""

import errno
import fcntl
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GLUE, ROOT, TINY_BERT

import run_glue
from bitfit import output_paths
from bitfit.study import cell_states, cells, cost, protocol, worker
from utils import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import paper

TOY = [
    "--models", str(TINY_BERT), "--data-dir", str(GLUE), "--tasks", "rte", "--train-size", "24",
    "--epochs", "2", "--learning-rates", "1e-3", "full_ft=1e-4", "--seeds", "0", "1",
]  # fmt: skip


TABLE = ["--tables", "3", "--tasks", "rte", "--data-dir", str(GLUE)]


def plan(output, *more, tables=("--tables", "3")):
    return paper.main(["plan", "--output-path", str(output), *tables, *TOY, *more])


def names(output):
    return [cell.name for cell in cells.read_study(output).cells]


@pytest.fixture
def study(tmp_path, capsys):
    """Two cells, planned."""
    assert plan(tmp_path / "study", "--rows", "bitfit", "rand_row_col") == 0
    capsys.readouterr()
    return cells.read_study(tmp_path / "study")


def states(study):
    return [cell_states.cell_state(study, cell) for cell in study.cells]


def test_tables_and_figures_are_the_papers(tmp_path):
    keys = cells.requested_cells([2, 3], [1, 2], None, None, protocol.ROWS, protocol.SIZES)
    assert len(keys) == len(set(keys)) == 3 * 8 * 2 + 8 * 6 + 6 * 2
    rows = {key[1] for key in cells.requested_cells([3], [], None, None, protocol.ROWS, ())}
    assert rows == set(protocol.ROWS)
    args = paper.parse_args(["plan", "-o", str(tmp_path), "--tables", "2"])
    study = cells.plan_study(tmp_path, args)
    by_name = {cell.name: cell for cell in study.cells}
    assert by_name["bert-base-cased/bitfit/rte"].rates == [1e-4, 4e-4, 7e-4, 1e-3]
    assert by_name["bert-large-cased/full_ft/mnli"].rates == [1e-5, 2e-5, 3e-5, 5e-5]
    assert by_name["roberta-base/bitfit/cola"].rates == [1e-4]  # no search
    assert all(cell.seeds == [0, 1, 2, 3, 4] for cell in study.cells)
    assert all(cell.args["batch_size"] == 16 for cell in study.cells)
    assert {cell.args["epochs"] for cell in study.cells if cell.task == "rte"} == {20}


def test_a_plan_can_be_overridden_by_row_and_task(tmp_path):
    more = ["--tables", "3", "--tasks", "rte", "cola", "--epochs", "3", "rte=7", "--seeds", "4",
            "frozen=1,2", "--learning-rates", "2e-3", "b_q=1e-3,5e-3"]  # fmt: skip
    study = cells.plan_study(tmp_path, paper.parse_args(["plan", "-o", str(tmp_path), *more]))
    by_name = {cell.name.removeprefix("bert-base-cased/"): cell for cell in study.cells}
    assert by_name["b_q/rte"].rates == [1e-3, 5e-3]
    assert by_name["full_ft/rte"].rates == [2e-3]
    assert by_name["frozen/cola"].seeds == [1, 2]
    assert by_name["bitfit/cola"].seeds == [4]
    assert by_name["bitfit/cola"].args["epochs"] == 3
    assert by_name["bitfit/rte"].args["epochs"] == 7


def test_a_study_can_be_run_from_anywhere(tmp_path, monkeypatch, capsys):
    """Folders are kept by their whole path: the cells' names and hashes do not change."""
    monkeypatch.chdir(ROOT)
    relative = ["--models", "examples/tiny_bert", "--data-dir", "examples/glue", "--rows", "bitfit"]
    assert plan(tmp_path / "study", *relative) == 0
    before = cells.read_study(tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    assert cells.read_study("study").cells == before.cells
    assert before.cells[0].args["data_dir"] == str(GLUE)
    assert before.cells[0].name == "tiny_bert/bitfit/rte"


def test_what_a_plan_prints(tmp_path, capsys):
    assert plan(tmp_path / "study", "--calibrate") == 0
    shown = capsys.readouterr().out
    for row in protocol.ROWS:
        assert f"tiny_bert/{row}/rte" in shown
    assert shown.count("missing") == 8
    assert "hours one by one" in shown
    assert "?" not in shown
    assert shown.count("$ python run_glue.py ") == 8


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
    assert costs.seconds(study.cells[0]) == pytest.approx(
        seconds + cost.START_SECONDS + cost.LOAD_SECONDS
    )
    assert costs.seconds(study.cells[1]) is None


def test_more_can_be_planned_but_not_otherwise(study, capsys):
    output = study.output
    assert plan(output, "--rows", "frozen") == 0
    assert [name.split("/")[1] for name in names(output)] == ["bitfit", "rand_row_col", "frozen"]
    capsys.readouterr()
    assert plan(output, "--rows", "bitfit", "--batch-size", "8") == 2
    error = capsys.readouterr().err
    assert "batch size 16, now 8" in error
    assert error.count("\n") == 1
    assert len(names(output)) == 3


def test_the_hash_of_a_command_stays():
    """Studies that were planned before stay readable: a new flag that is left out is no change."""
    words = [
        "--task-name",
        "rte",
        "--model-name",
        "m",
        "--fine-tune-type",
        "bitfit",
        "--seed",
        "0",
        "--epochs",
        "2",
    ]
    assert cells.flags_hash(words) == "54b04273b73fd2f2"


def test_the_hash_is_of_what_results_depend_on(study):
    cell = study.cells[0]
    for harmless in (["--gpu-device", "cpu"], ["--checkpoint-every", "3"], ["--max-tokens", "64"]):
        assert cells.flags_hash([*cell.flags, *harmless]) == cell.hash
    for other in (["--epochs", "3"], ["--seed", "1", "0"], ["--data-dir", "elsewhere"]):
        assert cells.flags_hash([*cell.flags, *other]) != cell.hash


def test_run_goes_past_a_failure_and_says_so(tmp_path, capsys, monkeypatch):
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
    said = capsys.readouterr().out
    assert "1 failed, 1 done" in said
    assert "tiny_bert/bitfit/cola, status 2: run_glue.py: error:" in said
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


def test_done_is_what_finished_under_the_same_settings(study):
    folder = cell_states.cell_folder(study, study.cells[0])
    folder.mkdir(parents=True)
    assert states(study)[0] == "missing"
    facts = study.cells[0].args | {"finished": False, "precision": "fp32"}

    def state(**changes):
        (folder / "args.json").write_text(json.dumps(facts | changes))
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


def test_a_kill_counts_under_its_own_configuration(study):
    cell = study.cells[0]
    cell_states.cell_folder(study, cell).mkdir(parents=True)
    assert not cell_states.record_kill(study, cell._replace(hash="of another epoch"))
    assert not cell_states.record_kill(study, cell)
    assert cell_states.record_kill(study, cell)
    (cell_states.cell_folder(study, cell) / "args.json").write_text('{"finished": true}')
    assert not cell_states.record_kill(study, cell)  # a run is complete
    cell_states.sibling_file(study, cell, ".killed.json").write_text("{")  # damaged
    assert not cell_states.record_kill(study, cell)


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


def test_a_command_begun_by_hand_is_running(study, monkeypatch):
    """It holds the lock in its folder; whoever takes the cell beside it leaves it alone."""
    cell, begun = study.cells[0], []
    monkeypatch.setattr(worker, "run_cell", lambda study, cell, *_, **__: begun.append(cell))
    folder = cell_states.cell_folder(study, cell)
    with output_paths.lock_folder(folder):
        facts = cell.args | {"finished": False, "precision": "fp32"}
        (folder / "args.json").write_text(json.dumps(facts))
        assert states(study) == ["running", "missing"]
        worker.run_cells(study, study.cells, worker.states_to_run(retry_failed=True))
        assert begun == study.cells[1:]
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


RUNS = ["--rows", "bitfit", "rand_uniform", "full_ft", "b_q"]


def results(study):
    """{file: content} of all that must not depend on who worked, and when."""
    found = {}
    for cell in study.cells:
        folder = cell_states.cell_folder(study, cell)
        for path in sorted(folder.rglob("*")):
            if path.name in ("metrics.csv", "validation_logits.safetensors", "RTE.tsv"):
                found[str(path.relative_to(study.output))] = path.read_bytes()
    return found


def test_four_workers_killed_at_random_do_each_run_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rng, many, one = random.Random(0), tmp_path / "many", tmp_path / "one"
    for output in (many, one):
        assert plan(output, *RUNS) == 0
    assert paper.main(["run", "--output-path", str(one), "--gpus", "cpu"]) == 0
    command = [sys.executable, "scripts/paper.py", "run", "--output-path", str(many)]

    def begin():
        return subprocess.Popen([*command, "--gpus", "cpu"], cwd=ROOT, stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    study, workers, kills = cells.read_study(many), [begin() for _ in range(4)], 0
    deadline = time.monotonic() + 300
    while states(study) != ["done"] * len(study.cells):
        assert time.monotonic() < deadline
        time.sleep(rng.uniform(0.5, 1.5))
        if kills < 6:
            # SIGKILL leaves the command behind; SIGTERM is passed on to it.
            victim = rng.randrange(4)
            workers[victim].send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            kills += 1
        for i, process in enumerate(workers):
            if process.poll() is not None:
                workers[i] = begin()
    assert kills >= 4
    for process in workers:
        process.wait()
    assert results(study) == results(cells.read_study(one))
    for cell in study.cells:
        log = cell_states.sibling_file(study, cell, ".log").read_text()
        assert "in use" not in log
        assert log.count("nothing to resume") == 0


def test_a_signal_reaches_the_command_and_the_next_worker_goes_on(study, tmp_path):
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


KILLED = """
import os, pathlib, sys
left = pathlib.Path(os.environ["LEFT"])
steps = left.read_text()
left.write_text(steps[1:])
if not steps:
    os.execv(sys.executable, [sys.executable, PROGRAM, *sys.argv[1:]])
if steps[0] == "e":
    sys.exit("a fault")
if steps[0] == "p":  # progress: one more checkpoint
    folder = pathlib.Path(sys.argv[sys.argv.index("--output-path") + 1]) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(f"{len(steps):06}.json").touch()
if steps[0] == "r":  # as torchrun ends where a rank was killed
    print("  exitcode  : -9 (pid: 7)", flush=True)
    sys.exit(1)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("kills", "ranks", "expected"),
    [
        ("k", 1, ["missing", "done"]),
        ("kk", 1, ["missing", "failed"]),
        ("kpk", 1, ["missing", "missing", "failed"]),
        ("pppp", 1, ["missing"] * 4),
        ("kek", 1, ["missing", "failed", "missing", "done"]),
        ("rr", 2, ["missing", "failed"]),
        ("r", 1, ["failed"]),
    ],
)
def test_a_killed_command_goes_on_until_it_gets_no_further(
    study, tmp_path, monkeypatch, kills, ranks, expected
):
    """The kernel kills what takes too much memory; before args.json a cell counts as missing."""
    program, left = tmp_path / "killed.py", tmp_path / "left"
    program.write_text(KILLED.replace("PROGRAM", repr(str(worker.PROGRAM))))
    left.write_text(kills)
    monkeypatch.setattr(worker, "PROGRAM", program)
    monkeypatch.setattr(worker, "launch_command", lambda ranks: [sys.executable])
    monkeypatch.setenv("LEFT", str(left))
    seen = []
    for _ in expected:
        worker.run_cells(
            study, study.cells[:1], worker.states_to_run(retry_failed=True), "cpu", ranks=ranks
        )
        seen += states(study)[:1]
    assert seen == expected
    failure = cell_states.read_failure(study, study.cells[0])
    assert "without progress" in failure["line"] if kills[-2:] in ("kk", "rr") else True
    assert cell_states.sibling_file(study, study.cells[0], ".killed.json").exists() == (
        kills == "pppp"
    )


@pytest.mark.parametrize(
    ("word", "environment", "part"),
    [
        ("3/8", {}, (2, 8)),
        ("", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4",
              "SLURM_ARRAY_TASK_MIN": "3"}, (2, 4)),
        ("", {"RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),
        ("", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4",
              "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}, (2, 4)),
        ("9/8", {}, None), ("0/8", {}, None), ("3", {}, None), ("", {}, None),
    ],
)  # fmt: skip
def test_shards(word, environment, part):
    if part is None:
        with pytest.raises(UserError, match="--shard I/N"):
            worker.parse_shard(word, environment)
    else:
        assert worker.parse_shard(word, environment) == part


def test_shards_are_the_whole(study, capsys):
    for part in ("1/2", "2/2"):
        command = ["run", "-o", str(study.output), "--gpus", "cpu", "--shard", part]
        assert paper.main(command) == 0
        assert "1 done" in capsys.readouterr().out
    assert states(study) == ["done", "done"]


def test_a_file_system_without_locks(study, capsys, monkeypatch):
    def fails(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fails)
    monkeypatch.setattr(worker, "run_cell", lambda *args, **options: True)
    command = ["run", "-o", str(study.output), "--gpus", "cpu"]
    assert paper.main(command) == 2
    assert "divide the cells with --shard I/N" in capsys.readouterr().err
    assert paper.main([*command, "--shard", "1/1"]) == 0


def test_a_worker_for_each_gpu(study, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert paper.main(["run", "-o", str(study.output), "--gpus", "cpu", "cpu"]) == 0
    assert states(study) == ["done", "done"]


def test_ranks_for_each_command(tmp_path, monkeypatch, capsys):
    output, seen = tmp_path / "study", []
    assert plan(output, "--rows", "bitfit") == 0
    command = ["run", "-o", str(output), "--gpus", "cpu"]
    assert paper.main([*command, "--nproc-per-node", "2"]) == 0
    args = output / "tiny_bert/bitfit/rte/args.json"
    facts = json.loads(args.read_text())
    assert facts["finished"] and facts["ranks"] == 2
    args.write_text(json.dumps(facts | {"finished": False}))
    monkeypatch.setattr(worker, "run_cell", lambda *args, ranks: seen.append(ranks))
    paper.main(command)
    assert seen == [2]  # what was begun by two goes on by two


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
    assert worker.last_message(log) == "more"
    log.write_text("$ python a\nrun_glue.py: error: bad\nTraceback of torchrun\n===\n")
    assert worker.last_message(log) == "run_glue.py: error: bad"


def test_a_gpu_that_is_not_there_fails_no_cell(study, capsys):
    assert paper.main(["run", "-o", str(study.output), "--gpus", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert states(study) == ["missing", "missing"]


def test_workers_that_are_killed_are_no_success(study, monkeypatch, capsys):
    monkeypatch.setattr(worker, "run_workers", lambda commands: [-9, 0])
    assert paper.main(["run", "-o", str(study.output), "--gpus", "cpu", "cpu"]) == 1


def test_workers_of_a_shard_divide_it(study, monkeypatch):
    seen = []
    monkeypatch.setattr(worker, "run_workers", lambda commands: seen.extend(commands) or [0])
    words = ["run", "-o", str(study.output), "--shard", "2/3", "--gpus", "cpu", "cpu"]
    assert paper.main(words) == 0
    shards = [command[command.index("--shard") + 1] for command in seen]
    own = [list(range(60))[part::parts] for part, parts in map(worker.parse_shard, shards)]
    assert sorted(own[0] + own[1]) == list(range(60))[1::3]


def test_data_without_a_test_split(tmp_path, capsys):
    data = tmp_path / "glue"
    shutil.copytree(GLUE / "RTE", data / "RTE")
    (data / "RTE/test.tsv").unlink()
    more = ["--data-dir", str(data), "--rows", "bitfit"]
    assert plan(tmp_path / "study", *more) == 2
    assert "test" in capsys.readouterr().err
    assert plan(tmp_path / "study", *more, "--no-predict-test", "--calibrate") == 0
    assert "?" not in capsys.readouterr().out


def test_a_kill_in_the_first_moments_leaves_nothing_to_resume(study, monkeypatch):
    folder = cell_states.cell_folder(study, study.cells[0])
    folder.mkdir(parents=True)
    (folder / ".args.123.tmp.json").write_text("{")
    (folder / ".lock").touch()
    assert states(study)[0] == "missing"
    assert run_glue.main(study.cells[0].command(study.output)[2:]) == 0
    assert states(study)[0] == "done"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("content", ["{", "[1]", '{"tiny_bert": 1}', '{"tiny_bert": {}}'])
def test_rates_that_cannot_be_read_are_none(study, content, capsys):
    (study.output / cost.RATES).write_text(content)
    assert paper.main(["plan", "-o", str(study.output)]) == 0
    assert "`plan --calibrate` estimates them" in capsys.readouterr().out


def test_an_empty_config_is_one_line(tmp_path, capsys):
    shutil.copytree(TINY_BERT, tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    assert plan(tmp_path / "study", "--models", str(tmp_path / "model")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_study_cannot_be_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert plan(tmp_path / "file") == 2
    assert "give another place" in capsys.readouterr().err


def test_a_budget_takes_the_cheapest(study, capsys):
    assert paper.main(["run", "-o", str(study.output), "--budget-hours", "1"]) == 2
    assert "--calibrate" in capsys.readouterr().err
    assert plan(study.output, "--rows", "bitfit", "--calibrate") == 0
    costs = cost.Costs(study)
    dear, cheap = sorted(study.cells, key=costs.seconds, reverse=True)
    hours = str((costs.seconds(cheap) + costs.seconds(dear)) / 2 / 3600)
    capsys.readouterr()
    command = ["run", "-o", str(study.output), "--gpus", "cpu", "--budget-hours", hours]
    assert paper.main(command) == 0
    assert f"left, beyond --budget-hours: {dear.name}" in capsys.readouterr().out
    assert cell_states.cell_state(study, cheap) == "done"
    assert cell_states.cell_state(study, dear) == "missing"


def test_operations_are_counted_from_the_sizes(study):
    cell = study.cells[0]
    sizes = cost.Sizes(1000, 2000, {"train": 100, "validation": 10, "test": 7},
                       {"train": 5.0, "validation": 4.0, "test": 3.0}, 2)  # fmt: skip
    training = 4 * 2 * 24 * 5  # operations, epochs, rows, tokens
    scoring = 2 * (2 * (24 * 5 + 10 * 4) + 7 * 3)
    assert cost.operations(cell, sizes) == 1000 * 2 * (training + scoring)  # two runs
    assert cost.disk_bytes(cell, sizes) == 2 * (cost.RUN_BYTES + 2 * 10 * 2 * 2 + 10 * 7)
    few = sizes._replace(rows=sizes.rows | {"train": 20})  # fewer than --train-size, 24
    training, scoring = 4 * 2 * 20 * 5, 2 * (2 * (20 * 5 + 10 * 4) + 7 * 3)
    assert cost.operations(cell, few) == 1000 * 2 * (training + scoring)


def cell_of(tmp_path, row, *more, task="rte"):
    """One cell of two runs; "stsb" is the regression."""
    words = ["plan", "-o", str(tmp_path / "one"), "--tables", "3", *TOY, "--tasks", task]
    args = paper.parse_args([*words, "--rows", row, *more])
    return cells.plan_study(tmp_path / "one", args).cells[0]


def test_a_large_training_set_is_scored_in_part(tmp_path):
    cell = cell_of(tmp_path, "bitfit", "--train-size", "70000")
    sizes = cost.Sizes(1, 1, {"train": 80_000, "validation": 0}, {"train": 1.0, "validation": 0}, 2)
    assert cost.operations(cell, sizes) == 2 * (4 * 2 * 70_000 + 2 * 2 * 50_000)


def test_what_a_cell_has_on_disk(tmp_path):
    sizes = cost.Sizes(1000, 2000, {"train": 100, "validation": 10, "test": 7},
                       {"train": 5.0, "validation": 4.0, "test": 3.0}, 1)  # fmt: skip
    regression = cell_of(tmp_path, "frozen", task="stsb")  # float32, and no test predictions
    assert cost.disk_bytes(regression, sizes) == 2 * (cost.RUN_BYTES + 2 * 10 * 4)
    whole = cell_of(tmp_path, "full_ft", task="stsb")  # two checkpoints of values and moments
    own = cost.RUN_BYTES + 2 * 10 * 4 + 10 * 7
    assert cost.disk_bytes(whole, sizes) == 2 * own + 2 * 3 * 4 * 2000


def test_hours_from_rates(study):
    """Done cells of the row count before those of the kind, and all of them before --calibrate."""
    costs, (stacked, single) = cost.Costs(study), study.cells
    sizes = cost.Sizes(1000, 2000, {"train": 100, "validation": 10}, {"train": 5.0,
                       "validation": 4.0}, 2)  # fmt: skip
    costs.cell_sizes = lambda cell: sizes
    rates = {"stacked": 800.0, "single": 100.0, "full": 50.0}
    costs.measured = {"tiny_bert": rates}
    work_of = cost.operations(stacked, sizes)
    assert costs.seconds(stacked) == work_of / 800 + 8 + 1
    assert costs.seconds_one_by_one(stacked) == work_of / 100 + 2 * (8 + 1)
    apart = cost.operations(single, sizes)
    assert costs.seconds(single) == apart / 50 + 8 + 2 * 1  # a model for each run
    assert costs.seconds_one_by_one(single) == apart / 50 + 2 * (8 + 1)
    costs.done = [(stacked, 3000.0, 1.0), (stacked, 1000.0, 3.0)]
    assert costs.rate(stacked) == 1000
    assert costs.rate(stacked._replace(row="frozen")) == 1000  # of its kind
    assert costs.rate(single) == 50
    assert costs.rate(stacked._replace(model="other")) is None
    costs.done += [(stacked._replace(row="frozen"), 10.0, 1.0)]
    assert costs.rate(stacked._replace(row="frozen")) == 10
    assert costs.seconds_one_by_one(stacked) == work_of / (1000 / 8) + 2 * (8 + 1)


def test_the_tokens_of_all_runs_count(monkeypatch):
    clock = [0.0]

    def step(state, alive, rows):
        clock[0] += 2
        return torch.zeros(rows.shape)

    monkeypatch.setattr(cost, "train_step", step)
    tokens = SimpleNamespace(lengths=np.array([5, 7, 9]))
    state = SimpleNamespace(plan=SimpleNamespace(train=SimpleNamespace(tokens=tokens)))
    found = cost.tokens_per_second(state, np.arange(4), np.array([0, 2]), clock=lambda: clock[0])
    assert found == 4 * 14 / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "-o", "x"], "--tables 2 3"),
        (["plan", "-o", "x", "--tables", "4"], "invalid choice: 4"),
        (["plan", "-o", "x", "--tables", "3", "--epochs", "rt=3"], "'rt' is not one of cola"),
        (["plan", "-o", "x", "--tables", "3", "--seeds", "one"], "'one'"),
        (["plan", "-o", "x", "--tables", "3", "--learning-rates", "bitfit=0"], "'0'"),
        (["plan", "-o", "x", "--tables", "3", "--epochs", "2", "rte=3,4"], "--epochs: give one"),
        (["plan", "-o", "x", "--tables", "2", "--rows", "frozen"], "none of these --rows"),
        (
            ["plan", "-o", "x", *TABLE, "--models", "./nomodel"],
            "there is no model folder ./nomodel",
        ),
        (
            [
                "plan",
                "-o",
                "x",
                *TABLE,
                "--models",
                str(TINY_BERT),
                "--calibrate",
                "--gpu-device",
                "9",
            ],
            "there is no GPU 9",
        ),
        (
            [
                "plan",
                "-o",
                "x",
                *TABLE,
                "--models",
                str(TINY_BERT),
                "--figures",
                "2",
                "--sizes",
                "16",
                "100000",
            ],
            "rte has 800 training examples",
        ),
        (["run", "-o", "x"], "x holds no study"),
        (["run", "-o", "x", "--gpus", "zero"], "'zero'"),
        (["run", "-o", "x", "--gpus", "0", "1", "--nproc-per-node", "2"], "goes with one"),
        (["run"], "--output-path"),
        ([], "COMMAND"),
    ],
)
def test_wrong_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = paper.main(words)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_all_that_is_missing_is_named_at_once(tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    data = tmp_path / "glue"
    shutil.copytree(GLUE / "RTE", data / "RTE")
    more = [
        "--models",
        str(bare),
        "nomodel/",
        "--data-dir",
        str(data),
        "--tasks",
        "rte",
        "cola",
        "sst2",
    ]
    assert plan(tmp_path / "study", *more) == 2
    error = capsys.readouterr().err
    for what in ("has no tokenizer", "no model folder nomodel/", "CoLA", "SST-2"):
        assert what in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_an_edited_study_is_refused(study, capsys):
    path = study.output / cells.STUDY
    text = path.read_text()
    for damaged in (text.replace('"16"', '"17"'), text[:-40], "[]", '{"cells": [1]}'):
        assert damaged != text
        path.write_text(damaged)
        assert paper.main(["run", "-o", str(study.output)]) == 2
        error = capsys.readouterr().err
        assert "is not a study" in error
        assert error.count("\n") == 1
