"""Models beside BERT and RoBERTa, with random weights: trained, or refused in one line."""

import pytest
import torch
import transformers
from conftest import GLUE, TINY_BERT

import run_glue

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 160, "pad_token_id": 0,
}  # fmt: skip
CANINE = {
    "upsampling_kernel_size": 4, "downsampling_rate": 4, "num_hash_functions": 8,
    "num_hash_buckets": 64, "max_position_embeddings": 512,
}  # fmt: skip


def folder_of(path, name, **more):
    """A model folder with BERT's toy tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_BERT)
    sizes = {"vocab_size": len(tokenizer)} | SIZES | more
    if name == "canine":
        del sizes["vocab_size"]
    config = transformers.AutoConfig.for_model(name, **sizes)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(tmp_path, model, *more):
    argv = ["-o", str(tmp_path / "out"), "-t", "rte", "-f", "bitfit", "-m", model, "-e", "1",
            "--data-dir", str(GLUE), "--train-size", "16", "-d", "cpu", *more]  # fmt: skip
    return run_glue.main(argv)


@pytest.mark.parametrize(
    ("name", "more", "said"),
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
def test_trained(tmp_path, name, more, said, caplog):
    """Each leaves its pictures too: CANINE has several layers of one number."""
    with caplog.at_level("INFO", "bitfit"):
        assert run(tmp_path, folder_of(tmp_path / "model", name, **more), "-s", "0", "1") == 0
    assert said in caplog.text
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
