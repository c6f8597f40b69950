"""--start-from and --evaluate-only of run_glue.py: files, resume, ranks, and what is refused."""

import json
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
from conftest import GLUE, ROOT, TINY_BERT
from moments import at_step, send
from processes import in_ranks, run_program
from safetensors.numpy import load_file

import run_glue

DATA = ["-m", str(TINY_BERT), "--data-dir", str(GLUE), "--gpu-device", "cpu"]
TRAIN = [*DATA, "-e", "2", "--train-size", "24", "--save-evaluator"]
WARM = [*TRAIN, "-t", "rte", "-f", "bitfit", "-s", "0", "1", "--predict-test"]


def start(*words):
    """Run the command and return its exit status."""
    try:
        return run_glue.main(list(map(str, words)))
    except SystemExit as stop:
        return stop.code


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def mnli(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnli") / "out"
    assert start("-o", folder, *TRAIN, "-t", "mnli", "-f", "bitfit", "-l", "4e-3") == 0
    return folder


def test_a_sweep_resumes_from_the_same_evaluator_only(tmp_path, mnli, capsys):
    """The folder may have moved; its values are compared."""
    quiet, out, moved = tmp_path / "quiet", tmp_path / "out", tmp_path / "moved"
    assert start("-o", quiet, *WARM, "--start-from", mnli) == 0
    with at_step(4, send(signal.SIGTERM)):
        assert start("-o", out, *WARM, "--start-from", mnli) == 128 + signal.SIGTERM
    cold = tmp_path / "cold"
    assert start("-o", cold, *TRAIN, "-t", "mnli", "-f", "bitfit", "-l", "1e-3") == 0
    for other in ([], ["--start-from", cold]):
        capsys.readouterr()
        assert start("-o", out, *WARM, *other, "--resume") == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "not the interrupted run: the evaluator of --start-from changed" in message
    shutil.copytree(mnli / "evaluator", moved)
    assert start("-o", out, *WARM, "--start-from", moved, "--resume") == 0
    args, metrics = read(out / "args.json"), read(out / "lr0.001_seed1/metrics.json")
    assert args["start_from"] == str(moved)
    assert metrics["started_from"]["sha256"] == args["start_sha256"]
    assert metrics["started_from"]["folder"] == str(moved)
    for name in ("lr0.001_seed0/RTE.tsv", "lr0.001_seed1/evaluator/delta.safetensors"):
        assert (out / name).read_bytes() == (quiet / name).read_bytes()
    capsys.readouterr()
    assert start("-o", out, *WARM, "--start-from", moved, "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_two_ranks_start_from_the_same_values(tmp_path, mnli):
    """Without dropout's order of random numbers the results would be equal; files are complete."""
    flags = ["-o", tmp_path / "ranks", *WARM, "-l", "1e-3", "--start-from", mnli]
    assert in_ranks(2, run_program, list(map(str, flags)), tmp_path / "log") == [0, 0]
    assert start("-o", tmp_path / "one", *flags[2:]) == 0
    for run in ("lr0.001_seed0", "lr0.001_seed1"):
        first, second = (read(tmp_path / f / run / "metrics.json") for f in ("ranks", "one"))
        assert first["started_from"] == second["started_from"]
        assert first["train_loss"][0] == pytest.approx(second["train_loss"][0], rel=0.05)


@pytest.mark.parametrize("kind", ["bitfit", "full_ft", "rand_uniform"])
def test_scoring_a_saved_evaluator_repeats_its_last_scores(tmp_path, kind):
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ["-t", "rte", "-f", kind, "-l", "1e-3", "-s", "3", "--predict-test", "--export-model"]
    assert start("-o", run, *DATA, "-e", "1", "--save-evaluator", *flags) == 0
    more = ["-t", "rte", "--predict-test", "--evaluate-only"]
    assert start("-o", out, *DATA, *more, "--start-from", run) == 0
    trained, scored = (read(folder / "metrics.json") for folder in (run, out))
    expected = {name: value for name, value in trained["last"].items() if name != "epoch"}
    assert scored["last"] == {"epoch": 0} | expected
    assert (scored["fine_tune_type"], scored["learning_rate"], scored["seed"]) == (kind, 1e-3, 3)
    assert scored["trained_parameters"] == 0
    assert (out / "RTE.tsv").read_bytes() == (run / "RTE.tsv").read_bytes()
    first, second = (load_file(f / "validation_logits.safetensors") for f in (run, out))
    assert np.array_equal(first["validation"][-1:], second["validation"])
    assert np.array_equal(first["validation.labels"], second["validation.labels"])
    assert not list(out.glob("learning_curves*"))
    plain = ["-m", run / "model", *DATA[2:], *more]
    assert start("-o", tmp_path / "plain", *plain) == 0
    assert read(tmp_path / "plain/metrics.json")["last"] == scored["last"]
    assert (tmp_path / "plain/RTE.tsv").read_bytes() == (run / "RTE.tsv").read_bytes()


def test_a_warm_start_from_the_same_task_begins_with_its_scores(tmp_path):
    """At a learning rate of almost zero, the first epoch has the scores of the source."""
    flags = ["-t", "rte", "-f", "bitfit"]
    assert start("-o", tmp_path / "a", *TRAIN, *flags, "-l", "4e-3") == 0
    source = ["--start-from", tmp_path / "a"]
    assert start("-o", tmp_path / "b", *TRAIN, *flags, *source, "-l", "1e-30", "-s", "5", "6") == 0
    expected = read(tmp_path / "a/metrics.json")["last"]["validation"]
    for seed in (5, 6):
        scores = read(tmp_path / f"b/lr1e-30_seed{seed}/metrics.json")
        assert scores["last"]["validation"] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start-from", "nowhere", "-f", "bitfit"], "there is no saved evaluator in nowhere"),
        (["--start-from", "x", "--random-encoder", "-f", "bitfit"], "give one of them"),
        (["--evaluate-only", "-f", "bitfit", "-e", "3", "--keep", "best"],
         "--evaluate-only trains nothing: leave out --fine-tune-type, --epochs, --keep"),
        (["--evaluate-only", "--add-biases"], "--evaluate-only would leave the biases at zero"),
        (["--evaluate-only"], "has no classifier with the labels of rte"),
        ([], "the following arguments are required: --fine-tune-type/-f"),
    ],
)  # fmt: skip
def test_refused(tmp_path, capsys, words, message):
    assert start("-o", tmp_path / "out", *DATA, "-t", "rte", *words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_labels_of_another_task_cannot_be_scored(tmp_path, mnli, capsys):
    words = ["-t", "rte", "--evaluate-only", "--start-from", mnli]
    assert start("-o", tmp_path / "out", *DATA, *words) == 2
    assert "has no classifier with the labels of rte" in capsys.readouterr().err.splitlines()[-1]


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """One after the other, on toy data."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/warm-start.md").read_text(encoding="utf-8")
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python run_glue.py ")]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("bert-base-cased", str(TINY_BERT)))[2:]
        small = [] if "--evaluate-only" in words else ["--epochs", "1", "--train-size", "16"]
        assert start(*words, "--data-dir", GLUE, "--gpu-device", "cpu", *small) == 0, line
    assert (tmp_path / "out/mnli-again/MNLI-m.tsv").exists()
