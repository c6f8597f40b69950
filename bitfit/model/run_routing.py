"""How modules compute when each row takes the values of its own run, out of K.

    Linear     x @ W.T + b           becomes   x @ W.T + b[run of the row]
    LayerNorm  g * norm(x) + b       becomes   g * norm(x) + b[run of the row]
    classifier x @ W.T + b           becomes   x @ W[run].T + b[run], the rows of a run together

Nothing else of the model changes, and no sum runs over rows of two runs: what one run does, even
an infinite loss, cannot reach another.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from bitfit.model.attention import CHUNK

if TYPE_CHECKING:
    from bitfit.model.run_stack import RunStack


class RunIndex(NamedTuple):
    """Which run each row, or token, belongs to, and those of each run: arrays, then tensors."""

    run_ids: torch.Tensor  # (B,) its run
    active_runs: torch.Tensor  # (k,) the runs that have any
    pad_index: torch.Tensor  # (k, most) the rows of each; where it has no more, its first
    valid_mask: torch.Tensor  # (k, 1, most) 0.0 there
    unpad_index: torch.Tensor  # (B,) where a row sits among the k * most places


class RunRouting(NamedTuple):
    """Whose the rows of a pass are, and the tokens if they are packed."""

    rows: RunIndex
    tokens: RunIndex | None  # its places are of tokens, or of chunks with CHUNK tokens each

    def to(self, dtype: torch.dtype) -> "RunRouting":
        """The same, for values of that type."""
        if self.rows.valid_mask is None:
            return self
        return RunRouting(*(o and o._replace(valid_mask=o.valid_mask.to(dtype)) for o in self))

    def per_row(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Each row's part of (K, d) values, shaped to be added to (B, ..., d)."""
        shape = (len(self.rows.run_ids), *[1] * (like.dim() - 2), -1)
        # On a GPU the gradient of `index_select` sums in any order.
        return values[self.rows.run_ids].view(shape)

    def add_bias(
        self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each token's bias (K, o) added to x (..., o), or to its product with a weight (o, i)."""
        if x.dim() == 2:
            return PerRunBias.apply(x, weight, bias, self.rows)
        if self.tokens and len(x) == 1 and x.shape[1] == len(self.tokens.run_ids):
            return PerRunBias.apply(x.squeeze(0), weight, bias, self.tokens)[None]
        x = x if weight is None else F.linear(x, weight)
        return x + self.per_row(bias, x)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, i) by (K, o, i) -> (B, o): each row by its run's matrix, one product a run."""
        seated = x[self.rows.pad_index]  # (k, most, i)
        product = torch.bmm(seated, weight.index_select(0, self.rows.active_runs).mT)
        return product.flatten(0, 1)[self.rows.unpad_index]


class BroadcastRuns(NamedTuple):
    """Every row belongs to every run: (B, i) becomes (K, B, o) where the runs first differ."""

    def per_row(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return values[:, None]

    def add_bias(
        self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        return (x if weight is None else F.linear(x, weight)) + bias[:, None]

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, weight.mT)


class PerRunBias(torch.autograd.Function):
    """x @ weight.T + bias[owner], or x + bias[owner], for rows or tokens (N, i), biases (K, o).

    The gradient of a run's bias is a sum over its tokens alone: one product, whatever K. Tokens
    that fill whole chunks are summed by chunk first, without a gather and in float32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor,
        owned: RunIndex,
    ) -> torch.Tensor:
        ctx.weight, ctx.owned, ctx.shape = weight, owned, bias.shape
        own = bias.index_select(0, owned.run_ids)
        return own.add_(x) if weight is None else own.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple:
        weight, owned = ctx.weight, ctx.owned
        parts, real = grad, owned.valid_mask
        if len(owned.unpad_index) < len(grad):
            parts = grad.reshape(len(owned.unpad_index), -1, grad.shape[-1]).sum(
                1, dtype=torch.float32
            )
            real = real.float()
        seated = parts.index_select(0, owned.pad_index.flatten()).view(*owned.pad_index.shape, -1)
        sums = torch.bmm(real, seated)[:, 0].to(grad.dtype)
        if len(sums) < ctx.shape[0]:
            sums = grad.new_zeros(ctx.shape).index_copy_(0, owned.active_runs, sums)
        if weight is not None:
            grad = grad @ weight if ctx.needs_input_grad[0] else None
        return grad, None, sums, None


def route_rows(owner: np.ndarray, runs: int, tokens: np.ndarray | None = None) -> RunRouting:
    """`RunRouting` of arrays for the runs (B,) that rows belong to, out of `runs` (K).

    Args:
        tokens: (N,) the runs of the tokens, if they are packed.
    """
    if runs == 1:  # nothing is stacked
        return RunRouting(RunIndex(owner, None, None, None, None), None)
    return RunRouting(index_runs(owner), None if tokens is None else index_runs(tokens))


def route_chunks(owner: np.ndarray, runs: int, chunks: np.ndarray) -> RunRouting:
    """Return the `RunRouting` of tokens that fill whole chunks, of the runs `chunks` (C,)."""
    if runs == 1:
        return route_rows(owner, runs)
    tokens = index_runs(chunks, width_multiple=8)
    return RunRouting(index_runs(owner), tokens._replace(run_ids=np.repeat(tokens.run_ids, CHUNK)))


def index_runs(owner: np.ndarray, width_multiple: int = 1) -> RunIndex:
    """The `RunIndex` of arrays for the runs (B,) that rows, or tokens, belong to."""
    present, run, counts = np.unique(owner, return_inverse=True, return_counts=True)
    order, begins = np.argsort(owner, kind="stable"), counts.cumsum() - counts
    column = np.arange(-(-counts.max() // width_multiple) * width_multiple)
    real = column < counts[:, None]
    places = order[begins[:, None] + np.where(real, column, 0)]
    place = np.empty_like(owner)
    place[order] = np.arange(len(owner)) - np.repeat(begins, counts)
    place += run * len(column)
    return RunIndex(owner, present, places, real[:, None].astype(np.float32), place)


def forward_per_run(
    stack: "RunStack",
    module: torch.nn.Module,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a Linear or LayerNorm computes when each row takes the values of its own run.

    Args:
        weight, bias: (K, ...) where they train; else the module's own is used.
    """
    rows = stack.current_routing
    if rows is None:
        return type(module).forward(module, x)
    if isinstance(module, torch.nn.LayerNorm):
        gain = module.weight if weight is None else None
        x = F.layer_norm(x, module.normalized_shape, gain, None, module.eps)
        x = x if weight is None else x * rows.per_row(weight, x)
    elif weight is None:
        return rows.add_bias(bias, x, module.weight)
    else:
        x = rows.matmul(x, weight)
    if bias is not None:
        return rows.add_bias(bias, x)
    return x if module.bias is None else x + module.bias
