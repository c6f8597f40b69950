"""Several processes: who trains what, and the results, faults and words of one."""

import json
import os
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GLUE, ROOT, TINY_BERT, wait_for
from documentation import active_environment
from moments import limited_memory
from processes import in_ranks, run_program, start_ranks
from safetensors.torch import load_file, save_file

import run_glue
from bitfit.distributed import Ranks, assign_runs
from bitfit.model.run import Run
from glue_evaluator import GLUEvaluator
from utils import UserError

TYPES = ("full_ft", "bitfit", "frozen", "rand_uniform", "rand_row_col")
RATES = {"full_ft": 1e-4, "rand_row_col": 1e-4}


def train_all_types(folder, model, memory=None):
    """One run of each type, of 17 rows: the last batch of eight has one, some ranks none.

    Args:
        memory: tokens that the last of several ranks has room for in one pass; it has to halve.
    """
    ranks, runs = Ranks(), [Run(1e-3, 0)]
    ranks.all_gather_object("here")
    share, group = ranks.make_group(runs, on_own_gpus=False)
    assert share == runs and group.size == ranks.size
    if group.rank == 0:
        time.sleep(0.2)
        (folder / "first").touch()
    group.barrier()
    assert (folder / "first").exists()
    is_last = group.rank and group.rank == group.size - 1
    with limited_memory(memory) if is_last else nullcontext():
        train_types(folder, model, group)
    ranks.shutdown()


def train_types(folder, model, group):
    for kind in TYPES:
        evaluator = GLUEvaluator("rte", str(model), None, 0, GLUE)
        evaluator.preprocess_dataset("longest", 64, 8, train_size=17)
        terms = evaluator.convert_to_actual_components(["all"] if kind == "bitfit" else [])
        evaluator.prepare(kind, RATES.get(kind, 1e-3), "adamw", terms, 50, verbose=False)
        evaluator.join_group(group)
        evaluator.train_and_evaluate(3, folder / kind if group.rank == 0 else {})
        predicted = evaluator.export_model_test_set_predictions(folder / kind)
        logits = torch.from_numpy(evaluator.predict("test"))
        limit = torch.tensor([evaluator.prepared.token_budget.max_tokens])
        save_file({"logits": logits, "values": evaluator.result.stack.params, "limit": limit},
                  folder / f"{kind}.rank{group.rank}.safetensors")  # fmt: skip
        assert predicted


@pytest.fixture(scope="module")
def alone(no_dropout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert in_ranks(1, train_all_types, folder, no_dropout) == [0]
    return folder


def measured(folder, kind):
    metadata = json.loads((folder / kind / "metrics.json").read_text())
    return metadata["train_loss"], metadata["evaluations"]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_run_give_the_results_of_one_process(size, no_dropout, alone, tmp_path):
    memory = 100
    assert in_ranks(size, train_all_types, tmp_path, no_dropout, memory) == [0] * size
    for kind in TYPES:
        plain = load_file(alone / f"{kind}.rank0.safetensors")
        by_rank = [load_file(tmp_path / f"{kind}.rank{rank}.safetensors") for rank in range(size)]
        limits = [ranks["limit"].item() for ranks in by_rank]
        assert limits[-1] <= memory < min(limits[:-1])  # the others did not halve theirs
        for other in by_rank[1:]:
            assert torch.equal(other["values"], by_rank[0]["values"])
            assert torch.equal(other["logits"], by_rank[0]["logits"])
        torch.testing.assert_close(by_rank[0]["logits"], plain["logits"], rtol=0, atol=1e-5)
        (loss, scores), (plain_loss, plain_scores) = measured(tmp_path, kind), measured(alone, kind)
        np.testing.assert_allclose(loss, plain_loss, rtol=0, atol=1e-5)
        assert scores == plain_scores
        for name in ("RTE.tsv", "validation_logits.safetensors"):
            assert (tmp_path / kind / name).exists()
        assert (tmp_path / kind / "RTE.tsv").read_bytes() == (alone / kind / "RTE.tsv").read_bytes()
        assert abs(plain_loss[-1] - plain_loss[0]) > 1e-3  # it has learned something to compare


FLAGS = ["--task-name", "rte", "--model-name", str(TINY_BERT), "--data-dir", str(GLUE),
         "--train-size", "40", "--batch-size", "8", "--gpu-device", "cpu"]  # fmt: skip


def run(output, *words, status=0):
    """The command over two ranks; what they printed."""
    log, flags = output.with_suffix(".log"), ["--output-path", str(output), *FLAGS, *words]
    assert in_ranks(2, run_program, flags, log) == [status] * 2, log.read_text()
    return log.read_text()


def torchrun(output, *words, options):
    """The same by torchrun itself, as a process that goes on."""
    program = [str(ROOT / "run_glue.py"), "--output-path", str(output), *FLAGS, *words]
    command = ["torchrun", "--standalone", *options, "--nproc-per-node", "2", *program]
    environment = active_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE)


