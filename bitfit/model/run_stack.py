"""The run axis: what K runs train, as the K rows of one flat matrix.

A run is a (learning rate, seed). All that it changes is its row of `values` (K, n), and the
gradient is the same row of `grads`. So clipping, optimizers and saved files handle flat rows,
whatever the method.

One run: the model's own parameters are views of the row; any method trains so.

Many runs share every frozen matrix. A batch holds rows of all of them, and each row knows its run:
`stacked` says what a module then computes.
"""

from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from bitfit.model.batching import to_device
from bitfit.model.packing import drop
from bitfit.model.precision import cast_parameters, without_tf32
from bitfit.model.run_routing import BroadcastRuns, forward_per_run
from bitfit.model.trainable import in_encoder, trains_matrices
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


class RunStack:
    """K runs of one method on one model.

    Attributes:
        values, grads, start: (K, n) float32: what trains, its gradient, its first values.
        bad_step: (K,) int64, the step of a run's first loss or gradient not finite; -1: none.
        slices: {parameter name: (start, stop)} into the n columns.
        shares_encoder: whether only the classifier trains, so that the encoder is the same for all.
        fixed: (n,) bool, which columns get no gradient; None: none of them.
    """

    def __init__(self, model, trainable, runs, draw=None, fixed=None):
        """
        Args:
            trainable: {parameter name: None, or the flat positions that train}.
            runs: a list of `Run`; more than one only where `reason_not_stackable` is None.
            draw: a function (model, seed) that draws what a run's seed decides of its start.
            fixed: {parameter name: [[start, stop], ...]} of values that get no gradient.
        """
        self.model, self.trainable, self.runs, self.current_routing = model, trainable, runs, None
        self.leaves, self.compute_params = {}, None
        self.parameters = parameters = dict(model.named_parameters())
        device = next(model.parameters()).device
        self.positions = {
            name: torch.as_tensor(positions, device=device)
            for name, positions in trainable.items()
            if positions is not None
        }
        sizes = [len(self.positions.get(n, parameters[n].flatten())) for n in trainable]
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = {
            n: (stop - size, stop) for n, size, stop in zip(trainable, sizes, stops, strict=True)
        }
        self.shares_encoder = not any(in_encoder(model, name) for name in trainable)
        self.params = torch.empty(len(runs), stops[-1], device=device)
        self.grads = torch.zeros_like(self.params)
        self.bad_step = torch.full((len(runs),), -1, device=device)
        for row, run in zip(self.params, runs, strict=True):
            if draw:
                draw(model, run.seed)
            for name, (a, b) in self.slices.items():
                values = parameters[name].data.flatten()
                row[a:b] = values[self.positions[name]] if name in self.positions else values
        self.initial_params = self.params.clone()
        self.fixed = torch.zeros_like(self.params[0], dtype=torch.bool) if fixed else None
        for name, ranges in (fixed or {}).items():
            a, _ = self.slices[name]
            for start, stop in ranges:
                self.fixed[a + start : a + stop] = True

    @contextmanager
    def patched(self, dtype=torch.float32):
        """Within: the model computes in `dtype` with what trains, and all else is frozen.

        On leaving, it is as plain as it was, in its own storage, and holds the values of run 0.
        """
        patched, trained = [], {p: p.requires_grad for p in self.parameters.values()}
        try:
            with cast_parameters(self.model, dtype):
                self.compute_params = (
                    self.params if dtype == self.params.dtype else aligned(self.params, dtype)
                )
                for name, parameter in self.parameters.items():
                    parameter.requires_grad_(name in self.trainable)
                patched += self._patch()
                self.sync_to_model()
                yield
        finally:
            for module in patched:
                del module.forward
            self._drop_leaf_grads()
            for parameter, flag in trained.items():
                parameter.requires_grad_(flag)
            self.compute_params, self.leaves = None, {}
            self.load_run(0)

    def _patch(self):
        """Let modules compute with what trains, and draw dropout fast; yields those changed."""
        stacked, runs = {}, len(self.runs)
        for name, (a, b) in self.slices.items():
            parameter = self.leaves[name] = self.parameters[name]
            module, _, kind = name.rpartition(".")
            if runs > 1:
                leaf = self.compute_params[:, a:b].view(runs, *parameter.shape).requires_grad_()
                self.leaves[name] = stacked.setdefault(module, {})[kind] = leaf
            elif name not in self.positions:
                parameter.data = self.compute_params[0, a:b].view_as(parameter)
        for name, module in self.model.named_modules():
            if name in stacked:
                module.forward = partial(forward_per_run, self, module, **stacked[name])
                yield module
            elif type(module) is torch.nn.Dropout:
                module.forward = partial(drop, module)
                yield module

    def zero_grad(self):
        """Set `grads` to zero and drop gradients of an interrupted backward pass."""
        self.grads.zero_()
        self._drop_leaf_grads()

    def _drop_leaf_grads(self):
        for leaf in self.leaves.values():
            leaf.grad = None

    def accumulate_grads(self):
        """Add the gradients of one backward pass to `grads`."""
        own = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.leaves.values()]
        for i, name in enumerate(self.leaves):
            if name in self.positions:
                own[i] = own[i].flatten()[self.positions[name]]
        self.grads += torch.cat([x.reshape(len(self.runs), -1) for x in own], dim=1)
        self._drop_leaf_grads()

    @contextmanager
    def routing(self, rows=None):
        """Within: the model computes with all runs' values, each row with those of its own run.

        Args:
            rows: `RunRouting` on the device. None: each row is computed for every run, so that
                logits are (K, B, C); possible where only the classifier trains, so that the
                encoder is run once for all.
        """
        self.current_routing = (
            BroadcastRuns() if rows is None else rows.to(self.compute_params.dtype)
        )
        try:
            yield
        finally:
            self.current_routing = None

    def finite_runs(self, step=None):
        """The runs whose losses and gradients were finite, before `step` or so far.

        Waits for the device.
        """
        bad_step = self.bad_step.cpu().numpy()
        return np.flatnonzero((bad_step < 0) | (step is not None and bad_step >= step))

    def mark_diverged(self, bad, step):
        """Remember the step, a tensor (), at which runs first went bad; `bad` is (K,) bool."""
        self.bad_step.copy_(self.bad_step.where(~bad | (self.bad_step >= 0), step))

    def sync_to_model(self):
        """Put the values where the model computes with them."""
        if self.compute_params is not self.params:
            self.compute_params.copy_(self.params)
        for name, positions in self.positions.items():
            a, b = self.slices[name]
            self.parameters[name].data.view(-1)[positions] = self.compute_params[0, a:b]

    def set_params(self, values):
        """Hold these values (K, n), the model those of run 0."""
        self.params.copy_(values)
        self.load_run(0)

    def load_run(self, run):
        """Let the model's own parameters hold one run's values."""
        row = self.params[run]
        for name, (a, b) in self.slices.items():
            into = self.parameters[name].data.view(-1)
            into[self.positions.get(name, slice(None))] = row[a:b].to(into.dtype)

    def named_params(self, run=0, values=None):
        """{name: what run `run` trains of it}: the parameter's shape, or flat at its positions."""
        row = (self.params if values is None else values)[run]
        return {
            n: row[a:b] if n in self.positions else row[a:b].view_as(self.parameters[n])
            for n, (a, b) in self.slices.items()
        }


