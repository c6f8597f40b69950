"""Precision, memory, and prediction."""

import logging
from contextlib import contextmanager

import numpy as np
import torch

from bitfit.data import evaluation_batches, gather_rows
from utils import is_out_of_memory

LOGGER = logging.getLogger("bitfit")


@contextmanager
def precision_of(model, precision, device):
    """Run in "fp32" or "bf16".

    Under bf16 the frozen matrices are held in bf16: autocast alone would cast them again at each
    step. On leaving, the model has its own frozen values back, bit for bit.
    """
    if precision == "fp32":
        yield
        return
    frozen = [
        m.weight
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad
    ]
    own = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.bfloat16()
        # Without its cache: that would hold the trained values as they were at first use.
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            yield
    finally:
        for weight, data in zip(frozen, own, strict=True):
            weight.data = data


class Limit:
    """The most padded tokens in one micro-batch; a device out of memory halves it."""

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


def random_state(device):
    """[the CPU generator's state, the device's own if it has one]"""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def set_random_state(device, state):
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


@torch.inference_mode()
def predict(forward, tokens, limit, rows=None):
    """Logits of some rows or of all, (rows, C) float32 on the host, in the order given.

    Within `Stack.computing()`: those of all runs, (K, rows, C).
    """
    forward.model.eval()
    rows = np.arange(len(tokens.lengths)) if rows is None else rows

    def batches():
        parts = list(evaluation_batches(tokens.lengths[rows], limit.tokens))
        return parts, [forward(gather_rows(tokens, rows[part])) for part in parts]

    parts, outputs = limit.hold(batches)
    together = torch.cat(outputs, dim=-2)
    logits = torch.empty_like(together)
    logits[..., torch.from_numpy(np.concatenate(parts)).to(logits.device), :] = together
    return logits.cpu().numpy()


def predict_runs(forward, stack, tokens, limit, rows):
    """Yield (run, its logits) for {run: its rows}, (rows, C) each.

    Where only the classifier trains and all runs have the same rows, the encoder runs once for
    all of them; else one run after the other is put into the model.
    """
    first, *others = rows.values()
    if stack.shares_encoder and others and all(np.array_equal(own, first) for own in others):
        with stack.computing():
            logits = predict(forward, tokens, limit, first)
        yield from ((run, logits[run]) for run in rows)
        return
    for run, own in rows.items():
        stack.put(run)
        yield run, predict(forward, tokens, limit, own)