@pytest.fixture
def plain():
    """The same command without torchrun, on one thread as its ranks are; gives its status."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda output, *words: run_glue.main(["--output-path", str(output), *FLAGS, *words])
    torch.set_num_threads(threads)


def left(folder):
    """What a run left, without times and places: {file: content}."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    told = (".json", ".md")  # a model card has the command
    content = {name: path.read_bytes() for name, path in files.items() if path.suffix not in told}
    metadata = json.loads((folder / "metrics.json").read_text())
    same = metadata.keys() - {"seconds", "runs_in_one_pass"}
    return content | {"metrics": {name: metadata[name] for name in same}}


def test_runs_that_were_dealt_out_equal_those_of_the_single_command(plain, tmp_path):
    """Three seeds over two ranks: the second trains two in one pass."""
    more = ["--fine-tune-type", "bitfit", "--epochs", "2", "--export-model", "--predict-test"]
    both = tmp_path / "both"
    printed = run(both, *more, "--seed", "0", "1", "2")
    assert plain(tmp_path / "first", *more, "--seed", "0") == 0
    assert plain(tmp_path / "rest", *more, "--seed", "1", "2") == 0
    assert left(both / "lr0.001_seed0") == left(tmp_path / "first")
    for name in ("lr0.001_seed1", "lr0.001_seed2"):
        assert left(both / name) == left(tmp_path / "rest" / name)
    metadata = [json.loads((both / f"lr0.001_seed{s}" / "args.json").read_text()) for s in range(3)]
    assert [fact["trained_by"] for fact in metadata] == [[0], [1], [1]]
    assert all(fact["finished"] and fact["ranks"] == 2 for fact in metadata)
    rows = (both / "results.csv").read_text().splitlines()
    assert len(rows) == 4 and printed.count("best of 3 trials") == 1
    assert not list(both.rglob("checkpoints"))


def test_term_sets_over_two_ranks_equal_their_own_commands(plain, tmp_path):
    """Each rank trains one of the sets."""
    more = ["--fine-tune-type", "bitfit", "--epochs", "1", "--learning-rate", "1e-3", "3e-3"]
    sets = {"query": ["--bias-terms", "query"], "none": ["--bias-terms", "none"]}
    printed = run(tmp_path / "both", *more, *sets["query"], *sets["none"])
    assert "bitfit: validation" in printed
    for name, words in sets.items():
        assert plain(tmp_path / name, *more, *words) == 0
        for of_run in ("lr0.001_seed0", "lr0.003_seed0"):
            assert left(tmp_path / "both" / f"{of_run}_{name}") == left(tmp_path / name / of_run)


