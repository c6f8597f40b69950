"""Successive halving of a study's candidates, simulated on the logits of its finished cells."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bitfit.study import statistics
from bitfit.study.cells import Cell
from bitfit.study.protocol import ROWS
from bitfit.study.results import Entries, Entry
from utils import UserError

TITLE = "Successive halving, simulated"
NOTE = (
    "Of all candidates (method and learning rate) of a finished cell, or of several cells whose "
    "runs can share a pass, `winner` has the best mean score over seeds at the last epoch, "
    "`stopped` is the epoch at which halving would have stopped it, `lost` is its score minus that "
    "of `selected`, × 100, `saved` is the share of all epochs of all runs, and `resampled` is how "
    "often the winner would have been stopped on resampled validation examples and seeds."
)
Scores = tuple[Cell, tuple[int, ...], np.ndarray]  # as `mean_scores` returns them


def halving_frame(entries: Entries, halvings: Sequence[int], resamples: int) -> pd.DataFrame:
    """Return halving.csv: a row for each cell, then for each group of cells, and their means.

    Raises:
        UserError: no cell can be halved at one of the epochs.
    """
    cells, groups = [], defaultdict(list)
    for entry in entries.values():
        found = entry.results
        if found.state == "done" and entry.split == found.task.validation_splits[0]:
            cell, epochs, means = mean_scores(entry, halvings, resamples)
            if len(epochs) > 1 and np.isfinite(means).any():
                cells.append((cell, epochs, means))
                task, settings = cell.name.split("/")[2], (tuple(cell.rates), tuple(cell.seeds))
                if ROWS[cell.row].stacks:
                    groups[cell.model, task, epochs, settings].append(cells[-1])
    grids = [[part] for part in cells if len(part[0].rates) > 1]
    grids += [group for group in groups.values() if len(group) > 1]
    used = {epoch for (_, epochs, _), *_ in grids for epoch in epochs[:-1]}
    if unused := [str(epoch) for epoch in halvings if epoch not in used]:
        problem = f"--halving {' '.join(unused)}: no finished cell with several learning rates"
        raise UserError(f"{problem} has scores of this epoch and of a later one")
    frame = pd.DataFrame([outcome(grid) for grid in grids])
    kinds = frame.groupby(frame["cells"] > 1)
    pooled = dict.fromkeys(("lost", "saved", "resampled"), "mean") | {"cells": "sum"}
    means = kinds.agg(pooled | {"stopped": lambda s: f"{(s != '').sum()} of {len(s)}"})
    parts = [part for kind, of_kind in kinds for part in (of_kind, means[means.index == kind])]
    return pd.concat(parts).fillna({"model": "mean"})


def mean_scores(entry: Entry, halvings: Sequence[int], resamples: int) -> Scores:
    """Return a cell, the epochs of its halvings and its last, and mean scores at these E epochs.

    The scores (1 + B, L, E) are means over the seeds: as observed, and of B resamples, which are
    the same for all cells of a task. They are -inf for a learning rate with a diverged run.
    """
    found, cell, rng = entry.results, entry.results.cell, np.random.default_rng(0)
    scored = np.unique(found.scores["epoch"])
    used = np.append(np.isin(scored[:-1], halvings), True)
    logits, labels = found.logits[entry.split][:, :, used], found.labels[entry.split]
    counts = np.insert(statistics.draws(rng, len(cell.seeds), resamples), 0, 1, axis=0)
    observed = statistics.main_scores(found.task, logits, labels)[None]
    drawn = statistics.row_bootstrap(found.task, logits, labels, rng=rng, resamples=resamples)
    means = np.einsum("blse,bs->ble", np.concatenate([observed, drawn]), counts / len(cell.seeds))
    # Equal scores, summed in another order, may differ in the last bit.
    return cell, tuple(scored[used].tolist()), np.nan_to_num(means.round(12), nan=-np.inf)


def stop_places(means: np.ndarray) -> np.ndarray:
    """Return the place of the epoch at which each candidate stops: (B, L, E) -> (B, L)."""
    last, kept = means.shape[2] - 1, means.shape[1]
    stops = np.full(means.shape[:2], last)
    for place in range(last):
        kept = (kept + 1) // 2
        # Stopped candidates are sorted last, and candidates of equal score by their order.
        ranks = np.lexsort((-means[..., place], stops < last)).argsort(axis=1)
        stops[(ranks >= kept) & (stops == last)] = place
    return stops


def outcome(grid: Sequence[Scores]) -> dict[str, Any]:
    """Return the row of one cell, or of several that are searched together."""
    cells, (epochs, *_), parts = zip(*grid, strict=True)
    model, _, task = cells[0].name.split("/")
    candidates = [f"{cell.row} {rate:g}" for cell in cells for rate in cell.rates]
    means = np.concatenate(parts, axis=1)
    stops, scores = stop_places(means), means[..., -1]
    is_kept, winners = stops == len(epochs) - 1, scores.argmax(axis=1)
    winner, selected = winners[0], np.where(is_kept, scores, -np.inf)[0].argmax()
    return {
        "model": model, "task": task, "methods": ", ".join(cell.row for cell in cells),
        "cells": len(cells), "winner": candidates[winner],
        "stopped": "" if is_kept[0, winner] else str(epochs[stops[0, winner]]),
        "selected": candidates[selected], "lost": 100 * (scores[0, winner] - scores[0, selected]),
        "saved": 1 - np.take(epochs, stops[0]).mean() / epochs[-1],
        "resampled": 1 - np.take_along_axis(is_kept, winners[:, None], axis=1)[1:].mean(),
    }  # fmt: skip
