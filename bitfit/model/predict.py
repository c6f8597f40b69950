"""Precision, memory, and prediction."""

import logging
from contextlib import contextmanager

import numpy as np
import torch

from bitfit.distributed import ALONE
from bitfit.model.batching import batches_by_length
from utils import is_out_of_memory

LOGGER = logging.getLogger("bitfit")


@contextmanager
def computing_in(model, dtype):
    """Within: the model's weights are of `dtype`, and so is all that it computes.

    LayerNorm and softmax sum in float32 inside their kernels. On leaving, the model has its own
    values back, bit for bit, in their own storage.
    """
    own = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in own:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


@contextmanager
def full_float32():
    """Within: products of float32 are not cut to TF32, so that two ways can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Limit:
    """The most tokens in one pass; a device out of memory halves it."""

    def __init__(self, tokens, device=None):
        self.tokens, self.device = tokens, device or torch.device("cpu")

    def hold(self, work):
        """Call `work()`; when the device's memory does not do, again with half the tokens.

        The random generators are set back before, so that the dropout of the second try is what
        it would have been with the lower limit from the start.
        """
        state = random_state(self.device)
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.tokens < 2:
                    raise
                self.tokens //= 2
            LOGGER.warning("out of memory: again with --max-tokens %d", self.tokens)
            torch.cuda.empty_cache()
            set_random_state(self.device, state)


def free_bytes(device):
    """Return the bytes that this process can still allocate on a GPU."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@contextmanager
def keep_random_state(device):
    """Set the random generators back on leaving, as if nothing had been drawn within."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, state)


def random_state(device):
    """[the CPU generator's state, the device's own if it has one]"""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def set_random_state(device, state):
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


@torch.inference_mode()
def predict(forward, tokens, limit, rows=None, group=ALONE):
    """Logits of some rows or of all, (rows, C) float32 on the host, in the order given.

    Within `RunStack.routing()`: those of all runs, (K, rows, C). The ranks of a `group` compute
    some each, and all of them have the whole.
    """
    forward.model.eval()
    rows = np.arange(len(tokens.lengths)) if rows is None else rows
    group = group if len(rows) >= group.size else ALONE
    own = group.share(tokens.lengths[rows])

    def batches():
        lengths = tokens.lengths[rows[own]]
        parts = list(batches_by_length(lengths, limit.tokens, forward.equal))
        return parts, [forward.rows(tokens, rows[own[part]]) for part in parts]

    parts, outputs = limit.hold(batches)
    together = torch.cat(outputs, dim=-2)
    logits = together.new_zeros(*together.shape[:-2], len(rows), together.shape[-1])
    where = torch.from_numpy(own[np.concatenate(parts)]).to(logits.device)
    logits[..., where, :] = together
    group.sum_(logits)
    return logits.cpu().numpy()


def predict_runs(forward, stack, tokens, limit, rows, group=ALONE):
    """Yield (run, its logits) for {run: its rows}, (rows, C) each.

    Where only the classifier trains and all runs have the same rows, the encoder runs once for
    all of them; else one run after the other is put into the model.
    """
    first, *others = rows.values()
    if stack.shares_encoder and others and all(np.array_equal(own, first) for own in others):
        with stack.routing():
            logits = predict(forward, tokens, limit, first, group)
        yield from ((run, logits[run]) for run in rows)
        return
    for run, own in rows.items():
        stack.load_run(run)
        yield run, predict(forward, tokens, limit, own, group)
