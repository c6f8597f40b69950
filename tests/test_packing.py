"""Packed rows beside the plain model: attention, gradients, dropout's masks."""

import math

import numpy as np
import pytest
import torch
from test_models import random_model, tokens
from torch.nn import functional as F

from bitfit.model.batching import to_device
from bitfit.model.forward_trials import select_forward
from bitfit.model.packing import (
    MAX_BUCKET_PADDING,
    WIDTH_MULTIPLE,
    BucketedAttention,
    apply_dropout,
    attention_layout,
    dropout_scale,
    pack_rows,
    split_into_buckets,
)
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.trainable import select_trainable
from bitfit.options import FINE_TUNE_TYPES
from utils import UserError

LENGTHS = (9, 4, 40, 17, 6, 16)
FAMILY = ["bert", "roberta", "electra", "distilbert"]


def layout(lengths, heads=2, spare=500):
    return attention_layout(to_device(pack_rows(np.array(lengths), spare), "cpu"), heads)


def plain_logits(model, rows):
    """transformers' own pass on padded rows."""
    mask = torch.arange(rows.lengths.max()) < torch.from_numpy(rows.lengths)[:, None]
    ids = torch.full(mask.shape, 1).masked_scatter(mask, rows.ids)
    return model(input_ids=ids, attention_mask=mask.long()).logits


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", FINE_TUNE_TYPES)
def test_logits_losses_and_gradients_are_the_plain_models(name, dtype, method, monkeypatch):
    """In float32 to rounding; in bf16 as near the exact gradient as plain bf16 comes."""
    monkeypatch.setitem(MAX_BUCKET_PADDING, "cpu", 500)  # several groups
    model, rows = random_model(name), tokens(*LENGTHS)
    forward = select_forward(model, name, rows)
    assert (
        forward.packed_encoder.after_attention
    )  # all four go through the last layer with first tokens alone
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    components = ["bias"] if method == "bitfit" else []
    trainable = select_trainable(model, method, components, 3000, np.random.default_rng(0))

    def loss_and_gradient(logits_of, dtype):
        stack = RunStack(model, trainable, [Run(1e-3, 0)])
        model.eval()
        with stack.patched(dtype):
            logits = logits_of().float()
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            stack.accumulate_grads()
        return logits.detach(), loss.item(), stack.grads[0].clone()

    def packed():
        return forward.logits(rows, np.arange(len(LENGTHS)))

    exact = loss_and_gradient(lambda: plain_logits(model, rows), torch.float32)
    logits, loss, gradient = loss_and_gradient(packed, dtype)
    if dtype == torch.float32:
        assert torch.allclose(logits, exact[0], atol=1e-6)
        assert loss == pytest.approx(exact[1], abs=1e-6)
        assert torch.allclose(gradient, exact[2], rtol=1e-4, atol=1e-6)
        return
    rough = loss_and_gradient(lambda: plain_logits(model, rows), dtype)
    assert (logits - exact[0]).abs().max() < 0.01
    assert loss == pytest.approx(exact[1], abs=0.01)
    off, plain_off = ((g - exact[2]).norm() / exact[2].norm() for g in (gradient, rough[2]))
    assert off < max(0.02, 1.5 * plain_off)


