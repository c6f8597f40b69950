"""Models beside BERT and RoBERTa, with random weights: trained, or refused in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import GLUE, TINY_BERT

import run_glue
from bitfit.model.packed_encoder import PackedEncoder
from bitfit.results.scores import read_metrics
from bitfit.tools import multi_task
from glue_evaluator import GLUEvaluator
from utils import UserError

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 160, "pad_token_id": 0,
}  # fmt: skip
CANINE = {
    "upsampling_kernel_size": 4, "downsampling_rate": 4, "num_hash_functions": 8,
    "num_hash_buckets": 64, "max_position_embeddings": 512, "vocab_size": None,
}  # fmt: skip


def folder_of(path, name, padding_side="right", **more):
    """A model folder with BERT's toy tokenizer; of a size that is None the config has its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_BERT, padding_side=padding_side)
    sizes = {"vocab_size": len(tokenizer)} | SIZES | more
    sizes = {key: size for key, size in sizes.items() if size is not None}
    config = transformers.AutoConfig.for_model(name, **sizes)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(tmp_path, model, *more):
    argv = ["-o", str(tmp_path / "out"), "-t", "rte", "-f", "bitfit", "-m", model, "-e", "1",
            "--data-dir", str(GLUE), "--train-size", "16", "-d", "cpu", *more]  # fmt: skip
    return run_glue.main(argv)


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("layoutlm", {}, "2 runs in one pass"),  # these two make their own mask from (B, T)
        ("esm", {"mask_token_id": 4}, "2 runs in one pass"),
        (
            "deberta-v2",
            {"pos_att_type": ["c2p", "p2c"], "relative_attention": True},
            "2 runs one after the other: this model",
        ),
        ("canine", CANINE, "2 runs one after the other: canine.chars_to_molecules.conv.bias"),
        ("electra", {"embedding_size": 32}, "2 runs in one pass"),
    ],
)
def test_trained(tmp_path, name, more, message, caplog):
    """Each leaves its pictures too: CANINE has several layers of one number."""
    with caplog.at_level("INFO", "bitfit"):
        assert run(tmp_path, folder_of(tmp_path / "model", name, **more), "-s", "0", "1") == 0
    assert message in caplog.text
    assert len(list(tmp_path.glob("out/*/bias_term_changes.png"))) == 2


REFUSED = {
    "xmod": ({"languages": ["en_XX", "de_DE"]}, "ValueError: Input language unknown"),
    "nystromformer": (
        {"num_landmarks": 8, "segment_means_seq_len": 64},
        "RuntimeError: shape '[-1, 2, 8, 8, 16]' is invalid",
    ),
    "reformer": (  # in training alone
        {"axial_pos_shape": [16, 8], "axial_pos_embds_dim": [16, 16], "is_decoder": False},
        "ValueError: If training, make sure that config.axial_pos_shape factors",
    ),
    "modernbert": ({}, "no biases at all, so bitfit cannot train it"),
}


