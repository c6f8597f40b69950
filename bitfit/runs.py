"""The run axis: what K runs train, as the K rows of one flat matrix.

A run is a (learning rate, seed). All that it changes is its row of `values` (K, n), and the
gradient is the same row of `grads`. So clipping, optimizers and saved files handle flat rows,
whatever the method.

One run: the model's own parameters are views of the row; any method trains so.

Many runs share every frozen matrix. A batch holds rows of all of them, and each row knows its run:

    Linear     x @ W.T + b           becomes   x @ W.T + b[run of the row]
    LayerNorm  g * norm(x) + b       becomes   g * norm(x) + b[run of the row]
    classifier x @ W.T + b           becomes   x @ W[run].T + b[run], the rows of a run together

Nothing else of the model changes, and no sum runs over rows of two runs: what one run does, even
an infinite loss, cannot reach another.
"""

from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from bitfit.data import to_device
from bitfit.packing import drop
from bitfit.predict import computing_in
from bitfit.trainable import in_encoder, trains_matrices
from utils import is_out_of_memory


class Run(NamedTuple):
    """One training: its learning rate, and the seed of its classifier and data order."""

    learning_rate: float
    seed: int

    @property
    def name(self):
        return f"lr{self.learning_rate}_seed{self.seed}"

    @property
    def caption(self):
        return f"learning rate {self.learning_rate:g}, seed {self.seed}"


class Owned(NamedTuple):
    """Which run each row, or token, belongs to, and those of each run: arrays, then tensors."""

    owner: torch.Tensor  # (B,) its run
    present: torch.Tensor  # (k,) the runs from the first to the last that have any
    places: torch.Tensor  # (k, most) the rows of each; where it has no more, its first
    real: torch.Tensor  # (k, 1, most) 0.0 there
    place: torch.Tensor  # (B,) where a row sits among the k * most places


class Rows(NamedTuple):
    """Whose the rows of a pass are, and the tokens if they are packed."""

    rows: Owned
    tokens: Owned | None

    def own(self, values, like):
        """Each row's part of (K, d) values, shaped to be added to (B, ..., d)."""
        shape = (len(self.rows.owner), *[1] * (like.dim() - 2), -1)
        return values.index_select(0, self.rows.owner).view(shape)

    def add(self, bias, x, weight=None):
        """Each token's bias (K, o) added to x (..., o), or to its product with a weight (o, i)."""
        if self.tokens and len(x) == 1 and x.shape[1] == len(self.tokens.owner):
            return OwnBias.apply(x.squeeze(0), weight, bias, self.tokens)[None]
        x = x if weight is None else F.linear(x, weight)
        return x + self.own(bias, x)

    def matmul(self, x, weight):
        """(B, i) by (K, o, i) -> (B, o): each row by its run's matrix, one product a run."""
        seated = x[self.rows.places]  # (k, most, i)
        product = torch.bmm(seated, weight.index_select(0, self.rows.present).mT)
        return product.flatten(0, 1)[self.rows.place]


class AllRuns(NamedTuple):
    """Every row belongs to every run: (B, i) becomes (K, B, o) where the runs first differ."""

    def own(self, values, like):
        return values[:, None]

    def add(self, bias, x, weight=None):
        return (x if weight is None else F.linear(x, weight)) + bias[:, None]

    def matmul(self, x, weight):
        return torch.matmul(x, weight.mT)


