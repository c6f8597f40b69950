"""Tokenizers that do not fit their model, and what is corrected in them."""

import json

import predict
import pytest
import torch
import transformers
from conftest import GLUE
from model_folders import WORDS, change, set_json
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from bitfit.data.splits import TextColumns
from bitfit.data.tokens import Split, tokenize
from bitfit.model import loading, tokenizer_checks
from glue_evaluator import GLUEvaluator
from utils import UserError


def save_qwen2(folder):
    """Save a Qwen2 beside the tiny BERT's tokenizer, without an embedding of `<|endoftext|>`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=345, num_key_value_heads=2, intermediate_size=64, pad_token_id=0, **sizes
    )
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(folder)


def set_tokenizer(folder, **parts):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def test_a_tokenizer_file_that_transformers_reads_otherwise(folder, caplog):
    """Its class takes the vocabulary alone: here numbers are no longer read digit by digit."""
    loading.load_tokenizer(folder)
    assert not caplog.records
    steps = [{"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}]
    set_tokenizer(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert loading.load_tokenizer(folder).tokenize("20") == ["2", "##0"]
    (record,) = caplog.records
    assert "BertTokenizer takes the vocabulary alone from tokenizer.json" in record.getMessage()
    caplog.clear()
    set_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert loading.load_tokenizer(folder).tokenize("20") == ["2", "0"]
    assert not caplog.records


def test_a_token_that_only_the_class_adds_is_no_fault(folder):
    """Qwen2's adds `<|endoftext|>`, which no text of the task holds."""
    save_qwen2(folder)
    tokenizer = loading.load_tokenizer(folder)
    assert max(tokenizer.get_vocab().values()) == 345
    tokenizer.save_pretrained(folder)  # as with an exported model
    loading.load_tokenizer(folder)


def test_a_token_beyond_the_embeddings_is_refused_in_later_texts(folder, tmp_path, capsys):
    save_qwen2(folder)
    evaluator = GLUEvaluator("cola", str(folder), None, 0, GLUE)
    evaluator.preprocess_dataset("longest", 32, 8, train_size=16)
    evaluator.prepare("frozen", 1e-3, verbose=False)
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path / "evaluator")
    text = TextColumns((["film <|endoftext|>"],), None)
    tokens = tokenize(text, evaluator.loaded.tokenizer, 32)
    evaluator.loaded.dataset.splits["test"] = Split(tokens, {})
    message = f"a text has token 345, but the model {folder} has embeddings for 345"
    with pytest.raises(UserError, match=message):
        evaluator.predict("test")
    (tmp_path / "texts.txt").write_text(f"{text.columns[0][0]}\n")
    words = [str(tmp_path / "evaluator"), "--input", str(tmp_path / "texts.txt")]
    assert predict.main(words) == 2
    assert message in capsys.readouterr().err


SMALL = list("abcdefghijklmnopqrstuvwxyz")

CAPITALS = [letter.upper() for letter in SMALL]


@pytest.mark.parametrize(
    ("letters", "lower", "message"),
    [
        (SMALL + CAPITALS, None, "lower-cases all texts, but 26 tokens of its vocabulary have"),
        (SMALL + CAPITALS, True, "lower-cases all texts"),
        (SMALL + CAPITALS, False, None),
        (SMALL, None, None),
        (SMALL, True, None),
        (SMALL, False, "keeps capitals, but no token of its vocabulary has any"),
    ],
)
def test_a_vocabulary_and_its_lower_casing(folder, caplog, letters, lower, message):
    """Without tokenizer_config.json BERT's tokenizer lower-cases, as bert-base-cased must not."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"w{i}" for i in range(285))]
    (folder / "vocab.txt").write_text("\n".join(words))
    if lower is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    tokenizer = loading.load_tokenizer(folder)
    assert tokenizer.tokenize("a") == ["a"]
    text = [r.getMessage() for r in caplog.records]
    assert len(text) == (message is not None)
    assert message is None or message in text[0]


def test_a_vocabulary_of_bytes_has_no_capitals_for_its_spaces(tmp_path, caplog):
    bpe = ByteLevelBPETokenizer(lowercase=True)
    words = [a + b + c for a in "abcdefghij" for b in "klmnopqrst" for c in "abcdefghijklmnopqrst"]
    bpe.train_from_iterator([" ".join(words)] * 9, 1600, special_tokens=["<pad>"])
    assert bpe.get_vocab_size() == 1600
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>"
    )
    tokens = tokenizer.get_vocab()
    assert sum("\u0120" in token for token in tokens) > 50
    tokenizer_checks.warn_of_case(tokenizer, tokens, tmp_path)
    assert not caplog.records


def test_the_generic_class_keeps_the_token_types_of_pairs(folder, tmp_path):
    """As before transformers 5, unless a model has no embeddings for them or a file says so."""
    expected = loading.load_tokenizer(folder)("a film", "a cat")
    assert 1 in expected["token_type_ids"]
    set_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = loading.load_tokenizer(folder)
    assert dict(tokenizer("a film", "a cat")) == dict(expected)
    tokenizer.save_pretrained(tmp_path / "exported")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert dict(exported("a film", "a cat")) == dict(expected)
    set_json(folder, type_vocab_size=1)
    assert "token_type_ids" not in loading.load_tokenizer(folder)("a film", "a cat")
    set_json(folder, type_vocab_size=2)
    set_json(folder, "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    assert "token_type_ids" not in loading.load_tokenizer(folder)("a film", "a cat")


def test_a_much_smaller_vocabulary_than_the_embeddings(folder, caplog):
    change(folder, lambda t: t | {WORDS: torch.randn(400, 128)})
    set_json(folder, vocab_size=400)
    loading.load_tokenizer(folder)
    (message,) = (r.getMessage() for r in caplog.records)
    assert "has 345 tokens, and the model embeddings for 400" in message
