"""How many tokens fit into the memory of a GPU, measured with a trial pass."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bitfit.model.batching import to_device
from bitfit.training.state import TrainState
from utils import LOGGER


def fit_token_budget_to_memory(state: TrainState, free: float) -> None:
    """Lower the token budget to a power of two that fits into `free` bytes.

    A trial pass of the longest training example counts the bytes that autograd keeps for the
    backward pass. Twice as much is reserved for gradients and for the grouped attention of
    `packing`, whose weights are not counted.
    """
    plan, stack = state.plan, state.stack
    tokens = plan.train.tokens
    row = np.array([tokens.lengths.argmax()])
    step = plan.forward.make_routed_batch(
        tokens, row, np.zeros(1, np.int64), num_runs=len(stack.runs)
    )
    device = stack.params.device
    batch, routing = to_device(step, device)
    plan.forward.model.train()
    with (
        torch.random.fork_rng([device] * (device.type == "cuda")),
        count_kept_bytes(plan.forward.model) as kept,
        stack.routing(routing),
    ):
        plan.forward(tokens, batch)
    most = free / 3 / (sum(kept.values()) / batch.token_index.numel())
    fitting = max(64, 2 ** int(math.log2(most)))
    if fitting < plan.token_budget.max_tokens:
        plan.token_budget.max_tokens = fitting
        LOGGER.info("--max-tokens %d: more does not fit into %.1f GiB of free memory", fitting,
                    free / 2**30)  # fmt: skip


@contextmanager
def count_kept_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Yield {storage: bytes} of the tensors that autograd keeps for the backward pass.

    The model's weights are not counted.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # The tensor itself would keep the autograd graph alive.

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield kept