def process_of_rank(torchrun, rank):
    """The process number of a rank, or None before it is there."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    return None


@pytest.mark.long
def test_a_killed_rank_is_started_again_and_the_end_is_the_same(plain, quick_python, tmp_path):
    """SIGKILL to one of two ranks, each with a run of its own that cannot be stacked."""
    more = ["--fine-tune-type", "rand_uniform", "--seed", "0", "1", "--epochs", "12", "--resume"]
    killed, checkpoint = tmp_path / "killed", tmp_path / "killed/lr0.001_seed1/checkpoints"
    process = torchrun(killed, *more, options=["--max-restarts=3"])
    wait_for(lambda: [*checkpoint.glob("*.json")])
    os.kill(process_of_rank(process, 1), signal.SIGKILL)
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 0, error
    assert "resumed after" in error
    assert plain(tmp_path / "plain", *more) == 0
    for name in ("lr0.001_seed0", "lr0.001_seed1"):
        assert left(killed / name) == left(tmp_path / "plain" / name)


@pytest.mark.long
def test_ranks_that_were_stopped_together_end_as_if_never_stopped(
    plain, quick_python, tmp_path, capsys
):
    """SIGUSR1 to torchrun. Each rank draws dropout of its own: the checkpoint has both."""
    output = tmp_path / "out"
    more = ["--fine-tune-type", "bitfit", "--epochs", "30", "--export-model", "--predict-test"]
    handled = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    process = torchrun(output, *more, options=handled)
    wait_for((output / "metrics.json").exists)
    process.send_signal(signal.SIGUSR1)
    error = process.communicate(timeout=60)[1]
    assert error.count("to go on: torchrun --standalone --nproc-per-node 2 run_glue.py") == 1
    assert error.count("SIGUSR1: finishing the step") == 1
    metadata = json.loads((output / "metrics.json").read_text())
    assert len(metadata["epochs"]) < 30  # or nothing was stopped
    assert plain(output, *more, "--resume") == 2
    assert "--nproc-per-node 2" in capsys.readouterr().err
    run(output, *more, "--resume")
    run(tmp_path / "plain", *more)
    assert left(output) == left(tmp_path / "plain")


def test_bad_input_is_one_line_whatever_the_ranks(tmp_path):
    """Three commands at once: a rank waits some seconds for the line of rank 0."""
    task = ["--task-file", str(tmp_path / "nowhere.json")]
    commands = [
        [*FLAGS, "--fine-tune-type", "bitfit", "--model-name", "nowhere/"],
        [*FLAGS, "--fine-tune-type", "nothing"],
        [*FLAGS[2:], "--fine-tune-type", "bitfit", *task],
    ]
    output = ["--output-path", str(tmp_path / "out")]
    logs = [tmp_path / f"log{i}" for i in range(3)]
    waits = [
        start_ranks(2, run_program, [*words, *output], log)
        for words, log in zip(commands, logs, strict=True)
    ]
    for wait, log in zip(waits, logs, strict=True):
        assert wait() == [2, 2]
        assert log.read_text().count("run_glue.py: error: ") == 1
    assert not (tmp_path / "out").exists()


def compare_values():
    ranks = Ranks()
    ranks.all_gather_object("here")
    _, group = ranks.make_group([Run(1e-3, 0)], on_own_gpus=False)
    assert group.replicas_equal(torch.ones(3))
    assert not group.replicas_equal(torch.tensor([1.0, group.rank * 1e-7]))
    ranks.shutdown()


def test_values_that_differ_are_noticed():
    assert in_ranks(2, compare_values) == [0, 0]


@pytest.mark.parametrize(
    ("size", "choice", "gpu"),
    [(2, None, 1), (4, None, "give torchrun --nproc-per-node 2, or --gpu-device to share one"),
     (4, 0, 0), (4, "cpu", None)],
)  # fmt: skip
def test_each_rank_has_a_gpu_of_its_own(size, choice, gpu, monkeypatch):
    """The last rank of a machine with two GPUs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ranks = Ranks()
    ranks.size = ranks.local_size = size
    ranks.local_rank = size - 1
    if isinstance(gpu, str):
        with pytest.raises(UserError, match=gpu):
            ranks.local_gpu(choice)
    else:
        assert ranks.local_gpu(choice) == gpu


def test_every_run_is_dealt_once_and_every_rank_has_work():
    for count in range(1, 9):
        for size in range(1, 9):
            dealt = assign_runs(list(range(count)), size)
            assert [run for _, runs in dealt for run in runs] == list(range(count))
            assert [rank for ranks, _ in dealt for rank in ranks] == list(range(size))
            for part in (0, 1):
                sizes = [len(share[part]) for share in dealt]
                assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
