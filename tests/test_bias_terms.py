"""Biases that the config switches on, and the names of bias terms: no training."""

import shlex

import pytest
import torch
import transformers
from conftest import TINY_BERT
from documentation import plain
from modern_encoders import classifier

import run_glue
from bitfit.model.bias_terms import add_biases, select_components
from bitfit.model.trainable import encoder_biases
from utils import UserError

MODERNBERT = ["norm_bias", "attention_bias", "mlp_bias"]
SWITCHES = {  # model type, config: the switches that add biases to its encoder
    "modernbert": ("modernbert", {}, MODERNBERT),
    "modernbert with some": ("modernbert", {"norm_bias": True}, MODERNBERT[1:]),
    "eurobert": ("eurobert", {}, ["attention_bias", "mlp_bias"]),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 2}, ["attention_bias"]),
    "falcon": ("falcon", {}, ["bias"]),
}


def logits(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 345, (3, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("case", SWITCHES)
def test_added_biases_are_zeros_and_the_config_has_them(case, tmp_path):
    """The logits stay exactly equal, and transformers loads the model with no missing weight."""
    kind, more, switches = SWITCHES[case]
    model = classifier(kind, **more)
    for parameter in model.parameters():  # norms too: their gains are 1 in a new model
        torch.nn.init.normal_(parameter, 0.2 * (parameter.dim() == 1), 0.2)
    before, names = logits(model), {name for name, _ in model.named_parameters()}
    config = model.config.to_dict()
    add_biases(model)
    added = {n: p for n, p in model.named_parameters() if n not in names}
    changed = {name for name, value in model.config.to_dict().items() if config[name] != value}
    assert changed == set(switches)
    assert added
    assert all(name.endswith(".bias") and not bias.any() for name, bias in added.items())
    assert torch.equal(logits(model), before)

    for bias in added.values():
        torch.nn.init.normal_(bias, 0, 0.2)
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert torch.equal(logits(loaded.eval()), after)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("bert", {}, "the config of this bert model cannot add biases: leave it out"),
        ("modernbert", dict.fromkeys(MODERNBERT, True), "the config of this modernbert model"),
        ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
         "the config of this t5 model cannot add biases: give another model"),
    ],
)  # fmt: skip
def test_a_config_without_a_switch(kind, more, message):
    with pytest.raises(UserError, match=f"--add-biases: {message}"):
        add_biases(classifier(kind, **more))


def with_biases(kind):
    model = classifier(kind)
    add_biases(model)
    return model


SELECTED = {  # model type, term: relative names without `.bias`, or words of the error message
    ("modernbert", "intermediate"): ["mlp.Wi"],
    ("modernbert", "attention_output"): ["attn.Wo"],
    ("modernbert", "output"): ["mlp.Wo"],
    ("modernbert", "Wqkv"): ["attn.Wqkv"],
    ("modernbert", "Wo"): ["attn.Wo", "mlp.Wo"],
    ("modernbert", "mlp.Wo"): ["mlp.Wo"],
    ("modernbert", "attn_norm"): ["attn_norm"],
    ("modernbert", "norm"): ["embeddings.norm"],
    ("modernbert", "final_norm"): ["final_norm"],
    ("eurobert", "value"): ["self_attn.v_proj"],
    ("eurobert", "intermediate"): ["mlp.gate_proj", "mlp.up_proj"],
    ("bert", "query"): ["attention.self.query"],
    ("bert", "output"): ["output.dense"],
    ("bert", "attention.self.key"): ["attention.self.key"],
    ("bert", "pooler.dense"): ["pooler.dense"],
    ("albert", "query"): ["albert_layers.0.attention.query"],
    ("distilbert", "attention_layernorm"): ["sa_layer_norm"],
}
PAPER = r"attention_output \(attn.Wo\), intermediate \(mlp.Wi\), output \(mlp.Wo\)"
UNKNOWN = {
    ("modernbert", "query"): f"of the paper's names apply: {PAPER}$",
    ("modernbert", "attention_layernorm"): "--bias-terms attention_layernorm: this modernbert",
    ("modernbert", "qkv"): "its terms: embeddings.norm, attn.Wqkv, attn.Wo, mlp_norm, mlp.Wi",
    ("bert", "v_proj"): "this bert model has no such bias; its terms: embeddings.LayerNorm, query",
}


def biases_of(kind):
    return with_biases(kind) if kind in ("modernbert", "eurobert") else classifier(kind)


@pytest.mark.parametrize(("kind", "term"), SELECTED)
def test_a_term_selects_the_biases_of_its_modules(kind, term, caplog):
    model = biases_of(kind)
    names = [f"{name}.bias" for name in SELECTED[kind, term]]
    with caplog.at_level("INFO", "bitfit"):
        assert select_components(model, [term], report=True) == tuple(names)
    found = [name for name, kind in encoder_biases(model).items() if kind in names]
    size = sum(model.get_parameter(name).numel() for name in found)
    assert f"{', '.join(names)} ({len(found)} tensors, {size:,} parameters)" in caplog.text


@pytest.mark.parametrize(("kind", "term"), UNKNOWN)
def test_a_term_that_does_not_apply(kind, term):
    with pytest.raises(UserError, match=UNKNOWN[kind, term]):
        select_components(biases_of(kind), [term])


def test_all_terms_and_relative_names():
    model = with_biases("modernbert")
    assert select_components(model, ["all"]) == select_components(model, ["bias"]) == ("bias",)
    assert select_components(model, ["mlp.Wi.bias", "intermediate"]) == ("mlp.Wi.bias",)
    with pytest.raises(UserError, match=r"--add-biases adds them \(norm_bias, attention_bias, mlp"):
        select_components(classifier("modernbert"), ["all"])


def listing(*words):
    try:
        return run_glue.main(["--list-bias-terms", *map(str, words)])
    except SystemExit as stop:
        return stop.code


def test_list_bias_terms(modern, capsys):
    (command,) = (line for line in plain("python run_glue.py ") if "--list-bias-terms" in line)
    command = command.replace("answerdotai/ModernBERT-base", str(modern["modernbert"]))
    assert run_glue.main(shlex.split(command)[2:]) == 0
    shown = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in shown.out.splitlines()}
    assert rows["mlp.Wi"] == ["intermediate", "2", "256", "model.layers.0.mlp.Wi.bias"]
    assert rows["attn.Wqkv"] == ["-", "2", "192", "model.layers.0.attn.Wqkv.bias"]
    assert rows["attn_norm"] == ["-", "1", "32", "model.layers.1.attn_norm.bias"]
    assert rows["all"] == ["-", "13", "736", "-"]
    assert shown.err == ""
    assert listing("-m", TINY_BERT) == 0
    rows = capsys.readouterr().out.splitlines()
    query = "bert.encoder.layer.0.attention.self.query.bias"
    assert rows[2].split() == ["query", "query", "3", "384", query]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "{modernbert}"], "has no biases at all, so bitfit cannot train it: --add-biases"),
        (["-m", str(TINY_BERT), "--add-biases"], "this bert model cannot add biases"),
        (["-m", "./nowhere"], "there is no model folder ./nowhere"),
        (["--add-bias"], "unknown flag --add-bias: did you mean --add-biases?"),
    ],
)
def test_a_listing_that_cannot_be(words, message, modern, capsys):
    assert listing(*(word.format(**modern) for word in words)) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
