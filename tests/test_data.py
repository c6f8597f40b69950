import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bitfit.data.splits import TextColumns
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Dataset, concatenate, tokenize
from bitfit.model.batching import (
    buffer_views,
    gather_inputs,
    list_arrays,
    make_batch,
    pack_into_buffer,
    replace_arrays,
    split_into_micro_batches,
    to_device,
)
from utils import UserError

TEXTS = TextColumns((["a", "a b c d", "", "a b"], ["c", "", "", "d e"]), np.array([0, 1, 0, 1]))


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def inputs_of(tokens, rows, packed=False):
    return gather_inputs(tokens, to_device(make_batch(tokens, np.array(rows), packed), "cpu"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1], [2], [1, 1, 0]])
def test_a_gather_is_what_the_tokenizer_pads(tokenizer, rows, side):
    tokenizer.padding_side = side
    tokens = tokenize(TEXTS, tokenizer, 128)
    inputs = inputs_of(tokens, rows)
    picked = TEXTS.take(rows)
    expected = tokenizer(*picked.columns, padding="longest", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["token_type_ids"], expected["token_type_ids"])
    mask = inputs.get("attention_mask")
    assert expected["attention_mask"].all() if mask is None else torch.equal(
        mask.long(), expected["attention_mask"]
    )  # fmt: skip


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1], [2], [1, 1, 0]])
def test_packed_rows_are_what_the_tokenizer_gives_one_after_the_other(tokenizer, rows):
    inputs = inputs_of(tokenize(TEXTS, tokenizer, 128), rows, packed=True)
    expected = tokenizer(*TEXTS.take(rows).columns)
    for name in ("input_ids", "token_type_ids"):
        assert inputs[name].tolist() == [[i for row in expected[name] for i in row]]
    assert "attention_mask" not in inputs


def test_long_rows_are_cut_as_the_tokenizer_cuts_them(tokenizer):
    texts = TextColumns((["a b c d e f g"], ["h"]), None)
    inputs = inputs_of(tokenize(texts, tokenizer, 8), [0])
    expected = tokenizer("a b c d e f g", "h", truncation=True, max_length=8)
    assert inputs["input_ids"][0].tolist() == expected["input_ids"]


def test_no_room_for_text(tokenizer):
    with pytest.raises(UserError, match=r"--max-seq-length 3 leaves no room .* adds 3 special"):
        tokenize(TEXTS, tokenizer, 3)