def aligned(values, dtype):
    """Return (K, n) values in another type, rows at multiples of 16 bytes: GPUs copy them so."""
    runs, size = values.shape
    return values.new_empty((runs, -(-size // 8) * 8), dtype=dtype)[:, :size].copy_(values)


def reason_not_stackable(forward, trainable, tokens):
    """Why several runs cannot share one pass through this model, or None if they can."""
    model = forward.model
    if any(positions is not None for positions in trainable.values()):
        return "each run trains a random choice of its own"
    if trains_matrices(model, trainable):
        return "the encoder's matrices train, so that no run can share them"
    for name in trainable:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) not in (torch.nn.Linear, torch.nn.LayerNorm):
            return f"{name} belongs to a {type(module).__name__}, not to a Linear or LayerNorm"
    if stacked_logits_differ(forward, trainable, tokens):
        return "this model does not compute with its Linear and LayerNorm modules alone"
    return None


@torch.no_grad()
def stacked_logits_differ(forward, trainable, tokens):
    """Whether a stack of two runs gives other logits than each run alone, on two rows.

    So it does if a model goes around its modules (reads their biases by itself, say).
    """
    forward.model.eval()
    stack = RunStack(forward.model, trainable, [Run(0.0, 0), Run(0.0, 1)])
    noise = torch.Generator().manual_seed(0)
    stack.params += 0.1 * torch.randn(stack.params.shape, generator=noise).to(stack.params.device)
    distinct = 1 if forward.equal_length else len(tokens.lengths)
    pair = forward.make_routed_batch(tokens, np.arange(2) % distinct, np.arange(2), 2)
    batch, rows = to_device(pair, stack.params.device)
    try:
        with without_tf32(), stack.patched():
            with stack.routing(rows):
                together = forward(tokens, batch)
            for run in range(2):
                stack.load_run(run)
                alone = forward(tokens, batch)[run]
                if not (together[run] - alone).abs().max() < 2e-3 * together.abs().max():
                    return True
            return False
    except RuntimeError as error:  # shapes that do not meet
        if is_out_of_memory(error):
            raise
        return True
    finally:
        stack.set_params(stack.initial_params)


def clip_grad_norms_(grads, max_norm=1.0):
    """Scale each run's gradient (K, n) to at most `max_norm`, in place; returns the norms (K,)."""
    norms = grads.norm(dim=1)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
