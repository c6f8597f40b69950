"""Rows without padding: all tokens of a batch in one row (1, N), through an unchanged encoder.

Linear, LayerNorm, GELU and dropout do not care whose token is whose, and the position ids begin
anew with each row. Attention alone cuts the row apart: rows of like length form a group, padded
inside the attention only. Behind the last attention the first token of each row is picked,
which is all that a classifier of this family reads.

`forward.select_forward` tries a model both ways; one that reads more, or attends in its own way,
runs on padded rows.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from bitfit.model import attention as varlen
from bitfit.model.attention import Sequences, VarlenLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

UNIT = 16  # the attention's widths are multiples: of others softmax is up to ten times as slow
# The padding, in squares of tokens, that a group of the attention may have. A CPU is fastest with
# none beyond UNIT; on a GPU, which uses this only for models that `varlen` cannot serve, launches
# cost more. A square takes about 1.2 kB in a layer of twelve heads: weights and gradients.
SPARE = {"cpu": 0, "cuda": 4e5}


class Packing(NamedTuple):
    """How rows lie in one; arrays as the host plans them, then tensors on the device."""

    positions: torch.Tensor  # (N,) int64, of each token in its row
    first: torch.Tensor  # (R,) int64, where each row begins
    begins: torch.Tensor  # (N,) int64, where a token's row begins among the padded of all groups
    widths: torch.Tensor  # (N,) int64, of its group
    order: torch.Tensor  # (R,) int64, the rows, group after group
    seat: torch.Tensor  # (R,) int64, where each row is in that order
    groups: list  # rows that attend in one product: (tokens, real), (B, T) each
    # tokens: int64, which of the N; a row's first where it has no more; real: bool


class Side(NamedTuple):
    """Where the queries, or the keys and values, of all groups lie: one head after the other."""

    place: torch.Tensor  # (P,) the row of (N * heads, d) that a padded place holds
    inverse: torch.Tensor  # (N * heads,) where it lies among the padded
    parts: list  # of each group, a slice of the P places


class Layout(NamedTuple):
    """A `Packing` for so many heads, made once a pass."""

    first: torch.Tensor  # (R,) where each row begins
    tokens: Side  # all
    firsts: Side  # the first token of each row
    real: torch.Tensor  # (P, 1) 0 where a place of `tokens` is padding
    masks: list  # of each group, (B * heads, 1, T) 0 or -inf where there is padding
    last: frozenset  # modules within which only first tokens need attend


def packing_of(lengths: np.ndarray, spare: float) -> Packing:
    """The `Packing` of rows of so many tokens (R,), in their order."""
    starts = lengths.cumsum() - lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(row)) - starts[row]
    begins, widths, groups, begin = np.empty_like(starts), np.empty_like(starts), [], 0
    parts = groups_of(lengths, spare)
    for rows in parts:
        column = np.arange(-(-lengths[rows[0]] // UNIT) * UNIT)
        real = column < lengths[rows, None]
        groups.append((starts[rows, None] + np.where(real, column, 0), real))
        begins[rows] = begin + np.arange(len(rows)) * len(column)
        widths[rows] = len(column)
        begin += real.size
    order = np.concatenate(parts)
    begins, widths = begins[row], widths[row]
    return Packing(positions, starts, begins, widths, order, order.argsort(), groups)


def groups_of(lengths: np.ndarray, spare: float) -> list[np.ndarray]:
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


def layout_of(packing: Packing, heads: int, last: frozenset = frozenset()) -> Layout:
    """The `Layout` of a `Packing` of tensors."""
    head = torch.arange(heads, device=packing.first.device)
    sizes = [own.numel() * heads for _, own in packing.groups]
    reals = [own[:, None].expand(-1, heads, -1).flatten(0, 1) for _, own in packing.groups]
    place = [(tokens[:, None] * heads + head[:, None]).flatten() for tokens, _ in packing.groups]
    begins = packing.begins * heads + packing.positions
    inverse = (begins[:, None] + packing.widths[:, None] * head).flatten()
    tokens = Side(torch.cat(place), inverse, slices(sizes))
    order, seat = (rows[:, None] * heads + head for rows in (packing.order, packing.seat))
    sizes = [len(own) for own in reals]
    firsts = Side(order.flatten(), seat.flatten(), slices(sizes))
    masks = [own.float().log()[:, None] for own in reals]
    real = torch.cat([own.flatten() for own in reals]).float()[:, None]
    return Layout(packing.first, tokens, firsts, real, masks, last)


def slices(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class Attention(torch.autograd.Function):
    """Attention within each row, with dropout, of all tokens or of first ones.

    Queries (Q * heads, d), keys and values (N * heads, d) -> (Q * heads, d). It computes in
    float32, whatever the model does: for short rows that is as fast.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        side: Side,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        ctx.layout, ctx.side, ctx.scaling = layout, side, scaling
        ctx.dtype, ctx.groups = q.dtype, []
        q = q.float().index_select(0, side.place)
        k, v = (x.float().index_select(0, layout.tokens.place) for x in (k, v))
        out = torch.empty_like(q)
        for mask, own, other in zip(layout.masks, side.parts, layout.tokens.parts, strict=True):
            size = len(mask), -1, q.shape[-1]
            rows = q[own].view(size), k[other].view(size), v[other].view(size)
            weights = torch.baddbmm(mask, rows[0], rows[1].mT, alpha=scaling).softmax(-1)
            dropped = keep_of(weights, dropout).mul_(weights) if dropout else weights
            torch.bmm(dropped, rows[2], out=out[own].view(size))
            if any(ctx.needs_input_grad):
                ctx.groups.append((own, other, rows, weights, dropped))
        ctx.out = out
        return out.index_select(0, side.inverse).to(ctx.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple:
        layout, side = ctx.layout, ctx.side
        grad = grad.float().index_select(0, side.place)
        if side is layout.tokens:
            grad.mul_(layout.real)
        sums = (grad * ctx.out).sum(-1, keepdim=True)
        grads = torch.empty_like(grad), *grad.new_empty(2, len(layout.real), grad.shape[-1])
        for own, other, (q, k, v), weights, dropped in ctx.groups:
            dout, dq, dk, dv = grad[own], grads[0][own], grads[1][other], grads[2][other]
            dout, dq, dk, dv = dout.view_as(q), dq.view_as(q), dk.view_as(k), dv.view_as(v)
            torch.bmm(dropped.mT, dout, out=dv)
            # of softmax behind dropout: a row's sum of weight x gradient is that of out x gradient
            scores = torch.bmm(dout, v.mT).mul_(dropped)
            scores.addcmul_(weights, sums[own].view(len(q), -1, 1), value=-1)
            torch.baddbmm(dq, scores, k, beta=0, alpha=ctx.scaling, out=dq)
            torch.baddbmm(dk, scores.mT, q, beta=0, alpha=ctx.scaling, out=dk)
        ctx.groups = ctx.out = None  # or they would live until the next pass is through
        sides = side, layout.tokens, layout.tokens
        pairs = zip(grads, sides, strict=True)
        return *(x.index_select(0, s.inverse).to(ctx.dtype) for x, s in pairs), *[None] * 4


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention interface asks for: (1, heads, N, d) -> (1, N, heads, d).

    In the last layer it is 0 but for the first token of each row, if no other is read.
    """
    _, heads, count, size = query.shape
    if count * heads != len(layout.tokens.inverse) or key.shape != query.shape:
        raise ValueError("these are not the packed rows' heads")
    side = layout.tokens
    if module in layout.last:
        side, query = layout.firsts, query.index_select(2, layout.first)
    flat = (x.transpose(1, 2).reshape(-1, size) for x in (query, key, value))
    out = Attention.apply(*flat, layout, side, scaling, dropout).view(1, -1, heads, size)
    if side is layout.firsts:
        out = out.new_zeros(1, count, heads, size).index_copy(1, layout.first, out)
    return out, None


def keep_of(x: torch.Tensor, p: float) -> torch.Tensor:
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


def drop(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """What a torch.nn.Dropout computes, with the masks of `keep_of` on a CPU."""
    if module.training and module.p and x.device.type == "cpu":
        return x * keep_of(x, module.p)
    return F.dropout(x, module.p, module.training)


class PackedEncoder(NamedTuple):
    """How to run one model on packed rows."""

    layers: torch.nn.Module  # runs the layers one after the other
    last: frozenset  # the last layer's modules, if only first tokens need go through them all
    rest: torch.nn.Module | None  # the one that follows the attention there
    heads: int
    first_position: int  # RoBERTa counts from padding_idx + 1
    varlen: bool = False  # whether the attention is that of `varlen`

    def __call__(
        self,
        model: "PreTrainedModel",
        inputs: dict[str, torch.Tensor],
        packing: Packing | Sequences,
    ) -> "ModelOutput":
        """The model's output for `inputs` (1, N); nothing of the model stays changed."""
        from transformers import AttentionInterface

        attend: Callable
        layout: Layout | VarlenLayout
        if isinstance(packing, Sequences):
            attend, layout = varlen.attention, VarlenLayout(packing, self.last)
        else:
            attend, layout = attention, layout_of(packing, self.heads, self.last)
        AttentionInterface.register("packed", attend)
        positions = packing.positions[None] + self.first_position
        before = model.config._attn_implementation
        if self.rest:
            hook = self.rest.register_forward_pre_hook(partial(pick_inputs, packing.first))
        else:
            hook = self.layers.register_forward_hook(partial(pick_output, packing.first))
        try:
            model.config._attn_implementation = "packed"
            return model(**inputs, position_ids=positions, layout=layout)
        finally:
            hook.remove()
            model.config._attn_implementation = before


def pick(first: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(1, N, d) -> (R, 1, d): each row's first token."""
    return x.squeeze(0).index_select(0, first)[:, None]


def pick_inputs(
    first: torch.Tensor, module: torch.nn.Module, args: tuple
) -> tuple[torch.Tensor, ...]:
    return tuple(pick(first, x) for x in args)


def pick_output(
    first: torch.Tensor, module: torch.nn.Module, args: tuple, output: "ModelOutput"
) -> "ModelOutput":
    output.last_hidden_state = pick(first, output.last_hidden_state)
    return output


def packed_encoders(
    model: "PreTrainedModel", first_position: int, dtype: torch.dtype = torch.float32
) -> list[PackedEncoder]:
    """The `PackedEncoder`s to try on a model, the fastest first; none where its layers see windows.

    After the last attention no token sees another, and the classifier reads the first of each row
    alone: three quarters of the last layer's arithmetic need not be done for the others.
    """
    config, base = model.config, model.base_model
    windows = any(getattr(config, name, None) for name in ("sliding_window", "local_attention"))
    lists = [(len(m), n) for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList)]
    heads = getattr(config, "num_attention_heads", None)
    if windows or not lists or not isinstance(heads, int):
        return []
    name = max(lists, key=lambda item: item[0])[1]
    layers, last = base.get_submodule(name.rpartition(".")[0]), base.get_submodule(name)[-1]
    rests = [m for n, m in last.named_modules() if n in ("attention.output", "sa_layer_norm")]
    pairs = [(frozenset(last.modules()), rest) for rest in rests] + [(frozenset(), None)]
    size = getattr(config, "hidden_size", 0) // heads
    fused = varlen.supports(size, next(model.parameters()).device, dtype)
    kinds = (True, False) if fused else (False,)
    return [
        PackedEncoder(layers, *pair, heads, first_position, kind)
        for kind in kinds
        for pair in pairs
    ]
