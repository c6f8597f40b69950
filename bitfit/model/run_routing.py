"""Modules that compute each row of a batch with the parameters of the row's run, out of K runs.

    Linear     x @ W.T + b           becomes   x @ W.T + b[run_ids]
    LayerNorm  g * norm(x) + b       becomes   g * norm(x) + b[run_ids]
    classifier x @ W.T + b           becomes   x @ W[run].T + b[run], the rows of a run together

The rest of the model is unchanged. No sum includes rows of two runs, so a run with an infinite
loss does not affect the others.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from bitfit.model.attention import CHUNK

if TYPE_CHECKING:
    from bitfit.model.run_stack import RunStack


class RunIndex(NamedTuple):
    """The run of each item (row, token or chunk of tokens), and the items of each run.

    The values are NumPy arrays on the host, then tensors on the device. The items of a run are
    padded to M, so that one matrix product handles all runs. For a single run all values but
    `run_ids` are None.
    """

    run_ids: torch.Tensor  # (N,) int64, the run of each item
    active_runs: torch.Tensor  # (k,) int64, the runs that have items, in ascending order
    pad_index: torch.Tensor  # (k, M) int64, the items of each run; its first item as padding
    valid_mask: torch.Tensor  # (k, 1, M) float, 0.0 at padding
    unpad_index: torch.Tensor  # (N,) int64, the position of each item in the flat (k * M)


class RunRouting(NamedTuple):
    """The runs of the rows of a micro-batch, and of the tokens if the rows are packed."""

    rows: RunIndex
    tokens: RunIndex | None  # `run_ids` of tokens; the rest of tokens, or of chunks of CHUNK tokens

    def to(self, dtype: torch.dtype) -> "RunRouting":
        """Return the same routing for parameters of a dtype."""
        if self.rows.valid_mask is None:
            return self
        return RunRouting._make(x and x._replace(valid_mask=x.valid_mask.to(dtype)) for x in self)

    def run_ids_of(self, label_index: torch.Tensor) -> torch.Tensor:
        """Return the run of each label of a batch, in the shape of `Batch.label_index`."""
        if label_index.dim() == 1:
            return self.rows.run_ids
        if self.rows.valid_mask is None:  # a single run
            return torch.zeros_like(label_index)
        if self.tokens:
            return self.tokens.run_ids[None]
        return self.rows.run_ids[:, None].expand_as(label_index)

    def token_index(self, x: torch.Tensor) -> RunIndex | None:
        """Return `tokens` if x is (1, N, d) with all tokens of packed rows, else None."""
        packed = self.tokens is not None and x.shape[:-1] == (1, len(self.tokens.run_ids))
        return self.tokens if packed else None

    def per_row(self, params: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Select the parameters (K, d) of each row, in a shape that broadcasts with (B, ..., d)."""
        shape = (len(self.rows.run_ids), *[1] * (like.dim() - 2), -1)
        # The gradient of `index_select` would be summed in any order on a GPU.
        return params[self.rows.run_ids].view(shape)

    def add_bias(
        self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add the bias (K, o) of each run to x (..., o), or to x @ weight.T with weight (o, i)."""
        if x.dim() == 2:
            return PerRunBias.apply(x, weight, bias, self.rows)
        if tokens := self.token_index(x):
            return PerRunBias.apply(x.squeeze(0), weight, bias, tokens)[None]
        x = x if weight is None else F.linear(x, weight)
        return x + self.per_row(bias, x)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply each row or token of x (..., i) by its run's weight (K, o, i): (..., o)."""
        index = self.token_index(x) or self.rows
        items = x.reshape(len(index.unpad_index), -1, x.shape[-1])  # (N, tokens of an item, i)
        padded = items[index.pad_index].flatten(1, 2)  # (k, M * tokens, i)
        product = torch.bmm(padded, weight.index_select(0, index.active_runs).mT)
        flat = product.view(-1, items.shape[1], product.shape[-1])  # (k * M, tokens, o)
        return flat[index.unpad_index].view(*x.shape[:-1], -1)


class BroadcastRuns(NamedTuple):
    """Every row belongs to every run: (B, i) becomes (K, B, o) in the first module that differs."""

    def per_row(self, params: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return params[:, None]

    def add_bias(
        self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        return (x if weight is None else F.linear(x, weight)) + bias[:, None]

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, weight.mT)


class PerRunBias(torch.autograd.Function):
    """x @ weight.T + bias[run_ids], or x + bias[run_ids], for items x (N, i) and bias (K, o).

    The gradient of a run's bias is the sum over the run's items. One matrix product computes it
    for all runs. Tokens that fill whole chunks are summed by chunk first, in float32.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor,
        index: RunIndex,
    ) -> torch.Tensor:
        ctx.weight, ctx.index, ctx.shape = weight, index, bias.shape
        out = bias.index_select(0, index.run_ids)
        return out.add_(x) if weight is None else out.addmm_(x, weight.t())

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        weight, index = ctx.weight, ctx.index
        items, valid = grad, index.valid_mask
        if len(index.unpad_index) < len(grad):  # the index is of chunks
            chunks = grad.reshape(len(index.unpad_index), -1, grad.shape[-1])
            items, valid = chunks.sum(1, dtype=torch.float32), valid.float()
        padded = items.index_select(0, index.pad_index.flatten()).view(*index.pad_index.shape, -1)
        sums = torch.bmm(valid, padded)[:, 0].to(grad.dtype)  # (k, o)
        if len(sums) < ctx.shape[0]:
            sums = grad.new_zeros(ctx.shape).index_copy_(0, index.active_runs, sums)
        if weight is not None:
            grad = grad @ weight if ctx.needs_input_grad[0] else None
        return grad, None, sums, None


def route_rows(
    run_ids: np.ndarray,
    num_runs: int,
    token_run_ids: np.ndarray | None = None,
    chunk_run_ids: np.ndarray | None = None,
) -> RunRouting:
    """Return the `RunRouting` of rows, as arrays.

    Args:
        run_ids: (B,) int64, the run of each row.
        token_run_ids: (N,) int64, the run of each token if the rows are packed.
        chunk_run_ids: (N / CHUNK,) int64 in its place if each run fills whole chunks.
    """
    if num_runs == 1:  # the parameters of the model are those of the run
        return RunRouting(RunIndex(run_ids, None, None, valid_mask=None, unpad_index=None), None)
    tokens = None if token_run_ids is None else index_runs(token_run_ids)
    if chunk_run_ids is not None:
        chunks = index_runs(chunk_run_ids, width_multiple=8)
        tokens = chunks._replace(run_ids=np.repeat(chunks.run_ids, CHUNK))
    return RunRouting(index_runs(run_ids), tokens)


def index_runs(run_ids: np.ndarray, width_multiple: int = 1) -> RunIndex:
    """Return the `RunIndex` of items with these runs (N,), as arrays; M is rounded up."""
    active_runs, run, counts = np.unique(run_ids, return_inverse=True, return_counts=True)
    order, starts = np.argsort(run_ids, kind="stable"), counts.cumsum() - counts
    column = np.arange(-(-counts.max() // width_multiple) * width_multiple)
    valid = column < counts[:, None]
    pad_index = order[starts[:, None] + np.where(valid, column, 0)]
    unpad_index = np.empty_like(run_ids)
    unpad_index[order] = np.arange(len(run_ids)) - np.repeat(starts, counts)
    unpad_index += run * len(column)
    return RunIndex(
        run_ids,
        active_runs,
        pad_index,
        valid_mask=valid[:, None].astype(np.float32),
        unpad_index=unpad_index,
    )


def forward_per_run(
    stack: "RunStack",
    module: torch.nn.Module,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of a Linear or LayerNorm, each row with the parameters of its run.

    Args:
        weight, bias: (K, ...) if they train; None: the module's, which all runs share. Those that
            need no gradient do not train in the selected group of runs.
    """
    routing = stack.current_routing
    trains = any(values.requires_grad for values in (weight, bias) if values is not None)
    if routing is None or not trains:
        return type(module).forward(module, x)
    if isinstance(module, torch.nn.LayerNorm):
        gain = module.weight if weight is None else None
        x = F.layer_norm(x, module.normalized_shape, gain, None, module.eps)
        x = x if weight is None else x * routing.per_row(weight, x)
    elif weight is None:
        return routing.add_bias(bias, x, module.weight)
    else:
        x = routing.matmul(x, weight)
    if bias is not None:
        return routing.add_bias(bias, x)
    return x if module.bias is None else x + module.bias
