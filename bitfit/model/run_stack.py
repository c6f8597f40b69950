"""The run axis: the trainable parameters of K runs are the rows of one (K, n) matrix.

A run is a learning rate with its seeds. Its trainable parameters are one row of `params`, and
their gradients are the same row of `grads`. Clipping, optimizers and saved files therefore handle
flat rows, whatever the fine-tune type.

With one run, the model's parameters are views of the row. With several runs, all share the frozen
matrices: a batch holds rows of all runs, and `run_routing` adds the bias of a row's run.
`forward_trials` finds out with two runs whether a model allows this.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from bitfit.model.packing import apply_dropout
from bitfit.model.precision import cast_parameters
from bitfit.model.run import Run
from bitfit.model.run_routing import BroadcastRuns, RunRouting, forward_per_run
from bitfit.model.trainable import Trainable, in_encoder

ZeroGradient = dict[str, list[list[int]]]  # {parameter name: [[start, stop], ...]}


class RunGroup(NamedTuple):
    """The runs of a stack that train the same parameters.

    Each group has separate micro-batches, clipping, optimizer state and scoring. So its numbers
    are those of a command without the other groups, on a CPU bit by bit.
    """

    runs: list[int]
    trainable: Trainable
    rows: torch.Tensor | slice  # (k,) int64
    entries: tuple[torch.Tensor | slice, ...]  # the index of (k, m) in (K, n) matrices
    fixed: torch.Tensor | None  # (m,) bool, columns that never get a gradient; None: all get one


class RunStack:
    """The trainable parameters and gradients of K runs of one method on one model.

    Attributes:
        params, grads, initial_params: (K, n) float32.
        last_step: (K,) int64, the step at which a run ended: of its first non-finite loss or
            gradient, or the last before it was stopped; -1: it trains.
        slices: {parameter name: (start, stop)}, columns among the n.
        positions: {parameter name: (m,) int64 flat positions that train}, of partly trained ones.
        groups: the runs, by the parameters that they train.
        shares_encoder: whether only the classifier trains, in the selected group if there are more.
        current_routing: the runs of the rows within `routing`, else None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        trainable: Trainable,
        runs: Sequence[Run],
        init_run: Callable[[torch.nn.Module, int], None] | None = None,
        selections: Sequence[tuple[Trainable, ZeroGradient]] = (),
    ) -> None:
        """
        Args:
            trainable: {parameter name: None for all of it, or flat positions}.
            runs: more than one only if `reason_not_stackable` returns None.
            init_run: initializes the parameters of the model that depend on a run's `seed`.
            selections: (trainable, zero_gradient) of each run: its parameters, and their ranges
                that get no gradient; empty: all runs train all of `trainable`.
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
        self.last_step = torch.full((len(runs),), -1, device=device)
        self._read_params(init_run)
        self.initial_params = self.params.clone()
        self.groups = self._make_groups(selections or [(trainable, {})] * len(runs))
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

    def _make_groups(self, selections: Sequence[tuple[Trainable, ZeroGradient]]) -> list[RunGroup]:
        """Return the groups of runs whose (trainable, zero_gradient) name the same parameters."""
        names = [tuple(trainable) for trainable, _ in selections]
        groups, device = [], self.params.device
        for of_group in dict.fromkeys(names):
            runs = [k for k, of_run in enumerate(names) if of_run == of_group]
            trainable, zero_gradient = selections[runs[0]]
            rows: torch.Tensor | slice = slice(None)
            entries: tuple = (slice(None), slice(None))
            columns = torch.cat([torch.arange(*self.slices[name]) for name in trainable])
            if len(runs) < len(names):
                rows = torch.tensor(runs, device=device)
                entries = rows[:, None], columns.to(device)
            fixed = self._mask_of(zero_gradient)[columns] if zero_gradient else None
            groups.append(RunGroup(runs, trainable, rows, entries=entries, fixed=fixed))
        return groups

    def _mask_of(self, zero_gradient: ZeroGradient) -> torch.Tensor:
        """Return the columns (n,) bool of {parameter name: [[start, stop], ...]}."""
        mask = torch.zeros_like(self.params[0], dtype=torch.bool)
        for name, ranges in zero_gradient.items():
            column, _ = self.slices[name]
            for start, stop in ranges:
                mask[column + start : column + stop] = True
        return mask

    def select_group(self, number: int) -> None:
        """Let the model compute with the trained parameters of one group.

        The modules that the group does not train hold the values of its first run.
        """
        if len(self.groups) > 1:
            group = self.groups[number]
            self.load_run(group.runs[0])
            self.shares_encoder = not any(in_encoder(self.model, name) for name in group.trainable)
            for name, leaf in self.leaves.items():
                leaf.requires_grad_(name in group.trainable)

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
                    parameter.requires_grad_(len(self.runs) == 1 and name in self.trainable)
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

    def active_runs(self, step: int | None = None) -> np.ndarray:
        """Return the runs (k,) that have not ended, so far or before `step`.

        This call waits for the device.
        """
        last_step = self.last_step.cpu().numpy()
        return np.flatnonzero((last_step < 0) | (step is not None and last_step >= step))

    def end_runs(self, ended: torch.Tensor, step: torch.Tensor) -> None:
        """Record `step` () for the runs in `ended` (K,) bool that have not ended before."""
        self.last_step.copy_(self.last_step.where(~ended | (self.last_step >= 0), step))

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


def clip_grad_norms_(grads: torch.Tensor, max_norm: float = 1.0) -> torch.Tensor:
    """Scale each run's gradient (K, n) to a norm of at most `max_norm`, in place.

    Returns:
        (K,) the norms before.
    """
    norms = grads.norm(dim=1)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
