"""Biases whose gradient is zero: found by what the model computes, and kept as they are."""

import json

import deltas
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GLUE, TINY_BERT, load_model
from safetensors.torch import load_file
from test_architectures import CANINE, folder_of

import run_glue
from bitfit.data.splits import TextColumns
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import tokenize
from bitfit.model import loading, zero_gradients
from bitfit.model.trainable import ALL_BIASES, bitfit_names
from bitfit.results.plots import bias_changes, bias_heatmap
from glue_evaluator import GLUEvaluator

TEXTS = (
    ["the small dog runs over the hills", "a", "the film is good . it is small"],
    ["dogs run", "b", "the film is small"],
)
KEY = "attention.self.key.bias"
P2C = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def found_in(folder):
    """(the names that all bias terms train, what is found among them); the model stays as it is."""
    tokens = tokenize(TextColumns(TEXTS, None), loading.load_tokenizer(folder), 64)
    model = load_model(folder, TASKS["rte"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    state, names = torch.get_rng_state(), bitfit_names(model, [ALL_BIASES])
    found = zero_gradients.find_zero_gradients(model, names, tokens)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    return names, found


@pytest.mark.parametrize(
    ("name", "more", "term", "fixed"),
    [
        ("electra", {"embedding_size": 32}, KEY, [[0, 32]]),
        ("albert", {"embedding_size": 16}, "attention.key.bias", [[0, 32]]),
        ("mpnet", {}, "attention.attn.k.bias", [[0, 32]]),  # positions are added to the scores
        ("squeezebert", {"embedding_size": 32}, "attention.key.bias", [[0, 32]]),  # convolutions
        ("gpt2", {}, "attn.c_attn.bias", [[32, 64]]),  # query, key, value in one
        ("bloom", {}, "query_key_value.bias", [[16, 32], [64, 80]]),  # the same head by head
        ("canine", CANINE, KEY, [[0, 32]]),  # not finite in float64
        ("deberta-v2", {}, "self.key_proj.bias", [[0, 32]]),  # absolute positions
        # The queries of positions meet this key and its bias; those of words meet the positions'.
        ("deberta-v2", P2C, "self.pos_key_proj.bias", [[0, 32]]),
        ("roformer", {"embedding_size": 32}, None, None),  # turns keys, and what is added to them
        # Single numbers of slowly rotated keys have small gradients, but those of no head all do.
        ("esm", {"mask_token_id": 4, "position_embedding_type": "rotary"}, None, None),
        ("fnet", {}, None, None),  # no attention
    ],
)
def test_found_by_what_the_model_computes(tmp_path, name, more, term, fixed):
    names, found = found_in(folder_of(tmp_path, name, **more))
    expected = [n for n in names if term and n.endswith(term)]
    if name == "canine":  # its last layer attends from one token to another alone
        expected = [n for n in expected if "final_char_encoder" not in n]
    assert found == dict.fromkeys(expected, fixed)


def test_a_pretrained_attention_that_is_all_but_certain():
    """In float32 what is left of the sums would be a thousandth of their terms."""
    names, found = found_in(str(TINY_BERT))
    assert found == {n: [[0, 128]] for n in names if n.endswith(KEY)}


def test_a_bias_that_is_read_elsewhere_is_not_fixed():
    """Its module's gradients cancel, and yet the logits depend on it."""
    tokens = tokenize(TextColumns(TEXTS, None), loading.load_tokenizer(TINY_BERT), 64)
    model = load_model(TINY_BERT, TASKS["rte"])
    bias = model.bert.encoder.layer[1].attention.self.key.bias
    model.classifier.register_forward_hook(lambda module, inputs, logits: logits + bias[:2])
    assert (
        zero_gradients.find_zero_gradients(model, bitfit_names(model, [ALL_BIASES]), tokens) == {}
    )


def run(output, *more):
    argv = ["-o", str(output), "-t", "cola", "-f", "bitfit", "-m", str(TINY_BERT), "-l", "3e-3",
            "--data-dir", str(GLUE), "-d", "cpu", *more]  # fmt: skip
    assert run_glue.main(argv) == 0


def test_bf16_moves_the_terms_as_float32_does(tmp_path, caplog):
    """The key's bias too moved by 0.04 in bf16, and by 0.00003 in float32."""
    tables = {}
    for precision in ("fp32", "bf16"):
        with caplog.at_level("INFO", "bitfit"):
            run(tmp_path / precision, "-e", "1", "--train-size", "160", "--precision", precision)
        path = tmp_path / precision / "bias_term_changes.csv"
        tables[precision] = pd.read_csv(path, index_col="term").mean(axis=1)
    fp32, bf16 = tables["fp32"], tables["bf16"][tables["fp32"].index]
    assert list(fp32.index[fp32.isna()]) == [KEY]
    assert list(bf16.index[bf16.isna()]) == [KEY]
    assert np.allclose(fp32.dropna(), bf16.dropna(), rtol=0.01)
    message = [r.getMessage() for r in caplog.records if "gradient is zero" in r.getMessage()]
    assert len(message) == 2
    assert message[0].endswith(f"(its gradient is zero): {KEY}")


@pytest.mark.parametrize("seeds", [["0"], ["0", "1"]])
def test_kept_from_training_to_saved_files(tmp_path, seeds, capsys):
    base = load_file(TINY_BERT / "model.safetensors")
    more = ["-e", "1", "--train-size", "24", "--precision", "bf16", "--save-evaluator"]
    run(tmp_path / "out", *more, "-s", *seeds)
    folder = tmp_path / "out" / ("lr0.003_seed1" if len(seeds) > 1 else "")
    keys = {f"bert.encoder.layer.{i}.{KEY}": [[0, 128]] for i in range(3)}
    for file in ("args.json", "metrics.json", "evaluator/evaluator.json"):
        assert json.loads((folder / file).read_text())["zero_gradient"] == keys
    delta = load_file(folder / "evaluator" / "delta.safetensors")
    for name in keys:
        assert torch.equal(delta[name], base[name])
        assert not torch.equal(delta[other := name.replace("key", "query")], base[other])
    capsys.readouterr()
    assert deltas.main(["show", str(folder / "evaluator")]) == 0
    assert "key fixed: its gradient is zero" in capsys.readouterr().out
    loaded = GLUEvaluator.load(folder / "evaluator", None)
    assert loaded.terms_changes().loc[KEY].isna().all()


def test_other_methods_are_as_they_were(tmp_path):
    run(tmp_path, "-e", "1", "--train-size", "8", "-f", "full_ft")
    assert "zero_gradient" not in json.loads((tmp_path / "args.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["zero_gradient"] == {}


def test_the_key_alone(tmp_path):
    run(tmp_path, "-e", "1", "--train-size", "8", "--bias-terms", "key")
    assert (tmp_path / "bias_term_changes.csv").read_text() == f"term,1,2,3\n{KEY},,,\n"


def test_in_the_figure():
    names = (KEY, "attn.c_attn.bias")
    start = {f"m.layer.{i}.{name}": torch.zeros(6) for i in range(2) for name in names}
    fixed = {n: [[0, 6]] if n.endswith(KEY) else [[2, 4]] for n in start}
    end = {n: torch.tensor([1.0, 1, 9, 9, 2, 2]) for n in start}
    changes = bias_changes(start, end, fixed)
    assert list(changes.index) == ["attn.c_attn.bias", KEY]
    assert np.array_equal(changes, [[1.5, 1.5], [np.nan] * 2], equal_nan=True)  # 4 numbers' mean
    (text,) = bias_heatmap(changes, "a caption").axes[0].texts
    assert text.get_text() == "fixed: its gradient is zero"
    assert text.get_position() == (1.5, 0.5)  # over the row of the key, which comes first


def test_in_words(tmp_path):
    model = load_model(folder_of(tmp_path, "gpt2"), TASKS["rte"])
    parts = {f"transformer.h.{i}.attn.c_attn.bias": [[32, 64]] for i in range(2)}
    whole = {"transformer.h.0.ln_1.bias": [[0, 32]]}
    words = "64 of 192 numbers of attn.c_attn.bias, ln_1.bias"
    assert zero_gradients.format_zero_gradients(parts | whole, model) == words
