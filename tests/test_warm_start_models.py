"""Warm starts of taggers and of encoders with added biases; deltas and tables of warm starts."""

import sys

import compare
import deltas
import numpy as np
import pytest
import torch
from conftest import GLUE, ROOT, TINY_BERT
from safetensors.torch import load_file

import run_glue
from bitfit.training.result import new_result
from glue_evaluator import GLUEvaluator
from utils import UserError


def prepared(task, kind="bitfit", model=TINY_BERT, start=None, add_biases=False):
    """An evaluator on toy data, before its first step."""
    data = None if str(task).endswith(".json") else GLUE
    evaluator = GLUEvaluator(str(task), str(model), None, 0, data, add_biases=add_biases)
    evaluator.preprocess_dataset("longest", 64, 8, train_size=16)
    components = ["bias"] if kind == "bitfit" else []
    evaluator.prepare(kind, 1e-3, components=components, verbose=False, start_from=start)
    return evaluator


def save_random(folder, evaluator):
    stack = evaluator.prepared.new_stack()
    stack.params += 0.1 * torch.randn(
        stack.params.shape, generator=torch.Generator().manual_seed(1)
    )
    stack.load_run(0)
    evaluator.with_parts(result=new_result(stack)).save(folder)


def test_taggers_start_from_taggers(tmp_path):
    """A classifier of sentences has a pooler, so its base model is another one."""
    toy = ROOT / "examples/tagging"
    source = prepared(toy / "toy-pos.json")
    save_random(tmp_path / "pos", source)
    same = prepared(toy / "toy-pos.json", "frozen", start=tmp_path / "pos")
    loaded = GLUEvaluator.load(tmp_path / "pos", None)
    assert np.array_equal(same.predict("validation"), loaded.predict("validation"))
    other = prepared(toy / "toy-phrases.json", start=tmp_path / "pos")
    assert other.prepared.method.start.record["classifier"] is False
    save_random(tmp_path / "rte", prepared("rte"))
    with pytest.raises(UserError, match="classifier of sentences, not of words as toy-pos needs"):
        prepared(toy / "toy-pos.json", start=tmp_path / "rte")
    with pytest.raises(UserError, match="classifier of words, not of sentences as rte needs"):
        prepared("rte", start=tmp_path / "pos")


@pytest.mark.parametrize("kind", ["bitfit", "frozen"])
def test_added_biases_are_taken_over(tmp_path, modern, kind):
    model = modern["modernbert"]
    save_random(tmp_path / "mnli", prepared("mnli", model=model, add_biases=True))
    with pytest.raises(UserError, match="has added biases: give --add-biases too"):
        prepared("rte", kind, model, tmp_path / "mnli")
    evaluator = prepared("rte", kind, model, tmp_path / "mnli", add_biases=True)
    values = dict(evaluator.model.named_parameters())
    saved = load_file(tmp_path / "mnli/delta.safetensors")
    encoder = [name for name in saved if name.startswith("model.")]
    assert len(encoder) > 10
    assert all(torch.equal(values[name], saved[name]) for name in encoder)
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path / "rte")
    loaded = GLUEvaluator.load(tmp_path / "rte", None)
    assert np.array_equal(loaded.predict("validation"), evaluator.predict("validation"))


def test_deltas_and_tables_name_the_start(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kind, start in (("mnli", "bitfit", None), ("warm", "bitfit", "mnli"),
                              ("cold", "bitfit", None), ("frozen", "frozen", "mnli")):  # fmt: skip
        words = ["-o", name, "-t", "mnli" if name == "mnli" else "rte", "-m", str(TINY_BERT)]
        words += ["--data-dir", str(GLUE), "-f", kind, "-e", "1", "--train-size", "16", "-d", "cpu"]
        words += ["--bias-terms", "query"] if name in ("warm", "cold") else []
        words += ["--start-from", start] if start else []
        assert run_glue.main([*words, "--save-evaluator", "--export-model"]) == 0
    assert "started from values that were trained on mnli" in (
        tmp_path / "warm/model/README.md"
    ).read_text(encoding="utf-8")
    capsys.readouterr()
    assert deltas.main(["compare", "warm", "cold"]) == 2
    message = "(bitfit (query, started from mnli)) and cold (bitfit (query)) have different"
    assert message in capsys.readouterr().err
    assert deltas.main(["apply", "cold", "--output-path", "a"]) == 0
    assert deltas.main(["apply", "frozen", "--scale", "0", "--output-path", "b"]) == 0
    base = load_file(TINY_BERT / "model.safetensors")
    scaled = load_file(tmp_path / "b/model.safetensors")
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    assert torch.equal(scaled[name], base[name.removeprefix("bert.") if name not in base else name])
    monkeypatch.setattr(sys, "argv", ["compare.py", "warm", "cold", "frozen"])
    compare.main()
    table = capsys.readouterr().out
    assert "bitfit (query) from mnli" in table
    assert "frozen from mnli" in table
