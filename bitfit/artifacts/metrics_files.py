"""Train all runs of a state, and keep their result and their metrics files up to date."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitfit.data.tasks import Task
from bitfit.files import atomic_file, write_text
from bitfit.model.run_stack import Run
from bitfit.model.trainable import components_to_terms, count_trainable
from bitfit.results.scores import last_and_best, scores_by_split, scores_frame
from bitfit.tracking.tracker import Tracker
from bitfit.training import store
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.loop import fit
from bitfit.training.prepare import PreparedModel
from bitfit.training.result import TrainingResult
from bitfit.training.setup import LoadedData, Setup
from bitfit.training.state import Record, TrainState

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
    result.records, result.scores = state.records, scores_frame(state.scores)


def write_metrics(
    state: TrainState, result: TrainingResult, folders: dict[Run, Path], metadata: dict[str, Any]
) -> None:
    """Write metrics and validation logits of the runs that have a folder."""
    for k, record in enumerate(state.records):
        if record.run in folders:
            folder, scores = folders[record.run], result.scores_of(record.run)
            write_run_metrics(folder, state.plan.task, record, scores, metadata)
            write_logits(folder, state, k)


def write_run_metrics(
    folder: Path, task: Task, record: Record, scores: pd.DataFrame, metadata: dict[str, Any]
) -> None:
    """Write metrics.json (metadata and all scores) and metrics.csv (one score per line)."""
    content = metadata | record.run._asdict()
    content |= {"diverged": record.diverged, "train_loss": record.train_loss}
    content["seconds"] = {name: round(value, 2) for name, value in record.seconds.items()}
    content |= {"epochs": scores["epoch"].unique().tolist()}
    content |= {"evaluations": scores_by_split(scores)}
    content |= {"main_metric": task.metrics[0]} | last_and_best(scores, task)
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    curve = scores.groupby(["split", "metric"], sort=False).ngroup()
    table = scores.iloc[curve.argsort(kind="stable")][["epoch", "split", "metric", "value"]]
    write_text(folder / "metrics.csv", table.to_csv(index=False))


def metrics_metadata(setup: Setup, data: LoadedData, prepared: PreparedModel) -> dict[str, Any]:
    """Return the content of metrics.json that all runs share."""
    method, model = prepared.method, prepared.model
    return {
        "task": setup.task.name,
        "model": str(setup.model_name),
        "model_commit": setup.model_commit,
        "random_encoder": setup.random_encoder,
        **({"add_biases": True} if setup.add_biases else {}),
        "fine_tune_type": method.fine_tune_type,
        "bias_terms": components_to_terms(method.components),
        "validation_rows": {
            split: len(data.tokens(split).lengths) for split in setup.task.validation_splits
        },
        "runs_in_one_pass": len(prepared.runs),
        "trained_parameters": count_trainable(model, prepared.trainable),
        "zero_gradient": prepared.zero_gradient,
        "all_parameters": sum(p.numel() for p in model.parameters()),
        **method.start_record,
    }


def write_logits(folder: Path, state: TrainState, k: int) -> None:
    """Write validation_logits.safetensors of run number k, for selection and tests later.

    The file has, for each validation split, the logits (evaluations, rows, C) and `<split>.labels`
    (rows,); for tagging those of words, and `<split>.sentences`, the words of each sentence.
    """
    tensors, done = {}, state.evaluation_count
    for split, logits in state.logits.items() if done else ():
        tensors[split] = torch.from_numpy(logits[:done, k].copy())
        tokens = state.plan.scored[split].tokens
        tensors[f"{split}.labels"] = tokens.require_labels().cpu()
        sentences = tokens.sentences_of(np.arange(len(tokens.lengths)))
        if sentences is not None:
            tensors[f"{split}.sentences"] = torch.from_numpy(sentences)
    if tensors:
        with atomic_file(folder / LOGITS) as temporary:
            store.save_tensors(tensors, temporary)
