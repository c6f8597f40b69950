import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bitfit.data import evaluation_batches, gather_rows, micro_batches, tokenize
from bitfit.sources import Texts
from utils import UserError

TEXTS = Texts((["a", "a b c d", "", "a b"], ["c", "", "", "d e"]), np.array([0, 1, 0, 1]))


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1], [2], [1, 1, 0]])
def test_a_gather_is_what_the_tokenizer_pads(tokenizer, rows):
    tokens = tokenize(TEXTS, tokenizer, 128)
    inputs = gather_rows(tokens, np.array(rows))
    picked = TEXTS.take(rows)
    expected = tokenizer(*picked.columns, padding="longest", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["token_type_ids"], expected["token_type_ids"])
    mask = inputs["attention_mask"]
    assert expected["attention_mask"].all() if mask is None else torch.equal(
        mask.long(), expected["attention_mask"]
    )  # fmt: skip


def test_long_rows_are_cut_as_the_tokenizer_cuts_them(tokenizer):
    texts = Texts((["a b c d e f g"], ["h"]), None)
    inputs = gather_rows(tokenize(texts, tokenizer, 8), np.array([0]))
    expected = tokenizer("a b c d e f g", "h", truncation=True, max_length=8)
    assert inputs["input_ids"][0].tolist() == expected["input_ids"]


def test_no_room_for_text(tokenizer):
    with pytest.raises(UserError, match=r"--max-seq-length 3 leaves no room .* adds 3 special"):
        tokenize(TEXTS, tokenizer, 3)


def cost(lengths, parts, overhead):
    return sum(len(part) * lengths[part].max() + overhead for part in parts)


def cheapest(lengths, overhead, max_tokens):
    """The least cost over all ways to cut the sorted rows, tried one by one."""
    ordered = np.sort(lengths)
    best = np.inf
    for cuts in range(2 ** (len(ordered) - 1)):
        ends = [i + 1 for i in range(len(ordered) - 1) if cuts >> i & 1] + [len(ordered)]
        parts = np.split(np.arange(len(ordered)), ends[:-1])
        if all(len(p) == 1 or len(p) * ordered[p].max() <= max_tokens for p in parts):
            best = min(best, cost(ordered, parts, overhead))
    return best


@pytest.mark.parametrize("overhead", [0, 5, 20, 1000])
@pytest.mark.parametrize("max_tokens", [40, 10_000])
def test_micro_batches_cost_least(overhead, max_tokens):
    rng = np.random.default_rng(overhead)
    for size in (1, 2, 5, 9):
        lengths = rng.integers(1, 60, size)
        parts = micro_batches(lengths, overhead, max_tokens)
        assert sorted(np.concatenate(parts)) == list(range(size))
        assert all(len(p) == 1 or len(p) * lengths[p].max() <= max_tokens for p in parts)
        assert cost(lengths, parts, overhead) == cheapest(lengths, overhead, max_tokens)


def test_evaluation_batches_hold_each_row_once():
    lengths = np.random.default_rng(0).integers(1, 128, 500)
    parts = list(evaluation_batches(lengths, 512))
    assert sorted(np.concatenate(parts)) == list(range(500))
    assert all(len(p) * lengths[p].max() <= 512 for p in parts)
    assert [len(p) for p in evaluation_batches(np.array([900, 3]), 512)] == [1, 1]
