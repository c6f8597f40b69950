"""Rows without padding: all tokens of a batch in one row (1, N), through an unchanged encoder.

Linear, LayerNorm, GELU and dropout do not care whose token is whose, and the position ids begin
anew with each row. Attention alone cuts the row apart: rows of like length form a group, padded
inside the attention only. Behind the layers the first token of each row is picked, which is all
that a classifier of this family reads.

`models.find_forward` tries a model both ways; one that reads more, or attends in its own way, runs
on padded rows.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

UNIT = 16  # the attention's widths are multiples: of others softmax is up to ten times as slow
# The padding, in squares of tokens, that a group of the attention may have. A CPU is fastest with
# none beyond UNIT; on a GPU launches cost more, and it is memory: 0.5 GB for twelve heads.
SPARE = {"cpu": 0, "cuda": 1e7}


class Packing(NamedTuple):
    """How rows lie in one; arrays as the host plans them, then tensors on the device."""

    positions: torch.Tensor  # (N,) int64, of each token in its row
    first: torch.Tensor  # (R,) int64, where each row begins
    begins: torch.Tensor  # (N,) int64, where a token's row begins among the padded of all groups
    widths: torch.Tensor  # (N,) int64, of its group
    groups: list  # rows that attend in one product: (tokens, real), (B, T) each
    # tokens: int64, which of the N; a row's first where it has no more; real: bool


class Layout(NamedTuple):
    """The same for one attention head after the other, made once a pass; P padded places."""

    heads: int
    place: torch.Tensor  # (P,) the row of (N * heads, d) that a padded place holds
    inverse: torch.Tensor  # (N * heads,) where it lies among the padded
    real: torch.Tensor  # (P, 1) 0 where a place is padding
    groups: list  # (slice of the P places, (B * heads, 1, T) 0 or -inf where there is padding)


def packing_of(lengths, spare):
    """The `Packing` of rows of so many tokens (R,), in their order."""
    starts = lengths.cumsum() - lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(row)) - starts[row]
    begins, widths, groups, begin = np.empty_like(starts), np.empty_like(starts), [], 0
    for rows in groups_of(lengths, spare):
        column = np.arange(-(-lengths[rows[0]] // UNIT) * UNIT)
        real = column < lengths[rows, None]
        groups.append((starts[rows, None] + np.where(real, column, 0), real))
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


def layout_of(packing, heads):
    """The `Layout` of a `Packing` of tensors."""
    head, begin = torch.arange(heads, device=packing.first.device), 0
    place, real, groups = [], [], []
    for tokens, own in packing.groups:
        own = own[:, None].expand(-1, heads, -1).flatten(0, 1)
        place.append((tokens[:, None] * heads + head[:, None]).flatten())
        real.append(own.reshape(-1, 1).float())
        part, begin = slice(begin, begin + own.numel()), begin + own.numel()
        groups.append((part, real[-1].log().view(len(own), 1, -1)))
    begins = packing.begins * heads + packing.positions
    inverse = (begins[:, None] + packing.widths[:, None] * head).flatten()
    return Layout(heads, torch.cat(place), inverse, torch.cat(real), groups)


class Attention(torch.autograd.Function):
    """Attention within each row, with dropout: three (N * heads, d) -> (N * heads, d).

    It computes in float32, whatever the model does: for short rows that is as fast.
    """

    @staticmethod
    def forward(ctx, q, k, v, layout, scaling, dropout):
        ctx.layout, ctx.scaling, ctx.dtype, ctx.groups = layout, scaling, q.dtype, []
        q, k, v = (x.float().index_select(0, layout.place) for x in (q, k, v))
        out = torch.empty_like(q)
        for part, mask in layout.groups:
            own = [x[part].view(len(mask), -1, q.shape[-1]) for x in (q, k, v)]
            weights = torch.baddbmm(mask, own[0], own[1].mT, alpha=scaling).softmax(-1)
            keep = keep_of(weights, dropout) if dropout else None
            dropped = weights * keep if dropout else weights
            torch.bmm(dropped, own[2], out=out[part].view_as(own[2]))
            if any(ctx.needs_input_grad):
                ctx.groups.append((part, own, weights, keep))
        return out.index_select(0, layout.inverse).to(ctx.dtype)

    @staticmethod
    def backward(ctx, grad):
        layout = ctx.layout
        grad = grad.float().index_select(0, layout.place).mul_(layout.real)
        grads = [torch.empty_like(grad) for _ in range(3)]
        for part, (q, k, v), weights, keep in ctx.groups:
            dq, dk, dv, dout = (x[part].view_as(q) for x in (*grads, grad))
            dropped, scores = weights, torch.bmm(dout, v.mT)
            if keep is not None:
                dropped, scores = weights * keep, scores.mul_(keep)
            torch.bmm(dropped.mT, dout, out=dv)
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            torch.baddbmm(dq, scores, k, beta=0, alpha=ctx.scaling, out=dq)
            torch.baddbmm(dk, scores.mT, q, beta=0, alpha=ctx.scaling, out=dk)
        ctx.groups = None  # or they would live until the next pass is through
        grads = [x.index_select(0, layout.inverse).to(ctx.dtype) for x in grads]
        return *grads, None, None, None


def attention(module, query, key, value, mask, scaling=None, dropout=0.0, *, layout, **others):
    """What transformers' attention interface asks for: (1, heads, N, d) -> (1, N, heads, d)."""
    _, heads, count, size = query.shape
    if (heads, count * heads) != (layout.heads, len(layout.inverse)) or key.shape != query.shape:
        raise ValueError("these are not the packed rows' heads")
    flat = (x.transpose(1, 2).reshape(-1, size) for x in (query, key, value))
    return Attention.apply(*flat, layout, scaling, dropout).view(1, count, heads, size), None


