import numpy as np
import pytest
import torch
import transformers
from conftest import on_meta

from bitfit.model.bias_terms import select_components
from bitfit.model.trainable import (
    TERMS,
    bitfit_names,
    components_to_terms,
    count_trainable,
    default_mask_size,
    draw_row_column_mask,
    draw_row_or_column,
    draw_uniform_mask,
    head_names,
    in_encoder,
    is_bias,
    select_trainable,
    terms_to_components,
    trainable_table,
    trains_matrices,
    trains_only_biases,
)
from utils import UserError

HEAD = ["classifier.weight", "classifier.bias"]
POOLER = "bert.pooler.dense.bias"


def chosen_names(model, *terms):
    return set(bitfit_names(model, terms_to_components(terms)))


def encoder_count(model, names):
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return sum(sizes[n] for n in names if in_encoder(model, n))


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_one_exact_name_per_layer(bert_base, term):
    suffix = TERMS[term][0]
    expected = {f"bert.encoder.layer.{layer}.{suffix}" for layer in range(12)}
    assert chosen_names(bert_base, term) == expected | {POOLER, *HEAD}


def test_counts_for_bert_base(bert_base):
    everything = chosen_names(bert_base, "all")
    assert encoder_count(bert_base, everything) == 102_912
    assert count_trainable(bert_base, dict.fromkeys(everything)) == 104_450
    assert sum(p.numel() for n, p in bert_base.named_parameters() if in_encoder(bert_base, n)) == (
        108_310_272
    )
    assert {"bert.embeddings.LayerNorm.bias", POOLER} < everything
    assert not any(n.endswith(".weight") for n in everything - set(HEAD))
    both = chosen_names(bert_base, "query", "intermediate")
    assert encoder_count(bert_base, both - {POOLER}) == 46_080
    assert chosen_names(bert_base, *TERMS) == everything - {"bert.embeddings.LayerNorm.bias"}


def test_counts_for_roberta_base(roberta_base):
    everything = chosen_names(roberta_base, "all")
    assert encoder_count(roberta_base, everything) == 102_912 - 768  # it has no pooler here
    head = {f"classifier.{part}.{kind}" for part in ("dense", "out_proj")
            for kind in ("weight", "bias")}  # fmt: skip
    assert set(head_names(roberta_base)) == head
    assert head < everything
    assert chosen_names(roberta_base, "query") == head | {
        f"roberta.encoder.layer.{layer}.attention.self.query.bias" for layer in range(12)
    }


def test_bert_large():
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    model = on_meta(transformers.BertForSequenceClassification, config)
    assert encoder_count(model, chosen_names(model, "all")) == 272_384


def test_full_and_frozen(bert_base):
    assert list(select_trainable(bert_base, "frozen")) == HEAD
    assert list(select_trainable(bert_base, "full_ft")) == [
        n for n, _ in bert_base.named_parameters()
    ]


def small(name, **sizes):
    config = transformers.AutoConfig.for_model(name, **sizes)
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(config)


def test_models_the_project_never_heard_of():
    electra = small("electra", num_hidden_layers=2)
    names = chosen_names(electra, "query")
    assert "electra.encoder.layer.1.attention.self.query.bias" in names
    distilbert = small("distilbert", n_layers=2)
    names = chosen_names(distilbert, "all")
    biases = {n for n, _ in distilbert.named_parameters() if n.endswith(".bias")}
    assert names == biases | {"pre_classifier.weight", "classifier.weight"}


def test_a_model_without_the_bias_says_what_it_has():
    with pytest.raises(UserError, match=r"no such bias; its terms: .*ffn.lin1"):
        select_components(small("distilbert", n_layers=2), ["attention_output_2"])
    modern = small("modernbert", num_hidden_layers=2, classifier_bias=False)
    with pytest.raises(UserError, match="no biases at all"):
        select_components(modern, ["all"])
    with pytest.raises(UserError, match="unknown bias term 'bias'; known: query"):
        terms_to_components(["bias"])


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        ("deberta", {"attention.self.q_bias": 768, "attention.self.v_bias": 768}),
        ("xlnet", {f"rel_attn.r_{kind}_bias": 1024 for kind in "wrs"}),
        ("funnel", {f"0.attention.r_{kind}_bias": 768 for kind in "wrs"}),
    ],
)
def test_biases_beside_linear_modules(name, biases):
    """All biases include them; a random mask of matrices does not, though some have two axes."""
    model = small(name, **({} if name == "funnel" else {"num_hidden_layers": 2}))
    trainable = select_trainable(model, "bitfit", ["bias"])
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    for bias, size in biases.items():
        layers = [n for n in sizes if n.endswith(f".{bias}")]
        assert {sizes[n] for n in layers} == {size}
        assert set(layers) <= trainable.keys()
        assert all(n in trainable_table(model, trainable) for n in layers)
        assert not chosen_names_of_mask(model).intersection(layers)
        assert set(layers) < set(bitfit_names(model, [bias]))
    assert trains_only_biases(model, trainable)
    assert not trains_matrices(model, trainable)
    assert default_mask_size(model) == encoder_count(model, trainable)


def chosen_names_of_mask(model):
    return set(draw_row_column_mask(model, np.random.default_rng(0)))


