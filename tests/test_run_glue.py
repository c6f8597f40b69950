"""The command run_glue.py: its help, its files, and how its process ends."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from conftest import ROOT, TINY_BERT
from moments import at_passes, at_step
from small_command import SMALL, flags

import run_glue
from bitfit import versions
from bitfit.data.tasks import TASKS


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


def test_a_diverged_run_keeps_what_was_measured(tmp_path, capsys):
    overflows: list[int] = []

    def overflow(number, ids):
        return float("inf") if overflows else None

    # An epoch has three steps.
    with at_step(3, lambda: overflows.append(3)), at_passes(overflow):
        assert run_glue.main([*flags(tmp_path / "out", "--save-evaluator"), "--epochs", "4"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("run_glue.py: stopped: the loss or its gradient was not finite")
    assert "epoch 2, step 1" in message
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["epochs"] == [1]
    assert (tmp_path / "out/learning_curves_accuracy.png").exists()
    rare = [*flags(tmp_path / "rare"), "--epochs", "4", "--evaluation-frequency", "4"]
    overflows.clear()
    with at_step(3, lambda: overflows.append(3)), at_passes(overflow):
        assert run_glue.main(rare) == 1
    metrics = json.loads((tmp_path / "rare/metrics.json").read_text())
    assert metrics["epochs"] == []
    assert len(metrics["train_loss"]) == 1


def test_a_process_ends_with_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "run_glue.py", *flags(tmp_path / "out"), "--data-dir", "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr == "run_glue.py: error: there is no data folder nowhere: check --data-dir\n"
    )
    assert result.stdout == ""


def test_a_process_is_quiet_when_no_one_looks(quick_python, tmp_path):
    command = [sys.executable, "run_glue.py", *flags(tmp_path / "out", kind="frozen")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr  # no progress bar
    assert "Warning" not in result.stderr
    assert "epoch 1 " in result.stderr
    assert Path(tmp_path / "out/metrics.json").exists()
