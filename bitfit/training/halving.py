"""Successive halving: after stated epochs the runs of the worse half of the candidates stop.

A candidate is a learning rate with a set of bias terms; its runs have different seeds.
"""

import math
from statistics import fmean

import torch

from bitfit.training.state import TrainState
from utils import LOGGER


def stop_worse_half(state: TrainState, scores: list[tuple]) -> None:
    """Stop the runs of the worse half of the remaining candidates, if it is time to.

    A candidate's score is the mean of the main validation scores of its runs. A run that has
    diverged, or whose score is not a number, counts as -inf. Equal candidates keep their order.

    Args:
        scores: of the evaluation after this epoch, as tuples like `TrainState.scores`.
    """
    plan, epoch = state.plan, state.epoch + 1
    if epoch not in plan.options.halving:
        return
    main = plan.task.validation_splits[0], plan.task.metrics[0]
    score_of = {name: x for name, _, *of, x in scores if tuple(of) == main and not math.isnan(x)}
    values: dict[str, list[float]] = {}
    for record in state.records:
        if not record.stopped:
            value = score_of.get(record.run.name, -math.inf)
            values.setdefault(record.run.candidate, []).append(value)
    reasons = rank_candidates(values, f"after epoch {epoch}", main[1])
    for record in state.records:
        record.stopped = record.stopped or reasons.get(record.run.candidate)
    device = state.stack.params.device
    stopped = torch.tensor([bool(record.stopped) for record in state.records], device=device)
    state.stack.end_runs(stopped, torch.tensor(epoch * plan.steps_per_epoch - 1, device=device))
    kept, names = len(values) - len(reasons), "; ".join(reasons)
    LOGGER.info("halving: %d of %d candidates go on; stopped: %s", kept, len(values), names)


def rank_candidates(values: dict[str, list[float]], when: str, metric: str) -> dict[str, str]:
    """Return why each candidate of the worse half stops, from the best of them to the worst.

    A mean of -inf is shown as "none".

    Args:
        values: {candidate: main scores of its runs}.
        when: "after epoch 2", the beginning of the texts.
    """
    ranks = {name: (fmean(x), max(x) > -math.inf) for name, x in values.items()}
    order = sorted(ranks, key=ranks.__getitem__, reverse=True)  # stable
    kept = -(-len(order) // 2)
    shown = {name: f"{100 * x:.1f}".replace("-inf", "none") for name, (x, _) in ranks.items()}
    return {
        name: f"{when}: place {place} of {len(order)} by mean {metric} × 100 "
        f"({shown[name]}, n = {len(values[name])}; the last kept has {shown[order[kept - 1]]})"
        for place, name in enumerate(order[kept:], kept + 1)
    }