def test_what_is_a_bias():
    """Tables that attention adds for the distance of two tokens are embeddings."""
    biases = ["output.dense.bias", "self.q_bias", "in_proj_bias", "rnn.bias_ih_l0_reverse",
              "pos_bias_u", "experts.down_proj_bias", "mixer.dt_bias"]  # fmt: skip
    others = ["relative_attention_bias.weight", "relative_attention_bias", "position_bias",
              "relative_position_bias_table", "LayerNorm.weight", "unbiased"]  # fmt: skip
    assert [name for name in biases + others if is_bias(name)] == biases


@pytest.mark.parametrize("name", ["mpnet", "mt5"])
def test_tables_of_relative_positions_are_no_biases(name):
    model = small(name, num_hidden_layers=2, num_layers=2)
    tables = [n for n, _ in model.named_parameters() if "relative_attention_bias" in n]
    assert tables
    assert not any(is_bias(n) for n in tables)


def test_uniform_mask_is_exact_and_distinct(bert_base):
    trainable = draw_uniform_mask(bert_base, 100_000, np.random.default_rng(0))
    sizes = {n: p.numel() for n, p in bert_base.named_parameters()}
    drawn = {n: p for n, p in trainable.items() if p is not None}
    assert sum(map(len, drawn.values())) == 100_000
    assert [n for n in trainable if n not in drawn] == HEAD
    for name, positions in drawn.items():
        assert (np.diff(positions) > 0).all()
        assert positions[0] >= 0
        assert positions[-1] < sizes[name]


def test_uniform_mask_is_uniform(bert_base):
    """Chi-squared over tensors: a mask that prefers some would fail far above the bound."""
    trainable = draw_uniform_mask(bert_base, 1_000_000, np.random.default_rng(1))
    encoder = {n: p.numel() for n, p in bert_base.named_parameters() if in_encoder(bert_base, n)}
    expected = np.array(list(encoder.values())) / sum(encoder.values()) * 1_000_000
    found = np.array([len(trainable.get(n, ())) for n in encoder])
    assert ((found - expected) ** 2 / expected).sum() < len(encoder) + 5 * (2 * len(encoder)) ** 0.5
    words = trainable["bert.embeddings.word_embeddings.weight"]
    halves = np.histogram(words, 4, (0, encoder["bert.embeddings.word_embeddings.weight"]))[0]
    assert halves == pytest.approx(len(words) / 4, rel=0.02)


def test_uniform_mask_can_take_all_and_no_more():
    model = small("bert", hidden_size=8, num_attention_heads=2, intermediate_size=16,
                  num_hidden_layers=1, vocab_size=20, max_position_embeddings=8)  # fmt: skip
    size = sum(p.numel() for n, p in model.named_parameters() if in_encoder(model, n))
    assert (
        count_trainable(model, draw_uniform_mask(model, size, np.random.default_rng(0)))
        == size + 18
    )
    with pytest.raises(UserError, match="the encoder has"):
        draw_uniform_mask(model, size + 1, np.random.default_rng(0))


def test_row_column_mask(bert_base):
    trainable = draw_row_column_mask(bert_base, np.random.default_rng(0))
    shapes = {n: tuple(p.shape) for n, p in bert_base.named_parameters()}
    assert (
        encoder_count(bert_base, [n for n in trainable if n.endswith("LayerNorm.weight")]) == 18_432
    )
    assert not any("embeddings" in n or n.endswith("bias") for n in trainable if n not in HEAD)
    assert "bert.pooler.dense.weight" in trainable
    for name, positions in trainable.items():
        if positions is not None:
            assert len(set(positions.tolist())) == len(positions) == shapes[name][0]
    assert count_trainable(bert_base, trainable) == 12 * 8_448 + 768 + 1_538


def test_rows_or_column():
    """A fair coin wherever there are at least as many rows as columns; a wide one: a column."""
    rng = np.random.default_rng(0)
    for rows, columns in ((5, 5), (6, 3), (8, 3)):
        took_columns = 0
        for _ in range(400):
            positions = draw_row_or_column(rows, columns, rng)
            if len(set(positions % columns)) == 1:
                took_columns += 1
                assert len(positions) == rows
            else:
                of_row = np.unique(positions // columns, return_counts=True)[1]
                assert of_row.tolist() == [columns] * (rows // columns)  # distinct and whole
        assert 140 < took_columns < 260
    assert all(len(set(draw_row_or_column(3, 6, rng) % 6)) == 1 for _ in range(20))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bert-base-cased", 100_000),
        ("google-bert/bert-base-uncased", 100_000),
        ("bert-large-cased", 280_000),
        ("FacebookAI/roberta-base", 105_000),
        ("distilbert-base-cased", 102_912),
    ],
)
def test_mask_size(bert_base, name, size, monkeypatch):
    monkeypatch.setattr(bert_base.config, "name_or_path", name)
    assert default_mask_size(bert_base) == size


def test_terms_and_components_are_each_others_inverse():
    assert components_to_terms(terms_to_components([*TERMS, "all"])) == [*TERMS, "all"]
    assert components_to_terms(["my.bias"]) == ["my"]


def test_description_counts(bert_base):
    text = trainable_table(bert_base, select_trainable(bert_base, "bitfit", ["bias"]))
    assert "bert.encoder.layer.11.output.dense.bias" in text
    assert "104,450 of 108,311,810 parameters train (0.096%)" in text