@pytest.mark.parametrize("spare", [0, 500, math.inf])
def test_rows_of_like_length_form_a_group(spare):
    lengths = np.random.default_rng(0).integers(1, 100, 64)
    groups = split_into_buckets(lengths, spare)
    assert sorted(np.concatenate(groups)) == list(range(64))
    widths = [-(-lengths[rows] // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for rows in groups]
    for width in widths:
        assert (width.max() ** 2 - width**2).sum() <= spare
    joined = np.concatenate(widths)
    assert (np.diff(joined) <= 0).all()
    assert len(groups) == {0: len(set(joined)), math.inf: 1}.get(spare, len(groups))


def test_no_padded_place_looks_at_another_row():
    """Else what is not finite in one run would reach another."""
    packed = pack_rows(np.array(LENGTHS), 500)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert len(packed.buckets) > 1
    for places, real in packed.buckets:
        rows = owner[places]
        assert (rows == rows[:, :1]).all()
        assert (real.sum(1) == np.array(LENGTHS)[rows[:, 0]]).all()


@pytest.mark.parametrize("only_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_with_dropout_is_the_formula(dropout, dtype, only_first):
    """Row by row, head by head, with the masks that it drew; its gradients are autograd's."""
    attention_layout, heads, size = layout(LENGTHS), 2, 8
    torch.manual_seed(1)
    count = sum(LENGTHS) * heads
    k, v = (torch.randn(count, size).to(dtype).requires_grad_() for _ in range(2))
    queries = len(LENGTHS) * heads if only_first else count
    q = torch.randn(queries, size).to(dtype).requires_grad_()
    torch.manual_seed(2)
    side = attention_layout.first_tokens if only_first else attention_layout.tokens
    out = BucketedAttention.apply(q, k, v, attention_layout, side, 0.4, dropout)
    assert out.dtype == dtype
    torch.manual_seed(2)  # group by group, as the masks are drawn
    keep: dict = {}
    for rows in split_into_buckets(np.array(LENGTHS), 500):
        width = -(-LENGTHS[rows[0]] // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        masks = dropout_scale(
            torch.empty(len(rows) * heads, 1 if only_first else width, width), dropout
        )
        keep |= dict(zip(rows.tolist(), masks.view(len(rows), heads, -1, width), strict=True))
    starts = np.cumsum(LENGTHS) - LENGTHS
    expected = torch.empty(queries // heads, heads, size)
    for row, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
        for head in range(heads):
            asking = slice(row, row + 1) if only_first else slice(start, start + length)
            a = q.view(-1, heads, size)[asking, head].float()
            b, c = (x.view(-1, heads, size)[start : start + length, head].float() for x in (k, v))
            weights = (0.4 * a @ b.mT).softmax(-1) * keep[row][head, : len(a), :length]
            expected[asking, head] = weights @ c
    expected = expected.view(-1, size).to(dtype)
    close = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    assert torch.allclose(out, expected, **close)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, **close)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropouts_rate_and_scale(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=dtype)
    module = torch.nn.Dropout(p)
    dropped = apply_dropout(module, x)
    kept = dropped != 0
    count = x.numel()
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    assert set(dropped[kept].tolist()) == {torch.tensor(1 / (1 - p), dtype=dtype).item()}
    torch.manual_seed(0)
    assert torch.equal(apply_dropout(module, x), dropped)
    assert torch.equal(apply_dropout(module.eval(), x), x)


def test_dropouts_masks_are_independent():
    """Neighbours, the four numbers of one random word, rows, columns, and one mask and the next."""
    torch.manual_seed(0)
    p, shape = 0.25, (512, 1024)
    first, second = (
        (dropout_scale(torch.empty(shape), p) > 0).double() - (1 - p) for _ in range(2)
    )
    pairs = [(first[:, lag:], first[:, :-lag]) for lag in (1, 2, 3, 4, 5, 8, 16, 512)]
    pairs += [(first[lag:], first[:-lag]) for lag in (1, 2, 7)] + [(first, second)]
    for a, b in pairs:
        correlation = (a * b).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(a.numel())
    for sums, draws in ((first.sum(1), shape[1]), (first.sum(0), shape[0])):
        ratio = sums.square().mean().item() / (draws * p * (1 - p))  # binomial variance
        assert abs(ratio - 1) < 5 * math.sqrt(2 / len(sums))


@pytest.mark.parametrize("p", [0.0, 1 - 1e-9, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    x = torch.randn(5, 7)
    assert torch.equal(apply_dropout(torch.nn.Dropout(p), x), x if p == 0 else 0 * x)
    assert torch.equal(dropout_scale(x, p), torch.full_like(x, float(p == 0)))


PADDED = ["deberta-v2", "fnet", "mpnet", "roformer", "squeezebert"]
PACKED = ["albert", "xlm-roberta", "esm", "layoutlm"]  # ESM's rotations only see differences


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_what_cannot_be_packed_is_found_out(name):
    """Whatever is found, it gives what transformers' own pass gives."""
    more = {
        "deberta-v2": {"pos_att_type": ["c2p", "p2c"], "relative_attention": True},
        "esm": {"mask_token_id": 4, "position_embedding_type": "rotary"},
        "squeezebert": {"embedding_size": 32},
    }.get(name, {})
    model, rows = random_model(name, intermediate_size=64, **more), tokens(*LENGTHS)
    forward = select_forward(model, name, rows)
    assert bool(forward.packed_encoder) == (name in PACKED)
    # ALBERT's last layer is its first as well
    assert bool(forward.packed_encoder and forward.packed_encoder.after_attention) == (
        name in PACKED and name != "albert"
    )
    with torch.no_grad():  # a head's bias, as trained ones have, must not hide any difference
        [p for n, p in model.named_parameters() if n.endswith("bias")][-1].fill_(100.0)
    assert bool(select_forward(model, name, rows).packed_encoder) == (name in PACKED)
    if name != "fnet":  # mixes along padding too: each width gives its own
        model.eval()
        with torch.no_grad():
            expected = plain_logits(model, rows)
            assert torch.allclose(forward.logits(rows, np.arange(6)), expected, atol=1e-5)
            assert torch.allclose(
                forward.logits(rows, np.array([4, 1])), expected[[4, 1]], atol=1e-5
            )


@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8, 8)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", ["bert", "fnet"])
def test_neighbours_are_noticed(name, lengths, zeros):
    """In rows of one length too, for others may follow; and behind a head that is zero."""
    model = random_model(name, intermediate_size=64)
    if zeros:
        torch.nn.init.zeros_(model.classifier.weight)
    kind = {"bert": "packed", "fnet": "equal length"}[name]
    assert select_forward(model, name, tokens(*lengths)).batching_kind == kind
    assert model.classifier.weight.any() != zeros


def test_a_token_beyond_the_embeddings_is_refused():
    rows = tokens(*LENGTHS)
    rows.ids[3] = 60
    with pytest.raises(UserError, match="a text has token 60, but the model bert has embeddings"):
        select_forward(random_model("bert"), "bert", rows)