class OwnBias(torch.autograd.Function):
    """x @ weight.T + bias[owner], or x + bias[owner], for packed tokens (N, i), biases (K, o).

    The gradient of a run's bias is a sum over its tokens alone: one product, whatever K.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, tokens):
        ctx.weight, ctx.tokens, ctx.shape = weight, tokens, bias.shape
        own = bias.index_select(0, tokens.owner)
        return own.add_(x) if weight is None else own.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        weight, tokens = ctx.weight, ctx.tokens
        seated = grad.index_select(0, tokens.places.flatten()).view(*tokens.places.shape, -1)
        sums = torch.bmm(tokens.real, seated)[:, 0]
        if len(sums) < ctx.shape[0]:
            sums = grad.new_zeros(ctx.shape).index_copy_(0, tokens.present, sums)
        return grad if weight is None else grad @ weight, None, sums, None


def rows_of(owner, runs, lengths=None):
    """`Rows` of arrays for the runs (B,) that rows belong to, out of `runs` (K).

    Args:
        lengths: (B,) tokens of the rows, if they are packed.
    """
    if runs == 1:  # nothing is stacked
        return Rows(Owned(owner, None, None, None, None), None)
    tokens = None if lengths is None else owned(np.repeat(owner, lengths))
    return Rows(owned(owner), tokens)


def owned(owner):
    """The `Owned` of arrays for the runs (B,) that rows, or tokens, belong to."""
    present = np.arange(owner.min(), owner.max() + 1)
    run, order = owner - present[0], np.argsort(owner, kind="stable")
    counts = np.bincount(run)
    begins = counts.cumsum() - counts
    column = np.arange(counts.max())
    real = column < counts[:, None]
    places = order[np.where(real, begins[:, None] + column, begins[:, None] % len(order))]
    place = np.empty_like(owner)
    place[order] = np.arange(len(owner)) - np.repeat(begins, counts)
    return Owned(owner, present, places, real[:, None].astype(np.float32),
                 place + run * len(column))  # fmt: skip


class Stack:
    """K runs of one method on one model.

    Attributes:
        values, grads, start: (K, n) float32: what trains, its gradient, its first values.
        bad_step: (K,) int64, the step of a run's first loss or gradient not finite; -1: none.
        slices: {parameter name: (start, stop)} into the n columns.
        shares_encoder: whether only the classifier trains, so that the encoder is the same for all.
    """

    def __init__(self, model, chosen, runs, draw=None):
        """
        Args:
            chosen: {parameter name: None, or the flat positions that train}.
            runs: a list of `Run`; more than one only where `why_not_stackable` is None.
            draw: a function (model, seed) that draws what a run's seed decides of its start.
        """
        self.model, self.chosen, self.runs, self.rows = model, chosen, runs, None
        self.leaves, self.gathered, self.work = {}, {}, None
        self.parameters = parameters = dict(model.named_parameters())
        device = next(model.parameters()).device
        self.positions = {
            name: torch.as_tensor(positions, device=device)
            for name, positions in chosen.items()
            if positions is not None
        }
        sizes = [len(self.positions.get(n, parameters[n].flatten())) for n in chosen]
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {
            n: (stop - size, stop) for n, size, stop in zip(chosen, sizes, stops, strict=True)
        }
        self.shares_encoder = not any(in_encoder(model, name) for name in chosen)
        self.values = torch.empty(len(runs), stops[-1], device=device)
        self.grads = torch.zeros_like(self.values)
        self.bad_step = torch.full((len(runs),), -1, device=device)
        for row, run in zip(self.values, runs, strict=True):
            if draw:
                draw(model, run.seed)
            for name, (a, b) in self.slices.items():
                values = parameters[name].data.flatten()
                row[a:b] = values[self.positions[name]] if name in self.positions else values
        self.start = self.values.clone()

    @contextmanager
    def bound(self, dtype=torch.float32):
        """Within: the model computes in `dtype` with what trains, and all else is frozen.

        On leaving, it is as plain as it was, in its own storage, and holds the values of run 0.
        """
        hooks, patched = [], []
        try:
            with computing_in(self.model, dtype):
                self.work = self.values if dtype == self.values.dtype else self.values.to(dtype)
                for name, parameter in self.parameters.items():
                    parameter.requires_grad_(name in self.chosen)
                for name, positions in self.positions.items():
                    hooks.append(self._gather(name, positions))
                patched += self._patch()
                self.write_back()
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in patched:
                del module.forward
            self.forget()
            self.work, self.leaves = None, {}
            self.put(0)

    def _patch(self):
        """Let modules compute with what trains, and draw dropout fast; yields those changed."""
        self.leaves, stacked = {}, {}
        for name, (a, b) in self.slices.items():
            parameter = self.parameters[name]
            if name in self.positions:
                self.leaves[name] = parameter
            elif len(self.runs) == 1:
                parameter.data = self.work[0, a:b].view_as(parameter)
                self.leaves[name] = parameter
            else:
                leaf = self.work[:, a:b].view(len(self.runs), *parameter.shape).requires_grad_()
                self.leaves[name] = leaf
                module, _, kind = name.rpartition(".")
                stacked.setdefault(module, {})[kind] = leaf
        for name, module in self.model.named_modules():
            if name in stacked:
                module.forward = partial(stacked_forward, self, module, **stacked[name])
                yield module
            elif type(module) is torch.nn.Dropout:
                module.forward = partial(drop, module)
                yield module

    def _gather(self, name, positions):
        """Keep the chosen entries of a gradient as soon as it is there, and drop the rest."""

        def gather(leaf):
            self.gathered[name] = leaf.grad.flatten()[positions]
            leaf.grad = None

        return self.parameters[name].register_post_accumulate_grad_hook(gather)

    def forget(self):
        """Drop the gradients of a backward pass that `collect` has not taken."""
        self.gathered = {}
        for leaf in self.leaves.values():
            leaf.grad = None

    def collect(self):
        """Add the gradients of one backward pass to `grads`."""
        whole = {n: leaf.grad for n, leaf in self.leaves.items() if leaf.grad is not None}
        parts = self.gathered | whole
        own = [
            parts[n].reshape(len(self.runs), -1) if n in parts else self.work[:, a:b] * 0
            for n, (a, b) in self.slices.items()
        ]
        self.grads += torch.cat(own, dim=1)
        self.forget()

    @contextmanager
    def computing(self, rows=None):
        """Within: the model computes with all runs' values, each row with those of its own run.

        Args:
            rows: `Rows` on the device. None: each row is computed for every run, logits (K, B, C);
                possible where only the classifier trains, so that the encoder is run once for all.
        """
        if rows is not None and rows.tokens:
            real = rows.tokens.real.to(self.work.dtype)
            rows = rows._replace(tokens=rows.tokens._replace(real=real))
        self.rows = AllRuns() if rows is None else rows
        try:
            yield
        finally:
            self.rows = None

    def alive(self, step=None):
        """The runs whose losses and gradients were finite, before `step` or so far.

        Waits for the device.
        """
        bad_step = self.bad_step.cpu().numpy()
        return np.flatnonzero((bad_step < 0) | (step is not None and bad_step >= step))

    def note_bad(self, bad, step):
        """Remember the step, a tensor (), at which runs first went bad; `bad` is (K,) bool."""
        self.bad_step.copy_(self.bad_step.where(~bad | (self.bad_step >= 0), step))

    def write_back(self):
        """Put the values where the model computes with them."""
        if self.work is not self.values:
            self.work.copy_(self.values)
        for name, positions in self.positions.items():
            a, b = self.slices[name]
            self.parameters[name].data.view(-1)[positions] = self.work[0, a:b]

    def put(self, run):
        """Let the model's own parameters hold one run's values."""
        row = self.values[run]
        for name, (a, b) in self.slices.items():
            into = self.parameters[name].data.view(-1)
            into[self.positions.get(name, slice(None))] = row[a:b].to(into.dtype)

    def named_values(self, run=0, values=None):
        """{name: what run `run` trains of it}: the parameter's shape, or flat at its positions."""
        row = (self.values if values is None else values)[run]
        return {
            n: row[a:b] if n in self.positions else row[a:b].view_as(self.parameters[n])
            for n, (a, b) in self.slices.items()
        }


