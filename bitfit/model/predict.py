"""Predictions: the logits of rows, by one run or by all runs of a stack."""

from collections.abc import Iterator

import numpy as np
import torch

from bitfit.data.splits import word_positions
from bitfit.data.tokens import TokenizedSplit
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model import batching
from bitfit.model.forward import Forward, select_labels
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget


@torch.inference_mode()
def predict(
    forward: Forward, tokens: TokenizedSplit, budget: TokenBudget, rows: np.ndarray | None = None,
    group: Group = SINGLE_PROCESS,
) -> np.ndarray:  # fmt: skip
    """Return the logits of all rows, or of `rows`, in the given order.

    The ranks of a group compute some rows each, and all of them get the logits of all rows.

    Args:
        rows: (B,) int64 row numbers; None: all.

    Returns:
        (B, C) float32 on the host, or for tagging (words, C); within `RunStack.routing()` the
        logits of all runs, (K, B, C).
    """
    forward.model.eval()
    rows = np.arange(len(tokens.lengths)) if rows is None else rows
    group = group if len(rows) >= group.size else SINGLE_PROCESS
    shard = group.shard_rows(tokens.lengths[rows])  # positions in `rows`

    def compute() -> tuple[list[np.ndarray], list[torch.Tensor]]:
        lengths, equal_length = tokens.lengths[rows[shard]], forward.equal_length
        parts = batching.split_into_micro_batches(  # By length, which needs the least padding.
            lengths, budget.max_tokens, packed=False, equal_length=equal_length
        )
        return parts, [forward.logits(tokens, rows[shard[part]]) for part in parts]

    parts, outputs = budget.retry_on_oom(compute)
    of_shard = torch.cat(outputs, dim=-2)
    counts = batching.count_labels(tokens, rows)
    logits = of_shard.new_zeros(*of_shard.shape[:-2], counts.sum(), of_shard.shape[-1])
    positions = word_positions(counts, shard[np.concatenate(parts)])
    logits[..., torch.from_numpy(positions).to(logits.device), :] = of_shard
    group.all_reduce_sum_(logits)
    return logits.cpu().numpy()


@torch.inference_mode()
def predict_together(
    forward: Forward, stack: RunStack, tokens: TokenizedSplit, budget: TokenBudget,
    rows: dict[int, np.ndarray],
) -> list[np.ndarray]:  # fmt: skip
    """Return the logits (B, C) or (words, C) of each run of `rows`; runs share micro-batches.

    Args:
        rows: {run: (B,) int64 row numbers}, as in `predict_runs`.
    """
    forward.model.eval()
    flat = np.concatenate([*rows.values()])
    run_ids = np.repeat([*rows], [len(of_run) for of_run in rows.values()])

    def logits_of_part(part: np.ndarray) -> torch.Tensor:
        routed = forward.make_routed_batch(
            tokens, flat[part], run_ids[part], num_runs=len(stack.runs)
        )
        batch, routing = batching.to_device(routed, tokens.ids.device)
        with stack.routing(routing):
            return select_labels(forward(tokens, batch), routed[0])

    def compute() -> tuple[np.ndarray, np.ndarray]:
        parts = batching.split_into_micro_batches(
            tokens.lengths[flat], budget.max_tokens, forward.packed_encoder is not None,
            equal_length=forward.equal_length,
        )  # fmt: skip
        together = torch.cat([logits_of_part(part) for part in parts])
        return np.concatenate(parts), together.cpu().numpy()

    order, together = budget.retry_on_oom(compute)
    logits = np.empty_like(together)
    logits[word_positions(batching.count_labels(tokens, flat), order)] = together
    labels = [batching.count_labels(tokens, of_run).sum() for of_run in rows.values()]
    return np.split(logits, np.cumsum(labels)[:-1])


def predict_runs(
    forward: Forward, stack: RunStack, tokens: TokenizedSplit, budget: TokenBudget,
    rows: dict[int, np.ndarray], group: Group = SINGLE_PROCESS,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Yield each run and the logits (B, C), or (words, C), of its rows.

    If only the classifier of a group of runs trains, all its runs have the same rows and rows are
    packed, the encoder runs once for the group. With padded rows, some classifiers compute all
    tokens before they pool (EuroBERT), so each run predicts alone. Otherwise one run after the
    other is loaded into the model: sharing micro-batches gains nothing, neither on a CPU nor on a
    GPU (docs/speed.md).
    """
    for number, of_stack in enumerate(stack.groups):
        of_group = {run: rows[run] for run in of_stack.runs if run in rows}
        if not of_group:
            continue
        stack.select_group(number)
        first, *others = of_group.values()
        shared = stack.shares_encoder and forward.packed_encoder
        if shared and others and all(np.array_equal(other, first) for other in others):
            with stack.routing():
                logits = predict(forward, tokens, budget, rows=first, group=group)
            yield from ((run, logits[run]) for run in of_group)
            continue
        for run, of_run in of_group.items():
            stack.load_run(run)
            yield run, predict(forward, tokens, budget, rows=of_run, group=group)