def keep_of(x, p):
    """What dropout multiplies x with: 0 with probability p, else 1 / (1 - p).

    On a CPU a number costs 16 random bits, so that p is right to 1e-5: `bernoulli_` takes six
    times as long.
    """
    keep = torch.empty_like(x)
    if p >= 1:
        return keep.zero_()
    if x.device.type != "cpu":
        return keep.bernoulli_(1 - p).div_(1 - p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(bits, min(round(2**16 * p), 2**16 - 1) - 2**15, out=keep).mul_(1 / (1 - p))


def drop(module, x):
    """What a torch.nn.Dropout computes, with the masks of `keep_of` on a CPU."""
    if module.training and module.p and x.device.type == "cpu":
        return x * keep_of(x, module.p)
    return F.dropout(x, module.p, module.training)


class Packer(NamedTuple):
    """How to run one model on packed rows."""

    layers: torch.nn.Module  # runs the layers one after the other
    heads: int
    first_position: int  # RoBERTa counts from padding_idx + 1

    def __call__(self, model, inputs, packing):
        """The model's output for `inputs` (1, N); nothing of the model stays changed."""
        from transformers import AttentionInterface

        AttentionInterface.register("packed", attention)
        positions = packing.positions[None] + self.first_position
        layout, before = layout_of(packing, self.heads), model.config._attn_implementation
        hook = self.layers.register_forward_hook(partial(pick_first, packing.first))
        try:
            model.config._attn_implementation = "packed"
            return model(**inputs, position_ids=positions, layout=layout)
        finally:
            hook.remove()
            model.config._attn_implementation = before


def pick_first(first, module, args, output):
    """(1, N, d) -> (R, 1, d): each row's first token, behind the last layer."""
    output.last_hidden_state = output.last_hidden_state.squeeze(0).index_select(0, first)[:, None]
    return output


def packer_of(model, first_position):
    """The `Packer` to try on a model; None where its layers see windows, or there are none."""
    config, base = model.config, model.base_model
    windows = any(getattr(config, name, None) for name in ("sliding_window", "local_attention"))
    lists = [(len(m), n) for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList)]
    heads = getattr(config, "num_attention_heads", None)
    if windows or not lists or not isinstance(heads, int):
        return None
    name = max(lists, key=lambda item: item[0])[1]
    return Packer(base.get_submodule(name.rpartition(".")[0]), heads, first_position)
