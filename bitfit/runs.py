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

from bitfit.data import gather_rows, to_device
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


class Rows(NamedTuple):
    """Which run each row of a micro-batch belongs to; arrays on the host, then tensors."""

    owner: torch.Tensor  # (B,) its run
    seats: torch.Tensor  # (K, most) the rows of each run; B where a run has no more
    place: torch.Tensor  # (B,) where a row sits among the K * most seats

    def own(self, values, like):
        """Each row's part of (K, d) values, shaped to be added to (B, ..., d)."""
        shape = (len(self.owner), *[1] * (like.dim() - 2), -1)
        return values.index_select(0, self.owner).view(shape)

    def matmul(self, x, weight):
        """(B, i) by (K, o, i) -> (B, o): each row by its run's matrix, one product a run."""
        seated = F.pad(x, (0, 0, 0, 1))[self.seats]  # (K, most, i); nobody is a row of zeros
        return torch.bmm(seated, weight.mT).flatten(0, 1)[self.place]


class AllRuns(NamedTuple):
    """Every row belongs to every run: (B, i) becomes (K, B, o) where the runs first differ."""

    def own(self, values, like):
        return values[:, None]

    def matmul(self, x, weight):
        return torch.matmul(x, weight.mT)


def rows_of(owner, runs):
    """`Rows` of arrays for the runs (B,) that rows belong to, out of `runs` (K)."""
    if runs == 1:  # nothing is stacked
        return Rows(owner, None, None)
    counts = np.bincount(owner, minlength=runs)
    most, order = int(counts.max()), np.argsort(owner, kind="stable")
    place = np.empty_like(owner)
    place[order] = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    place += owner * most
    seats = np.full(runs * most, len(owner))
    seats[place] = np.arange(len(owner))
    return Rows(owner, seats.reshape(runs, most), place)


class Stack:
    """K runs of one method on one model.

    Attributes:
        values, grads, start: (K, n) float32: what trains, its gradient, its first values.
        bad_step: (K,) int64, the step of a run's first loss or gradient not finite; -1: none.
        slices: {parameter name: (start, stop)} into the n columns.
        shares_encoder: whether only the classifier trains, so that the encoder is the same for all.
    """

    def __init__(self, model, chosen, runs, draw=None):
        """Bind the model to this stack: what is not chosen is frozen.

        Args:
            chosen: {parameter name: None, or the flat positions that train}.
            runs: a list of `Run`; more than one only where `why_not_stackable` is None.
            draw: a function (model, seed) that draws what a run's seed decides of its start.
        """
        self.chosen, self.runs, self.rows = chosen, runs, None
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
        self._bind(model)

    def _bind(self, model):
        self.hooks, self.stacked = [], []
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.chosen)
        if len(self.runs) > 1:
            self._stack_modules(model)
            return
        for name, (a, b) in self.slices.items():
            parameter = self.parameters[name]
            if name in self.positions:
                self._gather(parameter, self.grads[0, a:b], self.positions[name])
            else:
                parameter.data = self.values[0, a:b].view_as(parameter)
                parameter.grad = self.grads[0, a:b].view_as(parameter)

    def _gather(self, leaf, gathered, positions):
        """Add the gradient's chosen entries to `gathered` as soon as it is there, and drop it."""

        def gather(leaf):
            try:
                gathered.add_(leaf.grad.flatten()[positions].view_as(gathered))
            finally:  # also without memory, or the step's second try would add to it
                leaf.grad = None

        self.hooks.append(leaf.register_post_accumulate_grad_hook(gather))

    def _stack_modules(self, model):
        """Let each module that trains compute with the values of all runs."""
        trained = {}
        for name, (a, b) in self.slices.items():
            shape = (len(self.runs), *self.parameters[name].shape)
            leaf = self.values[:, a:b].view(shape).requires_grad_()
            self._gather(leaf, self.grads[:, a:b], slice(None))
            module, _, kind = name.rpartition(".")
            trained.setdefault(module, {})[kind] = leaf
        for name, leaves in trained.items():
            module = model.get_submodule(name)
            module.forward = partial(stacked_forward, self, module, **leaves)
            self.stacked.append(module)

    @contextmanager
    def computing(self, rows=None):
        """Within: the model computes with all runs' values, each row with those of its own run.

        Args:
            rows: `Rows` on the device. None: each row is computed for every run, logits (K, B, C);
                possible where only the classifier trains, so that the encoder is run once for all.
        """
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
        """Put the values of partly trained parameters into them (one run: the rest are views)."""
        for name, positions in self.positions.items():
            a, b = self.slices[name]
            self.parameters[name].data.view(-1)[positions] = self.values[0, a:b]

    def put(self, run):
        """Let the model's own parameters hold one run's values."""
        row = self.values[run]
        for name, (a, b) in self.slices.items():
            into = self.parameters[name].data.view(-1)
            into[self.positions.get(name, slice(None))] = row[a:b]

    def named_values(self, run=0, values=None):
        """{name: what run `run` trains of it}: the parameter's shape, or flat at its positions."""
        row = (self.values if values is None else values)[run]
        return {
            n: row[a:b] if n in self.positions else row[a:b].view_as(self.parameters[n])
            for n, (a, b) in self.slices.items()
        }

    def release(self, values=None):
        """Leave the model plain, with storage of its own and no hooks; it holds run 0.

        Args:
            values: (K, n), to take in place of those trained last.
        """
        if values is not None:
            self.values.copy_(values)
        for hook in self.hooks:
            hook.remove()
        for module in self.stacked:
            del module.forward
        self.hooks, self.stacked = [], []
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in self.chosen and name not in self.positions:
                parameter.data = parameter.data.clone()
        self.put(0)


def stacked_forward(stack, module, x, weight=None, bias=None):
    """What a Linear or LayerNorm computes when each row takes the values of its own run.

    Args:
        weight, bias: (K, ...) where they train; else the module's own is used.
    """
    rows = stack.rows
    if rows is None:
        return type(module).forward(module, x)
    if isinstance(module, torch.nn.Linear):
        out = F.linear(x, module.weight) if weight is None else rows.matmul(x, weight)
    else:
        shared = module.weight if weight is None else None
        out = F.layer_norm(x, module.normalized_shape, shared, None, module.eps)
        out = out if weight is None else out * rows.own(weight, out)
    if bias is None:
        return out if module.bias is None else out + module.bias
    return out.add_(rows.own(bias, out))


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
    inputs = gather_rows(tokens, np.arange(2) % len(tokens.lengths))
    tf32 = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with stack.computing(to_device(rows_of(np.arange(2), 2), stack.values.device)):
            together = forward(inputs)
        for run in range(2):
            stack.put(run)
            alone = forward(inputs)[run]
            if not (together[run] - alone).abs().max() < 2e-3 * together.abs().max():
                return True
        return False
    except RuntimeError as error:  # shapes that do not meet
        if is_out_of_memory(error):
            raise
        return True
    finally:
        torch.set_float32_matmul_precision(tf32)
        stack.release(stack.start)


def clip_(grads, max_norm=1.0):
    """Scale each run's gradient (K, n) to at most `max_norm`, in place; returns the norms (K,)."""
    norms = grads.norm(dim=1)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