def test_a_blank_text_for_a_tokenizer_that_adds_no_tokens(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    assert tokenize(TextColumns((["", "a"], ["b", ""]), None), tokenizer, 8).lengths.tolist() == [
        1,
        1,
    ]
    with pytest.raises(UserError, match="the text of example 2 has no tokens, not"):
        tokenize(TextColumns((["a", " ", "b"],), None), tokenizer, 8)


def data_of(tokenizer, splits, monkeypatch, train_size=None, seeds=(0,)):
    """A `Dataset` of MNLI whose splits hold these pairs; others are not there."""
    texts = {
        name: TextColumns(
            tuple(map(list, zip(*rows, strict=True))),
            None if "test" in name else np.zeros(len(rows), np.int64),
        )
        for name, rows in splits.items()
    }
    monkeypatch.setattr("bitfit.data.tokens.find_split", lambda task, name, folder: texts.get(name))
    data = Dataset(TASKS["mnli"], None, tokenizer, 32, seeds, train_size, torch.device("cpu"))
    for name in ("train", "validation_matched", "validation_mismatched", "test_matched", "ax"):
        data.has_split(name)
    data.report_overlap()


def test_training_rows_that_occur_elsewhere_are_counted(tokenizer, monkeypatch, caplog):
    """A row is both of its texts, in their order; a row that is there twice counts twice."""
    caplog.set_level("INFO")
    train = [("a", "b"), ("c", "d"), ("c", "d"), ("ab", "")]
    splits = {
        "train": train,
        "validation_matched": [("c", "d"), ("b", "a"), ("a", "c")],
        "validation_mismatched": [("", "ab"), ("A", "b")],
        "test_matched": [("a", "b"), ("a", "b"), ("c", "d"), ("ab", "")],
    }
    data_of(tokenizer, splits, monkeypatch)
    message = (
        "of 4 training examples 2 also occur in validation_matched, 4 also occur in test_matched"
    )
    assert caplog.messages == [message]
    caplog.clear()
    data_of(tokenizer, splits | {"train": [("b", "b")]}, monkeypatch)
    others = "validation_matched or validation_mismatched or test_matched"
    assert caplog.messages == [f"no training example occurs in {others}"]
    caplog.clear()
    drawn = {"train": [("a", str(i)) for i in range(50)], "validation_matched": [("a", "7")]}
    data_of(tokenizer, drawn, monkeypatch, train_size=50, seeds=(0, 1))
    assert caplog.messages == ["of 50 training examples 1 also occur in validation_matched"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cap", [1, 60, 200, 512, 10**9])
def test_passes_hold_each_row_once_and_no_more_tokens_than_allowed(packed, cap):
    lengths = np.random.default_rng(0).integers(1, 128, 500)
    parts = split_into_micro_batches(lengths, cap, packed)
    assert sorted(np.concatenate(parts)) == list(range(500))
    for part in parts:
        tokens = lengths[part].sum() if packed else len(part) * lengths[part].max()
        assert tokens <= cap or len(part) == 1
    if packed:  # in their order, and of like size
        assert np.array_equal(np.concatenate(parts), np.arange(500))
        sizes = [lengths[part].sum() for part in parts[:-1]] or [0]
        assert max(sizes) - min(sizes) <= 127 or cap < 127


def test_concatenated_rows_are_the_rows_of_each(tokenizer):
    parts = [tokenize(TEXTS, tokenizer, 128), tokenize(TEXTS.take([3, 1]), tokenizer, 128)]
    inputs, expected = (inputs_of(t, rows) for t, rows in (
        (concatenate(parts), [4, 2, 5]), (parts[0], [3, 2, 1])))  # fmt: skip
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cap", [1, 60, 512])
def test_rows_of_equal_length_alone_share_a_batch(cap):
    lengths = np.random.default_rng(0).integers(1, 32, 500)
    parts = split_into_micro_batches(lengths, cap, False, equal_length=True)
    assert sorted(np.concatenate(parts)) == list(range(500))
    assert all(len(set(lengths[part])) == 1 for part in parts)
    assert all(lengths[part].sum() <= cap or len(part) == 1 for part in parts)
    fewest = sum(-(-np.sum(lengths == n) // max(1, cap // n)) for n in set(lengths))
    assert len(parts) == fewest


def test_padded_batches_hold_each_row_once():
    lengths = np.random.default_rng(0).integers(1, 128, 500)
    parts = split_into_micro_batches(lengths, 512, packed=False)
    assert sorted(np.concatenate(parts)) == list(range(500))
    assert all(len(p) * lengths[p].max() <= 512 for p in parts)
    two = split_into_micro_batches(np.array([900, 3]), 512, packed=False)
    assert [p.tolist() for p in two] == [[0], [1]]


def test_one_buffer_holds_all_arrays_of_a_step():
    rng = np.random.default_rng(0)
    step = (
        rng.normal(size=(3, 5)).astype(np.float32), [np.arange(7), None, 4], np.array(2.5),
        rng.random((2, 3)) < 0.5, np.empty((0, 2), np.int32), np.arange(5, dtype=np.int32),
    )  # fmt: skip
    arrays = list_arrays(step)
    buffer = pack_into_buffer(arrays, pin=False)
    assert buffer.dtype == torch.uint8 and len(buffer) < sum(a.nbytes + 16 for a in arrays)
    moved, plain = replace_arrays(step, buffer_views(buffer, arrays)), to_device(step, "cpu")
    pairs = list(zip(tensors_of(moved), tensors_of(plain), strict=True))
    assert len(pairs) == 6
    for copied, expected in pairs:
        assert copied.dtype == expected.dtype and torch.equal(copied, expected)
        assert not copied.numel() or 0 <= copied.data_ptr() - buffer.data_ptr() < len(buffer)
    assert moved[1][1:] == [None, 4]


def tensors_of(value):
    if torch.is_tensor(value):
        return [value]
    inside = value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in inside for tensor in tensors_of(item)]