def stacked_forward(stack, module, x, weight=None, bias=None):
    """What a Linear or LayerNorm computes when each row takes the values of its own run.

    Args:
        weight, bias: (K, ...) where they train; else the module's own is used.
    """
    rows = stack.rows
    if rows is None:
        return type(module).forward(module, x)
    if isinstance(module, torch.nn.LayerNorm):
        gain = module.weight if weight is None else None
        x = F.layer_norm(x, module.normalized_shape, gain, None, module.eps)
        x = x if weight is None else x * rows.own(weight, x)
    elif weight is None:
        return rows.add(bias, x, module.weight)
    else:
        x = rows.matmul(x, weight)
    if bias is not None:
        return rows.add(bias, x)
    return x if module.bias is None else x + module.bias


def why_not_stackable(forward, chosen, tokens):
    """Why several runs cannot share one pass through this model, or None if they can."""
    model = forward.model
    if any(positions is not None for positions in chosen.values()):
        return "each run trains a random choice of its own"
    if trains_matrices(model, chosen):
        return "the encoder's matrices train, so that no run can share them"
    for name in chosen:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) not in (torch.nn.Linear, torch.nn.LayerNorm):
            return f"{name} belongs to a {type(module).__name__}, not to a Linear or LayerNorm"
    if stacked_pass_differs(forward, chosen, tokens):
        return "this model does not compute with its Linear and LayerNorm modules alone"
    return None


@torch.no_grad()
def stacked_pass_differs(forward, chosen, tokens):
    """Whether a stack of two runs gives other logits than each run alone, on two rows.

    So it does if a model goes around its modules (reads their biases by itself, say).
    """
    forward.model.eval()
    stack = Stack(forward.model, chosen, [Run(0.0, 0), Run(0.0, 1)])
    noise = torch.Generator().manual_seed(0)
    stack.values += 0.1 * torch.randn(stack.values.shape, generator=noise).to(stack.values.device)
    batch = forward.batch(tokens, np.arange(2) % len(tokens.lengths))
    rows = rows_of(np.arange(2), 2, batch.packing and tokens.lengths[batch.rows])
    batch, rows = to_device((batch, rows), stack.values.device)
    tf32 = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with stack.bound():
            with stack.computing(rows):
                together = forward(tokens, batch)
            for run in range(2):
                stack.put(run)
                alone = forward(tokens, batch)[run]
                if not (together[run] - alone).abs().max() < 2e-3 * together.abs().max():
                    return True
            return False
    except RuntimeError as error:  # shapes that do not meet
        if is_out_of_memory(error):
            raise
        return True
    finally:
        torch.set_float32_matmul_precision(tf32)
        stack.values.copy_(stack.start)
        stack.put(0)


def clip_(grads, max_norm=1.0):
    """Scale each run's gradient (K, n) to at most `max_norm`, in place; returns the norms (K,)."""
    norms = grads.norm(dim=1)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
