"""Model folders: what would be misread is refused in one line, and code in them is never run."""

import re
import subprocess
import sys
from pathlib import Path

import predict
import pytest
import torch
from conftest import GLUE
from model_folders import (
    LAYER,
    RTE,
    adapter,
    adapter_alone,
    change,
    changed,
    configured,
    cut,
    only_bin,
    renamed,
    set_json,
    shards,
    with_nan,
    write,
)
from safetensors.torch import load_file

import run_glue
from bitfit.model import loading
from bitfit.model.bias_terms import model_of_config
from glue_evaluator import GLUEvaluator
from utils import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

CODE = "import pathlib\npathlib.Path('ran').touch()\n"

WRONG = {
    "nan": (changed(with_nan), f"1 of its tensors hold NaN or infinite values .the first: {LAYER}"),
    "inf": (changed(lambda t: with_nan(t, float("inf"))), "hold NaN or infinite values"),
    "float16-overflow": (
        changed(lambda t: {n: v.half() for n, v in with_nan(t, 1e6).items()}),
        "hold NaN or infinite values",
    ),
    "fewer-layers": (configured(num_hidden_layers=1), r"has 32 weights in its layers .*: 1; the"),
    "fewer-layers-no-prefix": (
        lambda f: (change(f, renamed("", "bert.")), set_json(f, num_hidden_layers=2)),
        "has 16 weights in its layers",
    ),
    "more-layers": (configured(num_hidden_layers=4), "lacks 16 encoder weights"),
    "unmerged": (
        changed(lambda t: t | {LAYER.replace("weight", "lora_A.weight"): torch.ones(2, 128)}),
        "has 1 weights in its layers for which its config.json has no place",
    ),
    "sizes": (configured(max_position_embeddings=64), r"\(128, 128\), and \(64, 128\) by its conf"),
    "module": (changed(renamed("module.")), "it has module.bert.embeddings"),
    "module-no-prefix": (
        changed(renamed("module.", "bert.")),
        "it has module.cls.predictions",
    ),
    "compiled": (changed(renamed("_orig_mod.")), "it has _orig_mod.bert"),
    "bin": (only_bin, r"convert them in .* with python -c \"import glob, torch"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "truncated": (cut("model.safetensors", 9000), "model.safetensors is cut off or damaged"),
    "empty": (cut("model.safetensors", 0), "model.safetensors is cut off or damaged"),
    "page": (write("model.safetensors", "<!doctype html>"), "is cut off or damaged"),
    "shard": (shards, "No such file or directory: .*model-00002-of-00002.safetensors"),
    "pointer": (write("model.safetensors", POINTER), "model.safetensors: a git-lfs pointer, not"),
    "pointer-config": (write("config.json", POINTER), "config.json: a git-lfs pointer"),
    "pointer-tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json: a git-lfs pointer"),
    "json": (cut("config.json", 100), "config.json is cut off or damaged"),
    "json-tokenizer": (cut("tokenizer_config.json", 50), "tokenizer_config.json is cut off or dam"),
    "json-vocabulary": (cut("tokenizer.json", 500), "tokenizer.json is cut off or damaged"),
    "no-config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "unknown": (configured(model_type="bertt"), "has model type `bertt` but Transformers does not"),
    "no-type": (configured(model_type=None), "Should have a `model_type` key"),
    "quantized": (configured(quantization_config={"quant_method": "gptq"}), "are quantized"),
    "adapter": (adapter, "has an adapter of peft"),
    "adapter-alone": (adapter_alone, "has an adapter of peft"),
    "int8": (
        changed(lambda t: t | {LAYER: t[LAYER].to(torch.int8), f"{LAYER}_scale": torch.ones(1)}),
        "has 1 weights in its layers for which its config.json has no place",
    ),
    "typed": (configured(num_hidden_layers="3"), "'num_hidden_layers' expected int, got str"),
    "no-unknown-token": (
        lambda f: ((f / "tokenizer.json").unlink(), write("vocab.txt", "")(f)),
        "Missing .UNK. token from the vocabulary",
    ),
    "small-embeddings": (configured(vocab_size=300), r"\(345, 128\), and \(300, 128\) by its conf"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_be_misread_is_refused_in_one_line(folder, kind):
    damage, message = WRONG[kind]
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        loading.load_tokenizer(folder)
        loading.load_model(folder, RTE)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_the_control_of_a_random_encoder_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    model, initialized = loading.load_model(folder, RTE, random_encoder=True)
    assert initialized == {"classifier.weight", "classifier.bias"}
    assert model.config.num_hidden_layers == 3


def test_pickled_weights_are_converted_as_the_message_says(folder):
    expected = load_file(folder / "model.safetensors")
    only_bin(folder)
    with pytest.raises(UserError) as raised:
        loading.load_model(folder, RTE)
    program = re.search(r'python -c "(.*)"', str(raised.value))[1]
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    assert all(
        torch.equal(t, expected[n]) for n, t in load_file(folder / "model.safetensors").items()
    )
    loading.load_model(folder, RTE)


def code(folder, **config):
    for name in ("configuration_my", "modeling_my", "tokenization_my"):
        (folder / f"{name}.py").write_text(CODE)
    set_json(folder, **config)


AUTO_MAP = {
    "AutoConfig": "configuration_my.MyConfig",
    "AutoModelForSequenceClassification": "modeling_my.MyModel",
}


def test_code_in_a_model_folder_is_never_run(folder, tmp_path, monkeypatch, capsys):
    """Nobody is asked on standard input, where the answer would be yes."""
    asked = []

    def answer(*prompt):
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.chdir(tmp_path)
    at = ["--gpu-device", "cpu", "--data-dir", str(GLUE), "--max-seq-length", "12"]
    argv = ["-t", "rte", "-f", "frozen", "-m", "./model", "-e", "1", "--train-size", "16", *at]
    assert run_glue.main(["-o", "out", *argv, "--save-evaluator"]) == 0
    capsys.readouterr()
    code(folder, auto_map=AUTO_MAP, model_type="my")
    for random in ([], ["--random-encoder"]):
        assert run_glue.main(["-o", "new", *argv, *random]) == 2
    assert predict.main(["out", "--gpu-device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 3
    assert all("custom code is not supported" in line for line in error)
    with pytest.raises(UserError, match="custom code is not supported"):
        GLUEvaluator.load("out/evaluator", None)
    with pytest.raises(UserError, match="custom code is not supported"):
        model_of_config("./model", RTE)
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_known_model_with_code_of_its_own_gets_a_warning(folder, caplog, name):
    set_json(folder, name, auto_map={"AutoModel": "modeling_my.M", "AutoTokenizer": ["t.T", None]})
    loading.load_tokenizer(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: custom code is not supported: the code in its folder (auto_map) was not run, "
        "transformers' bert is used"
    ]


def test_a_folder_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bert-base-cased").mkdir()
    argv = ["-o", "out", "-t", "rte", "-f", "bitfit", "--data-dir", str(GLUE)]
    assert run_glue.main(argv) == 2  # the default model
    error = capsys.readouterr().err
    assert f"the folder {tmp_path}/bert-base-cased has no config.json: give another" in error
    assert len(error.splitlines()) == 1


def test_bad_models_end_the_programs_with_one_line(folder, tmp_path, capsys, monkeypatch):
    output, at = tmp_path / "out", ["--data-dir", str(GLUE), "--gpu-device", "cpu"]
    argv = ["-t", "rte", "-f", "frozen", "-m", str(folder), "-e", "1", "--train-size", "16", *at]
    argv += ["--max-seq-length", "12"]
    assert run_glue.main(["-o", str(output), *argv, "--save-evaluator"]) == 0
    change(folder, with_nan)
    capsys.readouterr()
    assert run_glue.main(["-o", str(tmp_path / "new"), *argv]) == 2
    assert predict.main([str(output), "--gpu-device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in error[-2:]] == ["run_glue.py", "predict.py"]
    assert all("1 of its tensors hold NaN or infinite values" in line for line in error[-2:])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="NaN or infinite"):
        GLUEvaluator.load(output / "evaluator", None)
