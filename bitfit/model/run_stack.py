"""The run axis: the trainable parameters of K runs are the rows of one (K, n) matrix.

A run is a pair of learning rate and seed. Its trainable parameters are one row of `params`, and
their gradients are the same row of `grads`. Clipping, optimizers and saved files therefore handle
flat rows, whatever the fine-tune type.

With one run, the model's parameters are views of the row. With several runs, all share the frozen
matrices: a batch holds rows of all runs, and `run_routing` adds the bias of a row's run.
A trial with two runs finds out whether a model allows this.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.batching import to_device
from bitfit.model.forward import Forward
from bitfit.model.packing import apply_dropout
from bitfit.model.precision import cast_parameters, without_tf32
from bitfit.model.run import Run
from bitfit.model.run_routing import BroadcastRuns, RunRouting, forward_per_run
from bitfit.model.trainable import Trainable, in_encoder, trains_matrices
from utils import is_out_of_memory


class RunStack:
    """The trainable parameters and gradients of K runs of one method on one model.

    Attributes:
        params, grads, initial_params: (K, n) float32.
        bad_step: (K,) int64, the step of a run's first non-finite loss or gradient; -1: none.
        slices: {parameter name: (start, stop)}, columns among the n.
        positions: {parameter name: (m,) int64 flat positions that train}, of partly trained ones.
        shares_encoder: whether only the classifier trains, so that all runs share the encoder.
        zero_gradient_mask: (n,) bool, columns that never get a gradient; None: all get one.
        current_routing: the runs of the rows within `routing`, else None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        trainable: Trainable,
        runs: Sequence[Run],
        init_run: Callable[[torch.nn.Module, int], None] | None = None,
        zero_gradient: dict[str, list[list[int]]] | None = None,
    ) -> None:
        """
        Args:
            trainable: {parameter name: None for all of it, or flat positions}.
            runs: more than one only if `reason_not_stackable` returns None.
            init_run: initializes the parameters of the model that depend on a run's seed.
            zero_gradient: {parameter name: [[start, stop], ...]}, entries without a gradient.
        """
        self.model, self.trainable, self.runs = model, trainable, runs
        self.parameters = dict(model.named_parameters())
        device = next(model.parameters()).device
        self.positions = {
            name: torch.as_tensor(positions, device=device)
            for name, positions in trainable.items()
            if positions is not None
        }
        self.slices = self._assign_columns()
        self.shares_encoder = not any(in_encoder(model, name) for name in trainable)
        self.params = torch.empty(len(runs), max(b for _, b in self.slices.values()), device=device)
        self.grads = torch.zeros_like(self.params)
        self.bad_step = torch.full((len(runs),), -1, device=device)
        self._read_params(init_run)
        self.initial_params = self.params.clone()
        self.zero_gradient_mask = self._mask_of(zero_gradient) if zero_gradient else None
        self.current_routing: RunRouting | BroadcastRuns | None = None
        self.leaves: dict[str, torch.Tensor] = {}  # within `patched`: tensors that get gradients
        self.compute_params = self.params  # within `patched`: (K, n) in the dtype of the model

    def _assign_columns(self) -> dict[str, tuple[int, int]]:
        slices, stop = {}, 0
        for name in self.trainable:
            positions = self.positions.get(name)
            size = self.parameters[name].numel() if positions is None else len(positions)
            slices[name] = stop, stop + size
            stop += size
        return slices

    def _read_params(self, init_run: Callable[[torch.nn.Module, int], None] | None) -> None:
        """Copy the model's parameters into each run's row, after the run's initialization."""
        for row, run in zip(self.params, self.runs, strict=True):
            if init_run:
                init_run(self.model, run.seed)
            for name, (a, b) in self.slices.items():
                values = self.parameters[name].data.flatten()
                row[a:b] = values[self.positions[name]] if name in self.positions else values

    def _mask_of(self, zero_gradient: dict[str, list[list[int]]]) -> torch.Tensor:
        """Return the columns (n,) bool of {parameter name: [[start, stop], ...]}."""
        mask = torch.zeros_like(self.params[0], dtype=torch.bool)
        for name, ranges in zero_gradient.items():
            column, _ = self.slices[name]
            for start, stop in ranges:
                mask[column + start : column + stop] = True
        return mask

    @contextmanager
    def patched(self, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Let the model compute in `dtype` with the runs' parameters; all others are frozen.

        On exit the model has the former storage and dtype, and the parameters of run 0.
        """
        patched: list[torch.nn.Module] = []
        requires_grad = {p: p.requires_grad for p in self.parameters.values()}
        try:
            with cast_parameters(self.model, dtype):
                same = dtype == self.params.dtype
                self.compute_params = self.params if same else aligned(self.params, dtype)
                for name, parameter in self.parameters.items():
                    parameter.requires_grad_(name in self.trainable)
                patched += self._patch()
                self.sync_to_model()
                yield
        finally:
            for module in patched:
                del module.forward
            self._drop_leaf_grads()
            for parameter, flag in requires_grad.items():
                parameter.requires_grad_(flag)
            self.compute_params, self.leaves = self.params, {}
            self.load_run(0)

    def _patch(self) -> Iterator[torch.nn.Module]:
        """Let modules compute with the runs' parameters and faster dropout; yield these modules."""
        stacked: dict[str, dict[str, torch.Tensor]] = {}
        num_runs = len(self.runs)
        for name, (a, b) in self.slices.items():
            parameter = self.leaves[name] = self.parameters[name]
            module_name, _, kind = name.rpartition(".")
            if num_runs > 1:
                leaf = self.compute_params[:, a:b].view(num_runs, *parameter.shape)
                self.leaves[name] = leaf.requires_grad_()
                stacked.setdefault(module_name, {})[kind] = leaf
            elif name not in self.positions:
                parameter.data = self.compute_params[0, a:b].view_as(parameter)
        for name, module in self.model.named_modules():
            if name in stacked:
                module.forward = partial(forward_per_run, self, module, **stacked[name])
                yield module
            elif type(module) is torch.nn.Dropout:
                module.forward = partial(apply_dropout, module)
                yield module

    def zero_grad(self) -> None:
        """Set `grads` to zero and drop gradients of an interrupted backward pass."""
        self.grads.zero_()
        self._drop_leaf_grads()

    def _drop_leaf_grads(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def accumulate_grads(self) -> None:
        """Add the gradients of one backward pass to `grads`."""
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.leaves.values()]
        for i, name in enumerate(self.leaves):
            if name in self.positions:
                grads[i] = grads[i].flatten()[self.positions[name]]
        self.grads += torch.cat([x.reshape(len(self.runs), -1) for x in grads], dim=1)
        self._drop_leaf_grads()

    @contextmanager
    def routing(self, routing: RunRouting | None = None) -> Iterator[None]:
        """Compute each row with the parameters of its run within the context.

        Args:
            routing: on the device. None: compute each row for every run, so that logits are
                (K, B, C). This is possible if only the classifier trains: the encoder then runs
                once for all runs.
        """
        self.current_routing = (
            BroadcastRuns() if routing is None else routing.to(self.compute_params.dtype)
        )
        try:
            yield
        finally:
            self.current_routing = None

    def finite_runs(self, step: int | None = None) -> np.ndarray:
        """Return the runs (k,) whose losses and gradients were finite, so far or before `step`.

        This call waits for the device.
        """
        bad_step = self.bad_step.cpu().numpy()
        return np.flatnonzero((bad_step < 0) | (step is not None and bad_step >= step))

    def mark_diverged(self, diverged: torch.Tensor, step: torch.Tensor) -> None:
        """Record `step` () for the runs in `diverged` (K,) bool that have not diverged before."""
        self.bad_step.copy_(self.bad_step.where(~diverged | (self.bad_step >= 0), step))

    def sync_to_model(self) -> None:
        """Copy `params` to where the model computes with them."""
        if self.compute_params is not self.params:
            self.compute_params.copy_(self.params)
        for name, positions in self.positions.items():
            a, b = self.slices[name]
            self.parameters[name].data.view(-1)[positions] = self.compute_params[0, a:b]

    def set_params(self, params: torch.Tensor) -> None:
        """Replace the parameters by `params` (K, n), and load run 0 into the model."""
        self.params.copy_(params)
        self.load_run(0)

    def load_run(self, run: int) -> None:
        """Copy the parameters of one run into the model."""
        row = self.params[run]
        for name, (a, b) in self.slices.items():
            target = self.parameters[name].data.view(-1)
            target[self.positions.get(name, slice(None))] = row[a:b].to(target.dtype)

    def named_params(
        self, run: int = 0, params: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return {name: values} of one run, in the parameter's shape, or flat if it trains partly.

        Args:
            params: (K, n) such as `initial_params`; None: the current parameters.
        """
        row = (self.params if params is None else params)[run]
        return {
            name: row[a:b] if name in self.positions else row[a:b].view_as(self.parameters[name])
            for name, (a, b) in self.slices.items()
        }


def aligned(params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return (K, n) parameters in a dtype, with rows at multiples of 16 bytes for fast copies."""
    runs, size = params.shape
    return params.new_empty((runs, -(-size // 8) * 8), dtype=dtype)[:, :size].copy_(params)


def reason_not_stackable(
    forward: Forward, trainable: Trainable, tokens: TokenizedSplit
) -> str | None:
    """Return why several runs cannot share a forward pass of this model, or None if they can."""
    model = forward.model
    if any(positions is not None for positions in trainable.values()):
        return "each run trains other randomly chosen parameters"
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
def stacked_logits_differ(forward: Forward, trainable: Trainable, tokens: TokenizedSplit) -> bool:
    """Return whether a stack of two runs gives other logits than each run alone, on two rows.

    An example is a model that reads the biases of its modules without calling the modules.
    """
    forward.model.eval()
    stack = RunStack(forward.model, trainable, [Run(0.0, 0), Run(0.0, 1)])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(stack.params.shape, generator=generator)
    stack.params += 0.1 * noise.to(stack.params.device)
    distinct = 1 if forward.equal_length else len(tokens.lengths)
    routed = forward.make_routed_batch(tokens, np.arange(2) % distinct, np.arange(2), num_runs=2)
    batch, routing = to_device(routed, stack.params.device)
    run_ids = routing.run_ids_of(batch.label_index)
    try:
        with without_tf32(), stack.patched():
            with stack.routing(routing):
                together = forward(tokens, batch)
            for run in range(2):
                stack.load_run(run)
                alone = forward(tokens, batch)
                mask = (run_ids == run) & (batch.label_index >= 0)
                off = (together - alone)[mask].abs().max()
                if not off < 2e-3 * together.abs().max():
                    return True
            return False
    except RuntimeError as error:  # for example shapes that do not match
        if is_out_of_memory(error):
            raise
        return True
    finally:
        stack.set_params(stack.initial_params)


def clip_grad_norms_(grads: torch.Tensor, max_norm: float = 1.0) -> torch.Tensor:
    """Scale each run's gradient (K, n) to a norm of at most `max_norm`, in place.

    Returns:
        (K,) the norms before.
    """
    norms = grads.norm(dim=1)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