def test_what_cannot_compute_in_bf16_is_refused_before_training(tmp_path, capsys):
    """FNet's Fourier transform cannot; in float32 it trains."""
    model = folder_of(tmp_path / "model", "fnet")
    assert run(tmp_path, model, "--precision", "bf16") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cannot compute in bf16: RuntimeError: Unsupported dtype BFloat16" in last
    assert last.endswith("give --precision fp32")
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, model) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_its_own_words(tmp_path, name, capsys):
    more, words = REFUSED[name]
    assert run(tmp_path, folder_of(tmp_path / "model", name, **more)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_glue.py: error: ")
    assert words in last
    assert not (tmp_path / "out").exists()


NO_DROPOUT = {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip
QWEN2 = {"num_key_value_heads": 2, "initializer_range": 0.2}
GPT2 = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
XLNET = {
    "d_inner": 64, "d_head": 16, "max_position_embeddings": None, "dropout": 0.0,
    "initializer_range": 0.2,
}  # fmt: skip
BATCHED = {  # name -> model type, padding side, config, how its rows share a pass
    "bert": ("bert", "left", NO_DROPOUT, "packed"),
    "xlnet": ("xlnet", "left", XLNET, "padded"),
    "xlnet padded right": ("xlnet", "right", XLNET, "equal length"),
    "qwen2 padded left": ("qwen2", "left", QWEN2, "padded"),
    "qwen2 of another padding token": ("qwen2", "right", QWEN2 | {"pad_token_id": 1}, "padded"),
    "qwen2 without padding token": ("qwen2", "right", QWEN2 | {"pad_token_id": None}, "padded"),
    "gpt2 of another padding token": ("gpt2", "right", GPT2 | {"pad_token_id": 1}, "padded"),
    "gpt2 padded left": ("gpt2", "left", GPT2, "equal length"),
    "fnet": ("fnet", "right", NO_DROPOUT, "equal length"),
    "convbert": ("convbert", "right", NO_DROPOUT | {"embedding_size": 32}, "equal length"),
    "deberta": ("deberta", "right", NO_DROPOUT, "padded"),
}  # fmt: skip


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    """A data folder with 16 rows to train on and 24 to score."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "RTE").mkdir()
    for name, count in (("train.tsv", 16), ("dev.tsv", 24)):
        lines = (GLUE / "RTE" / name).read_text(encoding="utf-8").splitlines()[: 1 + count]
        (folder / "RTE" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def prepared(model, data, seeds, max_tokens=None):
    evaluator = GLUEvaluator("rte", model, None, seeds, data, max_tokens=max_tokens)
    evaluator.preprocess_dataset("longest", 128, 8, train_size=16)
    evaluator.training_preparation(1e-3, "adamw", False, ["bias"], verbose=False)
    return evaluator


@pytest.mark.parametrize("case", BATCHED)
def test_a_rows_logits_do_not_depend_on_the_batch(tmp_path, few_rows, case):
    """In training, scoring, a loaded evaluator and many answers: passes of one row, and of many.

    Those of one row are transformers' own, without padding.
    """
    name, side, more, kind = BATCHED[case]
    model, logits = folder_of(tmp_path / "model", name, side, **more), []
    losses = []
    for cap in (1, 2048):
        evaluator = prepared(model, few_rows, 0, cap)
        assert evaluator.prepared.forward.batching_kind == kind
        evaluator.train_and_evaluate(1)
        losses += evaluator.record.train_loss
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    evaluator.save(tmp_path / "evaluator")
    loaded = GLUEvaluator.load(tmp_path / "evaluator", None)
    for cap in (1, 2048):
        loaded.prepared.token_budget.max_tokens = cap
        logits.append(loaded.predict("validation"))
    bound = 1e-3 * logits[0].std(0).max()
    assert np.abs(logits[0] - logits[1]).max() < bound
    tokens = loaded.tokens("validation")
    with torch.no_grad():
        for row in range(4):
            span = slice(tokens.starts[row], tokens.starts[row] + tokens.lengths[row])
            inputs = {"input_ids": tokens.ids[None, span].long()}
            if tokens.types is not None:
                inputs["token_type_ids"] = tokens.types[None, span].long()
            plain = loaded.model(**inputs).logits[0].numpy()
            assert np.abs(logits[1][row] - plain).max() < bound

    many = multi_task.load_predictor(
        multi_task.read_evaluators([tmp_path / "evaluator"]), torch.device("cpu")
    )
    rows = [("a film", "good"), ("a small film is good, and long", "it is bad"), ("no", "no")]
    with many.stack.patched():
        alone = [multi_task.predict_logits(many, [row])[0][0] for row in rows]
        assert np.abs(multi_task.predict_logits(many, rows)[0] - alone).max() < bound


@pytest.mark.parametrize("case", ["xlnet", "deberta", "fnet"])
def test_several_runs_give_what_each_gives_alone(tmp_path, few_rows, case):
    """One after the other, or in one pass of rows of equal length."""
    name, side, more, kind = BATCHED[case]
    model = folder_of(tmp_path / "model", name, side, **more)
    alone = [prepared(model, few_rows, seed) for seed in (0, 1)]
    for evaluator in alone:
        evaluator.train_and_evaluate(1)
    evaluator = prepared(model, few_rows, [0, 1])
    assert len(evaluator.passes()) == (1 if name == "fnet" else 2)
    assert run(tmp_path, model, "-s", "0", "1", "--data-dir", str(few_rows)) == 0
    assert json.loads((tmp_path / "out" / "args.json").read_text())["rows"] == kind
    for seed, evaluator in enumerate(alone):
        (folder,) = (tmp_path / "out").glob(f"lr*_seed{seed}")
        losses = read_metrics(folder)[0]["train_loss"]
        assert losses == pytest.approx(evaluator.record.train_loss, rel=1e-4)


def test_an_exception_while_packing_is_named(tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise TypeError("no such kernel")

    monkeypatch.setattr(PackedEncoder, "__call__", broken)
    with caplog.at_level("INFO", "bitfit"):
        assert run(tmp_path, str(TINY_BERT)) == 0
    assert "examples are padded (packed rows raise TypeError: no such kernel)" in caplog.text
    assert json.loads((tmp_path / "out" / "args.json").read_text())["rows"] == "padded"


def test_pairs_for_a_model_of_one_token_type_are_refused(tmp_path, capsys):
    assert run(tmp_path, folder_of(tmp_path / "model", "bert", type_vocab_size=1)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "an example has token type 1, but the model" in last
    assert "has embeddings for 1 (type_vocab_size in config.json), from 0" in last
    assert not (tmp_path / "out").exists()


BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "bos_token_id": 2,
    "eos_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads")),
}  # fmt: skip


def test_a_text_with_the_token_for_its_end_is_refused(tmp_path, few_rows, capsys):
    """BART reads the last of them and wants as many in each row of a batch."""
    model = folder_of(tmp_path / "model", "bart", **BART)
    assert run(tmp_path, model, "--data-dir", str(few_rows), "--save-evaluator") == 0
    many = multi_task.load_predictor(
        multi_task.read_evaluators([tmp_path / "out" / "evaluator"]), torch.device("cpu")
    )
    with many.stack.patched(torch.float32):
        assert len(multi_task.predict_logits(many, [("a film", "a cat")] * 2)[0]) == 2
        with pytest.raises(UserError, match="a text contains the end token, 3"):
            multi_task.predict_logits(many, [("a film", "a cat"), ("a film", "a [SEP] cat")])
    data = shutil.copytree(few_rows, tmp_path / "data")
    lines = (data / "RTE" / "dev.tsv").read_text().splitlines()
    lines[2] = lines[2].replace(" ", " [SEP] ", 1)
    (data / "RTE" / "dev.tsv").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert run(tmp_path, model, "--data-dir", str(data), "-o", str(tmp_path / "other")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "a text contains the end token, 3 (3 in one example, 2 in another)" in last
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("setting", ["return_dict", "gradient_checkpointing", "torchscript"])
def test_settings_that_change_no_logit(tmp_path, few_rows, setting):
    """As in folders that were saved for TorchScript, or by a training that saved memory."""
    model = folder_of(tmp_path / "model", "bert", **NO_DROPOUT)
    evaluators = [prepared(model, few_rows, 0)]
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {setting: setting != "return_dict"}
    path.write_text(json.dumps(config))
    evaluators.append(prepared(model, few_rows, 0))
    for evaluator in evaluators:
        evaluator.train_and_evaluate(1)
    first, second = (evaluator.predict("validation") for evaluator in evaluators)
    np.testing.assert_array_equal(first, second)


def test_a_model_that_reads_no_text_gets_a_warning(tmp_path, few_rows, caplog):
    """The first token of a decoder sees no other."""
    for is_decoder in (False, True):
        caplog.clear()
        model = folder_of(tmp_path / "model", "bert", is_decoder=is_decoder)
        prepared(model, few_rows, 0)
        assert ("has the same logits for all texts" in caplog.text) == is_decoder


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused(tmp_path, monkeypatch, capsys):
    """In one line, before anything is written."""
    from transformers.models.bert.modeling_bert import BertPooler

    plain = BertPooler.forward
    mixed = lambda pooler, x: (y := plain(pooler, x)) + y.mean(0)  # noqa: E731
    monkeypatch.setattr(BertPooler, "forward", mixed)
    assert run(tmp_path, str(TINY_BERT)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "gives a row other logits in a batch than alone (packed rows give other logits" in last
    assert "equal length rows give other logits); give another --model-name" in last
    assert not (tmp_path / "out").exists()


def test_biases_beside_linear_modules_train(tmp_path, capsys):
    """DeBERTa's query and value biases: listed, in the figure's table, and changed."""
    model = folder_of(tmp_path / "model", "deberta")
    assert run(tmp_path, model, "--verbose", "--save-evaluator") == 0
    printed, name = capsys.readouterr().out, "deberta.encoder.layer.1.attention.self.q_bias"
    assert name in printed
    table = (tmp_path / "out" / "bias_term_changes.csv").read_text()
    assert "\nattention.self.v_bias," in table
    loaded = GLUEvaluator.load(tmp_path / "out" / "evaluator", None)
    assert loaded.model.get_parameter(name).abs().max() > 1e-4  # it was 0
