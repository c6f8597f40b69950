"""Predictions: the logits of rows, by one run or by all runs of a stack."""

from collections.abc import Iterator

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model.batching import batches_by_length
from bitfit.model.forward import Forward
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget


@torch.inference_mode()
def predict(
    forward: Forward,
    tokens: TokenizedSplit,
    budget: TokenBudget,
    rows: np.ndarray | None = None,
    group: Group = SINGLE_PROCESS,
) -> np.ndarray:
    """Logits of some rows or of all, (rows, C) float32 on the host, in the order given.

    Within `RunStack.routing()`: those of all runs, (K, rows, C). The ranks of a `group` compute
    some each, and all of them have the whole.
    """
    forward.model.eval()
    rows = np.arange(len(tokens.lengths)) if rows is None else rows
    group = group if len(rows) >= group.size else SINGLE_PROCESS
    own = group.shard_rows(tokens.lengths[rows])

    def batches() -> tuple[list[np.ndarray], list[torch.Tensor]]:
        lengths = tokens.lengths[rows[own]]
        parts = list(batches_by_length(lengths, budget.max_tokens, forward.equal_length))
        return parts, [forward.logits(tokens, rows[own[part]]) for part in parts]

    parts, outputs = budget.retry_on_oom(batches)
    together = torch.cat(outputs, dim=-2)
    logits = together.new_zeros(*together.shape[:-2], len(rows), together.shape[-1])
    where = torch.from_numpy(own[np.concatenate(parts)]).to(logits.device)
    logits[..., where, :] = together
    group.all_reduce_sum_(logits)
    return logits.cpu().numpy()


def predict_runs(
    forward: Forward,
    stack: RunStack,
    tokens: TokenizedSplit,
    budget: TokenBudget,
    rows: dict[int, np.ndarray],
    group: Group = SINGLE_PROCESS,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (run, its logits) for {run: its rows}, (rows, C) each.

    Where only the classifier trains and all runs have the same rows, the encoder runs once for
    all of them; else one run after the other is put into the model.
    """
    first, *others = rows.values()
    if stack.shares_encoder and others and all(np.array_equal(own, first) for own in others):
        with stack.routing():
            logits = predict(forward, tokens, budget, first, group)
        yield from ((run, logits[run]) for run in rows)
        return
    for run, own in rows.items():
        stack.load_run(run)
        yield run, predict(forward, tokens, budget, own, group)
