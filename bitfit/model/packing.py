"""Batches without padding: all tokens of a batch form one row (1, N) for an unmodified encoder.

Linear, LayerNorm, GELU and dropout treat tokens one by one, and position ids restart in each row.
Only attention must separate the rows: rows of similar length form a bucket, which is padded only
within the attention. This module has the layout, the attention and dropout; `packed_encoder` runs
a model with them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

# Bucket widths are multiples of this: with other widths softmax is up to ten times as slow.
WIDTH_MULTIPLE = 16
# The maximum padding of a bucket in squares of tokens. A CPU is fastest with none beyond
# WIDTH_MULTIPLE. On a GPU, which uses buckets only for models that FlashAttention cannot serve,
# kernel launches cost more. A square takes about 1.2 kB in a layer of twelve heads (weights and
# gradients).
MAX_BUCKET_PADDING = {"cpu": 0, "cuda": 4e5}


class PackedBatch(NamedTuple):
    """The layout of R rows in one row of N tokens: NumPy arrays, then tensors on the device."""

    position_ids: torch.Tensor  # (N,) int64, the position of each token in its row
    first_token: torch.Tensor  # (R,) int64, the index of each row's first token
    row_offset: torch.Tensor  # (N,) int64, the start of a token's row among all padded rows
    width: torch.Tensor  # (N,) int64, the width of a token's bucket
    order: torch.Tensor  # (R,) int64, the rows, bucket after bucket
    rank: torch.Tensor  # (R,) int64, the position of each row in `order`
    # [(tokens, valid)] of the buckets, both (B, T): int64 indices among the N tokens with a row's
    # first token as padding; bool, False at padding.
    buckets: list[tuple[torch.Tensor, torch.Tensor]]


class PaddedIndex(NamedTuple):
    """Gather indices between flat heads and the padded buckets, for queries or for keys."""

    pad_index: torch.Tensor  # (P,) int64, the row of (N * heads, d) at each padded position
    unpad_index: torch.Tensor  # (N * heads,) int64, the inverse
    slices: list[slice]  # of each bucket, its part of the P positions


class AttentionLayout(NamedTuple):
    """A `PackedBatch` for a number of heads; it is made once per forward pass."""

    first_token: torch.Tensor  # (R,) int64, the index of each row's first token
    tokens: PaddedIndex  # of all tokens
    first_tokens: PaddedIndex  # of the first token of each row
    valid: torch.Tensor  # (P, 1) float32, 0.0 at the padding of `tokens`
    masks: list[torch.Tensor]  # of each bucket, (B * heads, 1, T) float32: 0 or -inf at padding
    last_layer: frozenset[torch.nn.Module]  # modules in which only first tokens need to attend


def pack_rows(lengths: np.ndarray, max_padding: float) -> PackedBatch:
    """Return the `PackedBatch` of rows with these numbers of tokens (R,), in their order."""
    starts = lengths.cumsum() - lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    position_ids = np.arange(len(row)) - starts[row]
    offsets, widths, buckets, offset = np.empty_like(starts), np.empty_like(starts), [], 0
    rows_of_bucket = split_into_buckets(lengths, max_padding)
    for rows in rows_of_bucket:
        column = np.arange(-(-lengths[rows[0]] // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
        valid = column < lengths[rows, None]
        buckets.append((starts[rows, None] + np.where(valid, column, 0), valid))
        offsets[rows] = offset + np.arange(len(rows)) * len(column)
        widths[rows] = len(column)
        offset += valid.size
    order = np.concatenate(rows_of_bucket)
    return PackedBatch(
        position_ids=position_ids,
        first_token=starts,
        row_offset=offsets[row],
        width=widths[row],
        order=order,
        rank=order.argsort(),
        buckets=buckets,
    )


def split_into_buckets(lengths: np.ndarray, max_padding: float) -> list[np.ndarray]:
    """Return the row numbers of each bucket, the longest rows first.

    A new bucket starts where the padding of the current one would exceed `max_padding`.
    """
    order = np.argsort(-lengths, kind="stable")
    squares = (-(-lengths[order] // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) ** 2
    cuts, largest, padding = [], squares[0], 0
    for i, square in enumerate(squares):
        padding += largest - square
        if padding > max_padding:
            cuts.append(i)
            largest, padding = square, 0
    return np.split(order, cuts)


def attention_layout(
    packed: PackedBatch, heads: int, last_layer: frozenset[torch.nn.Module] = frozenset()
) -> AttentionLayout:
    """Return the `AttentionLayout` of a `PackedBatch` of tensors."""
    head = torch.arange(heads, device=packed.first_token.device)
    valid = [mask[:, None].expand(-1, heads, -1).flatten(0, 1) for _, mask in packed.buckets]
    pad_index = [
        (tokens[:, None] * heads + head[:, None]).flatten() for tokens, _ in packed.buckets
    ]
    offset = packed.row_offset * heads + packed.position_ids
    tokens = PaddedIndex(
        pad_index=torch.cat(pad_index),
        unpad_index=(offset[:, None] + packed.width[:, None] * head).flatten(),
        slices=consecutive_slices([mask.numel() for mask in valid]),
    )
    order, rank = (rows[:, None] * heads + head for rows in (packed.order, packed.rank))
    first_tokens = PaddedIndex(
        pad_index=order.flatten(),
        unpad_index=rank.flatten(),
        slices=consecutive_slices([len(mask) for mask in valid]),
    )
    return AttentionLayout(
        first_token=packed.first_token,
        tokens=tokens,
        first_tokens=first_tokens,
        valid=torch.cat([mask.flatten() for mask in valid]).float()[:, None],
        masks=[mask.float().log()[:, None] for mask in valid],
        last_layer=last_layer,
    )


def consecutive_slices(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class BucketedAttention(torch.autograd.Function):
    """Attention within each row, with dropout, for the queries of all tokens or of first tokens.

    Queries (Q * heads, d), keys and values (N * heads, d) -> (Q * heads, d). The computation is
    always in float32, which is as fast as bf16 for short rows.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: AttentionLayout,
        queries: PaddedIndex,
        scaling: float,
        dropout_rate: float,
    ) -> torch.Tensor:
        ctx.layout, ctx.queries, ctx.scaling = layout, queries, scaling
        ctx.dtype, ctx.buckets = q.dtype, []
        q = q.float().index_select(0, queries.pad_index)  # (P, d)
        k, v = (x.float().index_select(0, layout.tokens.pad_index) for x in (k, v))
        out = torch.empty_like(q)
        slices = zip(layout.masks, queries.slices, layout.tokens.slices, strict=True)
        for mask, of_q, of_k in slices:
            shape = len(mask), -1, q.shape[-1]  # (B * heads, T, d)
            inputs = q[of_q].view(shape), k[of_k].view(shape), v[of_k].view(shape)
            weights = torch.baddbmm(mask, inputs[0], inputs[1].mT, alpha=scaling).softmax(-1)
            dropped = weights
            if dropout_rate:
                dropped = dropout_scale(weights, dropout_rate).mul_(weights)
            torch.bmm(dropped, inputs[2], out=out[of_q].view(shape))
            if any(ctx.needs_input_grad):
                ctx.buckets.append((of_q, of_k, inputs, weights, dropped))
        ctx.out = out
        return out.index_select(0, queries.unpad_index).to(ctx.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        layout, queries = ctx.layout, ctx.queries
        grad = grad.float().index_select(0, queries.pad_index)
        if queries is layout.tokens:
            grad.mul_(layout.valid)
        sums = (grad * ctx.out).sum(-1, keepdim=True)
        grads = torch.empty_like(grad), *grad.new_empty(2, len(layout.valid), grad.shape[-1])
        for of_q, of_k, (q, k, v), weights, dropped in ctx.buckets:
            dout, dq = grad[of_q].view_as(q), grads[0][of_q].view_as(q)
            dk, dv = grads[1][of_k].view_as(k), grads[2][of_k].view_as(v)
            torch.bmm(dropped.mT, dout, out=dv)
            # The gradient of softmax followed by dropout: the sum over a row of weight times
            # gradient equals the sum of output times gradient.
            scores = torch.bmm(dout, v.mT).mul_(dropped)
            scores.addcmul_(weights, sums[of_q].view(len(q), -1, 1), value=-1)
            torch.baddbmm(dq, scores, k, beta=0, alpha=ctx.scaling, out=dq)
            torch.baddbmm(dk, scores.mT, q, beta=0, alpha=ctx.scaling, out=dk)
        ctx.buckets = ctx.out = None  # else they would stay in memory until the next forward pass
        indices = queries, layout.tokens, layout.tokens
        pairs = zip(grads, indices, strict=True)
        return *(x.index_select(0, i.unpad_index).to(ctx.dtype) for x, i in pairs), *[None] * 4


def bucketed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: AttentionLayout,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend within each row, (1, heads, N, d) -> (1, N, heads, d); for transformers' interface.

    In the last layer the result is 0 except for the first token of each row.
    """
    _, heads, count, size = query.shape
    if count * heads != len(layout.tokens.unpad_index) or key.shape != query.shape:
        raise ValueError("the heads do not have the shape of the packed rows")
    queries = layout.tokens
    if module in layout.last_layer:
        queries, query = layout.first_tokens, query.index_select(2, layout.first_token)
    flat = (x.transpose(1, 2).reshape(-1, size) for x in (query, key, value))
    out = BucketedAttention.apply(*flat, layout, queries, scaling, dropout).view(1, -1, heads, size)
    if queries is layout.first_tokens:
        out = out.new_zeros(1, count, heads, size).index_copy(1, layout.first_token, out)
    return out, None


def dropout_scale(x: torch.Tensor, p: float) -> torch.Tensor:
    """Return the factors of dropout in the shape of x: 0 with probability p, else 1 / (1 - p).

    On a CPU a factor costs 16 random bits, so p is exact to 1e-5; `bernoulli_` takes six times
    as long.
    """
    scale = torch.empty_like(x)
    if p >= 1:
        return scale.zero_()
    if x.device.type != "cpu":
        return scale.bernoulli_(1 - p).div_(1 - p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(bits, min(round(2**16 * p), 2**16 - 1) - 2**15, out=scale).mul_(1 / (1 - p))


def apply_dropout(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a `torch.nn.Dropout`; on a CPU with the factors of `dropout_scale`."""
    if module.training and module.p and x.device.type == "cpu":
        return x * dropout_scale(x, module.p)
    return F.dropout(x, module.p, module.training)
