"""Train all runs of a state, and keep their result and their metrics files up to date."""

from pathlib import Path
from typing import Any

import torch

from bitfit.files import atomic_file
from bitfit.model.run_stack import Run
from bitfit.results import scores as reports
from bitfit.tracking.tracker import Tracker
from bitfit.training import store
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.loop import fit
from bitfit.training.result import TrainingResult
from bitfit.training.state import TrainState

LOGITS = "validation_logits.safetensors"


def train(
    state: TrainState,
    result: TrainingResult,
    *,
    dtype: torch.dtype,
    checkpoints: CheckpointManager,
    tracker: Tracker,
    folders: dict[Run, Path],
    metadata: dict[str, Any],
) -> str | None:
    """Train all runs, from the newest checkpoint if there is one, and write their metrics.

    Args:
        result: receives the scores and records, also if the training is interrupted.
        folders: {run: folder} of the runs that write files.
        metadata: the values that metrics.json contains beside scores.

    Returns:
        None, or a message if all runs have diverged.
    """
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    checkpoints.load(state)
    tracker.open_runs(state, folders)

    def write() -> None:
        take_scores(state, result)
        write_metrics(state, result, folders, metadata)

    try:
        with state.stack.patched(dtype), checkpoints.defer_signals():
            diverged = fit(state, write, checkpoints, tracker)
    finally:
        if state.best is not None:
            state.stack.set_params(state.best)
        take_scores(state, result)
    write()
    return diverged


def take_scores(state: TrainState, result: TrainingResult) -> None:
    """Put the scores and records so far into the result."""
    result.records, result.scores = state.records, reports.scores_frame(state.scores)


def write_metrics(
    state: TrainState, result: TrainingResult, folders: dict[Run, Path], metadata: dict[str, Any]
) -> None:
    """Write metrics and validation logits of the runs that have a folder."""
    for k, record in enumerate(state.records):
        if record.run in folders:
            folder, scores = folders[record.run], result.scores_of(record.run)
            reports.write_metrics(folder, state.plan.task, record, scores, metadata)
            write_logits(folder, state, k)


def write_logits(folder: Path, state: TrainState, k: int) -> None:
    """Write validation_logits.safetensors of run number k, for selection and tests later.

    The file has, for each validation split, the logits (evaluations, rows, C) and `<split>.labels`
    (rows,).
    """
    tensors, done = {}, state.evaluation_count
    for split, logits in state.logits.items() if done else ():
        tensors[split] = torch.from_numpy(logits[:done, k].copy())
        tensors[f"{split}.labels"] = state.plan.scored[split].tokens.require_labels().cpu()
    if tensors:
        with atomic_file(folder / LOGITS) as temporary:
            store.save_tensors(tensors, temporary)
