import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from conftest import GLUE, ROOT, TINY_BERT

import run_glue
from bitfit import versions
from bitfit.data.tasks import TASKS
from bitfit.training import loop
from glue_evaluator import GLUEvaluator

SMALL = ["--data-dir", str(GLUE), "--epochs", "1", "--train-size", "24", "--gpu-device", "cpu"]


def flags(output, *more, task="rte", kind="bitfit", model=TINY_BERT):
    return ["-o", str(output), "-t", task, "-f", kind, "-m", str(model), *SMALL, *more]


def test_help_is_fast_and_needs_no_torch():
    """The time is that of the import, so it is not asserted: what must stay out is."""
    script = (
        "import sys, run_glue\n"
        "try: run_glue.main(['-h'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for heading in ("what to run", "data", "training", "machine", "results"):
        assert f"\n{heading}:\n" in result.stdout
    for default in ("[bert-base-cased]", "[128]", "[0.001]", "[16]", "[8]", "[adamw]", "[last]"):
        assert default in result.stdout.replace("-\n" + " " * 24, "-")


RELEASED = [  # the released README's examples, placeholders filled
    "--task-name rte --model-name bert-base-cased --fine-tune-type full_ft --learning-rate 1e-5",
    "--task-name rte --model-name bert-base-cased --fine-tune-type bitfit --learning-rate 1e-3",
    "--task-name rte --model-name bert-base-cased --fine-tune-type bitfit "
    "--bias-terms query intermediate --learning-rate 1e-3",
    "--task-name rte --model-name bert-base-cased --fine-tune-type frozen --learning-rate 1e-3",
    "--task-name rte --model-name bert-base-cased --fine-tune-type rand_uniform "
    "--learning-rate 1e-3",
    "--task-name rte --model-name bert-base-cased --fine-tune-type rand_row_col "
    "--learning-rate 1e-3",
    "--task-name cola --model-name bert-base-cased --fine-tune-type bitfit --bias-terms all "
    "--gpu-device cpu --learning-rate 1e-3 --epochs 2 --batch-size 8 --optimizer adam "
    "--save-evaluator --predict-test --verbose",
]


@pytest.mark.pictures
@pytest.mark.parametrize("command", RELEASED)
def test_the_released_examples(tmp_path, command, capsys):
    words = command.replace("bert-base-cased", str(TINY_BERT)).split()
    assert run_glue.main(["--output-path", str(tmp_path / "out"), *words, *SMALL]) == 0
    args = json.loads((tmp_path / "out/args.json").read_text())
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert args["torch"] == torch.__version__
    assert args["learning_rate"] == metrics["learning_rate"]
    assert metrics["fine_tune_type"] == args["fine_tune_type"]
    assert "validation" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    metric = TASKS[args["task_name"]].metrics[0].lower()
    assert {"metrics.csv", f"learning_curves_{metric}.png"} < names
    assert ("bias_term_changes.png" in names) == (args["fine_tune_type"] == "bitfit")
    assert ("CoLA.tsv" in names) == args["predict_test"]


def test_partial_bitfit_counts(tmp_path):
    run_glue.main(flags(tmp_path / "out", "--bias-terms", "query", "intermediate"))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    config = transformers.AutoConfig.from_pretrained(TINY_BERT)
    per_layer = config.hidden_size + config.intermediate_size
    rest = config.hidden_size + 2 * config.hidden_size + 2  # the pooler's bias and the classifier
    assert metrics["trained_parameters"] == config.num_hidden_layers * per_layer + rest


def test_verbose_lists_the_mask_alone(tmp_path, capsys):
    run_glue.main(flags(tmp_path / "out", "--verbose", "--mask-size", "77", kind="rand_uniform"))
    shown = capsys.readouterr().out
    assert shown.count("parameters train") == 1
    assert " of them" in shown


def test_git_is_not_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions.git_commit() is None


@pytest.mark.pictures
def test_all_outputs_of_one_run(tmp_path):
    output = tmp_path / "deep" / "out"
    more = ["--save-evaluator", "--export-model", "--predict-test", "--keep", "best"]
    more += ["--lr-schedule", "linear", "--warmup-ratio", "0.1", "--precision", "bf16"]
    assert run_glue.main(flags(output, *more, task="mnli")) == 0
    assert {path.name for path in output.iterdir()} == {
        "args.json", "metrics.json", "metrics.csv", "learning_curves_accuracy.png",
        "bias_term_changes.png", "bias_term_changes.csv", "validation_logits.safetensors",
        "evaluator", "model", "MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv",
    }  # fmt: skip
    table = pd.read_csv(output / "metrics.csv")
    assert set(table["split"]) == {"train", "validation_matched", "validation_mismatched"}
    assert not list(output.rglob("*.tmp*"))


def test_the_same_command_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        more = ["--save-evaluator", "--predict-test"]
        run_glue.main(flags(tmp_path / name, *more, kind="rand_uniform"))
    for name in ("metrics.csv", "RTE.tsv", "evaluator/delta.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_empty_output_folder_is_fine(tmp_path):
    (tmp_path / "out").mkdir()
    assert run_glue.main(flags(tmp_path / "out", kind="frozen")) == 0


def test_a_diverged_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    plain, calls = loop.row_losses, iter(range(10_000))

    def losses(task, logits, labels):  # the second epoch's losses overflow
        return plain(task, logits, labels) * (float("inf") if next(calls) >= steps else 1.0)

    steps = 3
    monkeypatch.setattr(loop, "row_losses", losses)
    assert run_glue.main([*flags(tmp_path / "out", "--save-evaluator"), "--epochs", "4"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("run_glue.py: stopped: the loss or its gradient was not finite")
    assert "epoch 2, step 1" in message
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["epochs"] == [1]
    assert (tmp_path / "out/learning_curves_accuracy.png").exists()
    rare = [*flags(tmp_path / "rare"), "--epochs", "4", "--evaluation-frequency", "4"]
    calls = iter(range(10_000))
    assert run_glue.main(rare) == 1
    metrics = json.loads((tmp_path / "rare/metrics.json").read_text())
    assert metrics["epochs"] == []
    assert len(metrics["train_loss"]) == 1


# Several runs

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


# Bad input: status 2, one line, nothing written.

BAD_FLAGS = {
    "unknown task": (["-t", "rtee"], "invalid choice: 'rtee'"),
    "unknown type": (["-f", "bitfat"], "invalid choice: 'bitfat'"),
    "unknown term": (["--bias-terms", "queery"], "invalid choice: 'queery'"),
    "unknown flag": (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs?"),
    "terms without bitfit": (
        ["-f", "frozen", "--bias-terms", "query"],
        "--bias-terms goes with --fine-tune-type bitfit only",
    ),
    "mask size without rand_uniform": (
        ["--mask-size", "5"],
        "--mask-size goes with --fine-tune-type rand_uniform only",
    ),
    **{
        f"{flag} {value}": ([flag, value], f"argument {flag}")
        for flag, values in {
            "--learning-rate": ["0", "-1e-3", "nan", "inf", "fast"],
            "--epochs": ["0", "-1", "1.5", "nan"],
            "--batch-size": ["0", "many"],
            "--max-seq-length": ["0", "-5"],
            "--train-size": ["0"],
            "--mask-size": ["0", "-1", "nan"],
            "--warmup-ratio": ["-0.1", "1", "nan"],
            "--evaluation-frequency": ["0"],
            "--seed": ["-1", "1.5"],
            "--gpu-device": ["first"],
            "--precision": ["fp16"],
            "--keep": ["all"],
            "--max-tokens": ["0", "lots"],
        }.items()
        for value in values
    },
    "a learning rate twice": (["-l", "1e-3", "0.001"], "--learning-rate has a value twice"),
    "a seed twice": (["-s", "1", "2", "1"], "--seed has a value twice"),
    "one bad rate of two": (["-l", "1e-3", "nan"], "argument --learning-rate"),
    "no such GPU": (["--gpu-device", "99"], "there is no GPU 99"),
    "negative GPU": (["--gpu-device", "-1"], "there is no GPU -1"),
    "mask above the encoder": (
        ["-f", "rand_uniform", "--mask-size", "999999999"],
        "--mask-size 999999999: the encoder has",
    ),
    "rows above the positions": (["--max-seq-length", "129"], "above the model's 128 positions"),
    "rows without room": (["--max-seq-length", "3"], "leaves no room for text"),
    "no such model folder": (["-m", "./nowhere"], "there is no model folder ./nowhere"),
    "no network, no copy": (["-m", "bert-base-cased"], "--model-name <folder>"),
    "no such data folder": (["--data-dir", "nowhere"], "there is no data folder nowhere"),
}


def expect_error(argv, message, output, capsys):
    """main() ends with status 2 and one line with the message; the output folder stays away."""
    try:
        status = run_glue.main(argv)
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("run_glue.py: error: ")]
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not output.exists()


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(tmp_path, case, capsys, monkeypatch):
    monkeypatch.setattr("utils.setup_logging", lambda *_: None)
    more, message = BAD_FLAGS[case]
    expect_error([*flags(tmp_path / "out"), *more], message, tmp_path / "out", capsys)


def test_the_length_is_refused_before_any_row_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bitfit.data.tokens.read_split", None)  # a call would fail
    argv = [*flags(tmp_path / "out"), "--max-seq-length", "129"]
    expect_error(argv, "above the model's 128 positions", tmp_path / "out", capsys)


def test_missing_flags(tmp_path, capsys):
    argv = ["-o", str(tmp_path / "out")]
    expect_error(argv, "are required: --fine-tune-type/-f", tmp_path / "out", capsys)
    expect_error([*argv, "-f", "frozen"], "give one of --task-name (a", tmp_path / "out", capsys)


def test_no_network_and_no_data(tmp_path, capsys):
    argv = ["-o", str(tmp_path / "out"), "-t", "rte", "-f", "bitfit", "-m", str(TINY_BERT)]
    expect_error(argv, "--data-dir <folder>", tmp_path / "out", capsys)


def test_output_paths_in_use(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results").write_text("mine")
    for name, message in {
        "file": "is a file: give a folder",
        "full": "is not empty: give a new folder",
        "file/below": "cannot be made in",
    }.items():
        status = run_glue.main(flags(tmp_path / name))
        assert status == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["results"]


DAMAGE = {
    "split missing": (lambda f: (f / "dev.tsv").unlink(), "no validation split of rte"),
    "test split missing": (lambda f: (f / "test.tsv").unlink(), "no test split of rte"),
    "wrong column count": (
        lambda f: (f / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n"),
        "dev.tsv:2: 3 columns where 4 are expected",
    ),
    "unknown label": (
        lambda f: (f / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t?\n"),
        "dev.tsv:2: unknown label '?'",
    ),
    "empty split": (
        lambda f: (f / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n"),
        "the train split of rte is empty",
    ),
    "wrong encoding": (
        lambda f: (f / "train.tsv").write_bytes(b"index\tsentence1\tsentence2\tlabel\n\xff\n"),
        "train.tsv:2: not UTF-8",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data(tmp_path, case, capsys, monkeypatch):
    monkeypatch.setattr("utils.setup_logging", lambda *_: None)
    damage, message = DAMAGE[case]
    shutil.copytree(GLUE / "RTE", tmp_path / "glue/RTE")
    damage(tmp_path / "glue/RTE")
    argv = [*flags(tmp_path / "out", "--predict-test"), "--data-dir", str(tmp_path / "glue")]
    expect_error(argv, message, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [("*.safetensors", "there is no model.safetensors"), ("tokenizer*", "has no tokenizer")],
)
def test_incomplete_model_folder(tmp_path, leave_out, message, capsys, monkeypatch):
    monkeypatch.setattr("utils.setup_logging", lambda *_: None)
    shutil.copytree(TINY_BERT, tmp_path / "m", ignore=shutil.ignore_patterns(leave_out))
    expect_error(flags(tmp_path / "out", model=tmp_path / "m"), message, tmp_path / "out", capsys)


def test_a_model_without_biases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.setup_logging", lambda *_: None)
    shutil.copytree(TINY_BERT, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    config = transformers.ModernBertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(tmp_path / "m")
    argv = flags(tmp_path / "out", model=tmp_path / "m")
    expect_error(argv, "no biases at all, so bitfit cannot", tmp_path / "out", capsys)


def test_a_process_ends_with_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "run_glue.py", *flags(tmp_path / "out"), "--data-dir", "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr == "run_glue.py: error: there is no data folder nowhere: check --data-dir\n"
    )
    assert result.stdout == ""


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
    full = "run_glue.py: stopped: [Errno 28] No space left on device: 'standard output'; "
    assert last.startswith(full) == (status == 1)


def test_a_process_is_quiet_when_no_one_looks(tmp_path):
    command = [sys.executable, "run_glue.py", *flags(tmp_path / "out", kind="frozen")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr  # no progress bar
    assert "Warning" not in result.stderr
    assert "epoch 1 " in result.stderr
    assert Path(tmp_path / "out/metrics.json").exists()
