"""Rows without padding: all tokens of a batch in one row (1, N), on which an unchanged encoder runs.

Linear, LayerNorm, GELU and dropout do not care whose token is whose, and the position ids begin
anew with each row. Attention alone cuts the row apart: rows of like length form a group, padded
inside the attention only. Behind the layers the first token of each row is picked, which is all
that a classifier of this family reads.

`models.find_forward` tries a model both ways; one that reads more, or attends in its own way, runs
on padded rows.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

UNIT = 16  # the attention's widths are multiples: of others softmax is up to ten times as slow
# The padding, in squares of tokens, that a group of the attention may have before another group,
# with its launches, costs less.
SPARE = {"cpu": 8192, "cuda": math.inf}


class Group(NamedTuple):
    """Rows that attend in one product, padded to the same width T."""

    tokens: torch.Tensor  # (B, T) int64, which of the N; a row's first where it has no more
    real: torch.Tensor  # (B, T) bool


class Packing(NamedTuple):
    """How rows lie in one; arrays as the host plans them, then tensors on the device."""

    positions: torch.Tensor  # (N,) int64, of each token in its row
    first: torch.Tensor  # (R,) int64, where each row begins
    begins: torch.Tensor  # (N,) int64, where a token's row begins among the padded of all groups
    widths: torch.Tensor  # (N,) int64, of its group
    groups: list


class Layout(NamedTuple):
    """The same for one attention head after the other, made once a pass; P padded places."""

    heads: int
    place: torch.Tensor  # (P,) the row of (N * heads, d) that a padded place holds
    inverse: torch.Tensor  # (N * heads,) where it lies among the padded
    real: torch.Tensor  # (P, 1) 0 where a place is padding
    masks: list  # (B, heads, 1, T) of each group, as the attention wants it


def packing_of(lengths, spare):
    """The `Packing` of rows of so many tokens (R,), in their order."""
    starts = lengths.cumsum() - lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(row)) - starts[row]
    begins, widths, groups, begin = np.empty_like(starts), np.empty_like(starts), [], 0
    for rows in groups_of(lengths, spare):
        column = np.arange(-(-lengths[rows[0]] // UNIT) * UNIT)
        real = column < lengths[rows, None]
        groups.append(Group(starts[rows, None] + np.where(real, column, 0), real))
        begins[rows] = begin + np.arange(len(rows)) * len(column)
        widths[rows] = len(column)
        begin += real.size
    return Packing(positions, starts, begins[row], widths[row], groups)


def groups_of(lengths, spare):
    """Row numbers by length, falling, cut where a group's padding exceeds `spare`."""
    order = np.argsort(-lengths, kind="stable")
    squares = (-(-lengths[order] // UNIT) * UNIT) ** 2
    cuts, largest, padding = [], squares[0], 0
    for i, square in enumerate(squares):
        padding += largest - square
        if padding > spare:
            cuts.append(i)
            largest, padding = square, 0
    return np.split(order, cuts)


def layout_of(packing, heads, dtype):
    """The `Layout` of a `Packing` of tensors, for an attention that computes in `dtype`."""
    head = torch.arange(heads, device=packing.first.device)
    place, real, masks = [], [], []
    for group in packing.groups:
        shape = (len(group.tokens), heads, 1, group.tokens.shape[1])
        place.append((group.tokens[:, None] * heads + head[:, None]).flatten())
        mask = group.real[:, None, None].expand(shape)
        real.append(mask.reshape(-1, 1))
        masks.append(mask if mask.is_cuda else torch.where(mask, 0.0, -math.inf))
    begins = packing.begins * heads + packing.positions
    inverse = (begins[:, None] + packing.widths[:, None] * head).flatten()
    return Layout(heads, torch.cat(place), inverse, torch.cat(real).to(dtype), masks)


class Pad(torch.autograd.Function):
    """(N * heads, d) -> (P, d), each padded place a copy of some token of its row."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.inverse = layout.inverse
        return x.index_select(0, layout.place)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.inverse), None


class Unpad(torch.autograd.Function):
    """(P, d) -> (N * heads, d); padding gets no gradient."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.index_select(0, layout.inverse)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.layout.place).mul_(ctx.layout.real), None


def attention(module, query, key, value, mask, scaling=None, dropout=0.0, *, layout, **others):
    """What transformers' attention interface asks for: (1, heads, N, d) -> (1, N, heads, d)."""
    _, heads, count, size = query.shape
    if (heads, count * heads) != (layout.heads, len(layout.inverse)) or key.shape != query.shape:
        raise ValueError("these are not the packed rows' heads")
    q, k, v = (
        Pad.apply(x.transpose(1, 2).reshape(-1, size).to(layout.real.dtype), layout)
        for x in (query, key, value)
    )
    if dropout and not q.is_cuda:
        out = Attend.apply(q, k, v, layout.masks, scaling, dropout)
    else:
        out = attend(q, k, v, layout.masks, scaling, dropout)
    return Unpad.apply(out, layout).to(query.dtype).view(1, count, heads, size), None


def attend(q, k, v, masks, scaling, dropout=0.0):
    """Attention within each row, group after group: (P, d) -> (P, d)."""
    sizes = [mask.shape[0] * mask.shape[1] * mask.shape[3] for mask in masks]
    outs = [
        F.scaled_dot_product_attention(
            *(x.view(*mask.shape[:2], -1, x.shape[-1]) for x in own), mask, dropout, scale=scaling
        ).reshape(-1, q.shape[-1])
        for *own, mask in zip(*(x.split(sizes) for x in (q, k, v)), masks, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class Attend(torch.autograd.Function):
    """The same on a CPU, where torch's own has no fast dropout."""

    @staticmethod
    def forward(ctx, q, k, v, masks, scaling, dropout):
        ctx.scaling, ctx.groups, out, begin = scaling, [], torch.empty_like(q), 0
        for mask in masks:
            mask = mask.flatten(0, 1)
            part = slice(begin, begin + mask.shape[0] * mask.shape[2])
            own = [x[part].view(len(mask), -1, q.shape[-1]) for x in (q, k, v)]
            weights = torch.baddbmm(mask, own[0], own[1].mT, alpha=scaling).softmax(-1)
            keep = keep_of(weights, dropout)
            torch.bmm(weights * keep, own[2], out=out[part].view_as(own[2]))
            ctx.groups.append((part, own, weights, keep))
            begin = part.stop
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = [torch.empty_like(grad) for _ in range(3)]
        for part, (q, k, v), weights, keep in ctx.groups:
            dq, dk, dv, dout = (x[part].view_as(q) for x in (*grads, grad))
            torch.bmm((weights * keep).mT, dout, out=dv)
            dropped = torch.bmm(dout, v.mT).mul_(keep)
            scores = torch._softmax_backward_data(dropped, weights, -1, weights.dtype)
            torch.baddbmm(dq, scores, k, beta=0, alpha=ctx.scaling, out=dq)
            torch.baddbmm(dk, scores.mT, q, beta=0, alpha=ctx.scaling, out=dk)
        return *grads, None, None, None


def drop(x, p):
    """Dropout. On a CPU a number costs 16 random bits, so that p is right to 1e-5.

    `bernoulli_`, of which torch's own is made there, takes six times as long.
    """
    if x.device.type != "cpu" or not 0 < p < 1:
        return F.dropout(x, p)
    return x * keep_of(x, p)


def keep_of(x, p):
    """What dropout multiplies x with: 0 with probability p, else 1 / (1 - p)."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = torch.ge(bits, round(2**16 * p) - 2**15, out=torch.empty_like(x))
    return keep.mul_(1 / (1 - p))


def drop_forward(module, x):
    """A torch.nn.Dropout that draws its mask with `drop`."""
    return drop(x, module.p) if module.training else x


class Packer(NamedTuple):
    """How to run one model on packed rows."""

    layers: torch.nn.Module  # runs the layers one after the other
    heads: int
    first_position: int  # RoBERTa counts from padding_idx + 1

    def __call__(self, model, inputs, packing):
        """The model's output for `inputs` (1, N); nothing of the model stays changed."""
        from transformers import AttentionInterface

        AttentionInterface.register("packed", attention)
        before, model.config._attn_implementation = model.config._attn_implementation, "packed"
        hook = self.layers.register_forward_hook(partial(pick_first, packing.first))
        try:
            positions = packing.positions[None] + self.first_position
            # On a CPU the attention computes in float32: as fast for short rows, and more exact.
            dtype = model.dtype if packing.first.is_cuda else torch.float32
            layout = layout_of(packing, self.heads, dtype)
            return model(**inputs, position_ids=positions, layout=layout)
        finally:
            hook.remove()
            model.config._attn_implementation = before


def pick_first(first, module, args, output):
    """(1, N, d) -> (R, 1, d): each row's first token, behind the last layer."""
    output.last_hidden_state = output.last_hidden_state[0].index_select(0, first)[:, None]
    return output


def packer_of(model, first_position):
    """The `Packer` to try on a model; None where it has no layers or heads to speak of."""
    base = model.base_model
    lists = [(len(m), n) for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList)]
    heads = getattr(model.config, "num_attention_heads", None)
    if not lists or not isinstance(heads, int):
        return None
    name = max(lists, key=lambda item: item[0])[1]
    return Packer(base.get_submodule(name.rpartition(".")[0]), heads, first_position)
