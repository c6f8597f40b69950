"""The run axis: what K runs train, as the K rows of one flat matrix.

A run is a (learning rate, seed). All that it changes is one row of `values` (K, n): the model's
trained parameters are views of that row, their gradients are views of the same row of `grads`.
So clipping, the optimizer and what is saved handle flat rows, whatever the method.
"""

from typing import NamedTuple

import torch


class Run(NamedTuple):
    learning_rate: float
    seed: int


class Stack:
    """K runs of one method on one model (K = 1: the model itself holds the run).

    Attributes:
        values, grads: (K, n) float32, what trains and its gradient.
        finite: (K,) bool, False from a run's first loss or gradient that is not finite.
        slices: {parameter name: (start, stop)} into the n columns.
    """

    def __init__(self, model, chosen, runs):
        """Bind the model's trained parameters to this stack; all others are frozen.

        Args:
            chosen: {parameter name: None, or the flat positions that train}.
            runs: a list of one `Run`.
        """
        self.chosen, self.runs = chosen, runs
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
        self.values = torch.empty(len(runs), stops[-1], device=device)
        self.grads = torch.zeros_like(self.values)
        self.finite = torch.ones(len(runs), dtype=torch.bool, device=device)
        self.hooks = []
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
            if name in self.positions:
                self._bind_positions(parameter, name)
            elif name in chosen:
                self._bind_whole(parameter, name)
        self.start = self.values.clone()

    def _bind_whole(self, parameter, name):
        start, stop = self.slices[name]
        self.values[0, start:stop] = parameter.data.flatten()
        parameter.data = self.values[0, start:stop].view_as(parameter)
        parameter.grad = self.grads[0, start:stop].view_as(parameter)

    def _bind_positions(self, parameter, name):
        """Gather the chosen entries of the gradient as soon as it is there, and drop the rest."""
        start, stop = self.slices[name]
        positions, gathered = self.positions[name], self.grads[0, start:stop]
        self.values[0, start:stop] = parameter.data.flatten()[positions]

        def gather(parameter):
            gathered.add_(parameter.grad.flatten()[positions])
            parameter.grad = None

        self.hooks.append(parameter.register_post_accumulate_grad_hook(gather))

    def write_back(self):
        """Put the values of partly trained parameters into them (whole ones are views)."""
        for name, positions in self.positions.items():
            start, stop = self.slices[name]
            self.parameters[name].data.view(-1)[positions] = self.values[0, start:stop]

    def named_values(self, run=0, values=None):
        """{name: what run `run` trains of it}: the parameter's shape, or flat at its positions."""
        row = (self.values if values is None else values)[run]
        return {
            n: row[a:b] if n in self.positions else row[a:b].view_as(self.parameters[n])
            for n, (a, b) in self.slices.items()
        }

    def release(self, values=None):
        """Leave the model plain: parameters with storage of their own, no hooks, no gradients.

        Args:
            values: (K, n), to take in place of those trained last.
        """
        if values is not None:
            self.values.copy_(values)
        self.write_back()
        for hook in self.hooks:
            hook.remove()
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in self.chosen and name not in self.positions:
                parameter.data = parameter.data.clone()


def clip_(grads, max_norm=1.0):
    """Scale each run's gradient (K, n) to at most `max_norm`, in place; returns the norms (K,)."""
    norms = grads.norm(dim=1)
    grads.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
