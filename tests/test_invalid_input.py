"""Invalid flags, data and models end run_glue.py with one line, before any work."""

import os
import shutil

import pytest
import transformers
from conftest import GLUE, TINY_BERT
from processes import exit_status
from small_command import flags

import run_glue

BAD_FLAGS = {
    "unknown task": (["-t", "rtee"], "invalid choice: 'rtee'"),
    "unknown type": (["-f", "bitfat"], "invalid choice: 'bitfat'"),
    "unknown term": (
        ["--bias-terms", "queery"],
        "--bias-terms queery: this bert model has no such bias; its terms: embedd",
    ),
    "biases that are there": (
        ["--add-biases"],
        "--add-biases: the config of this bert model cannot add",
    ),
    "biases that stay zero": (
        ["--add-biases", "-f", "frozen"],
        "--add-biases: frozen would leave the biases at zero",
    ),
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
            "--init-seed": ["-1"],
            "--data-seed": ["1.5"],
            "--gpu-device": ["first"],
            "--precision": ["fp16"],
            "--keep": ["all"],
            "--max-tokens": ["0", "lots"],
        }.items()
        for value in values
    },
    "a learning rate twice": (["-l", "1e-3", "0.001"], "--learning-rate has a value twice"),
    "a seed twice": (["-s", "1", "2", "1"], "--seed has a value twice"),
    "an init seed twice": (["--init-seed", "1", "1"], "--init-seed has a value twice"),
    "a data seed twice": (["--data-seed", "1", "1"], "--data-seed has a value twice"),
    "a seed of both": (["-s", "0", "--data-seed", "1"], "give --seed alone, or the other two"),
    "no terms and a term": (["--bias-terms", "query", "none"], "give it without other terms"),
    "one bad rate of two": (["-l", "1e-3", "nan"], "argument --learning-rate"),
    "no such GPU": (["--gpu-device", "99"], "there is no GPU 99"),
    "negative GPU": (["--gpu-device", "-1"], "there is no GPU -1"),
    "mask above the encoder": (
        ["-f", "rand_uniform", "--mask-size", "999999999"],
        "--mask-size 999999999: the encoder has",
    ),
    "rows without room": (["--max-seq-length", "3"], "leaves no room for text"),
    "no such model folder": (["-m", "./nowhere"], "there is no model folder ./nowhere"),
    "no network, no copy": (["-m", "bert-base-cased"], "--model-name <folder>"),
    "no such data folder": (["--data-dir", "nowhere"], "there is no data folder nowhere"),
}


def expect_error(argv, message, output, capsys):
    """main() ends with status 2 and one line with the message; the output folder stays away."""
    status = exit_status(run_glue.main, argv)
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
    [("*.safetensors", "no file named model.safetensors"), ("tokenizer*", "has no tokenizer")],
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
