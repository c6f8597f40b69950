"""The metrics and logits files of the runs of a training."""

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
from bitfit.results.scores import last_and_best, scores_by_split
from bitfit.training import store
from bitfit.training.prepare import PreparedModel
from bitfit.training.result import TrainingResult
from bitfit.training.setup import LoadedData, Setup
from bitfit.training.state import Record, TrainState

LOGITS = "validation_logits.safetensors"


def write_metrics(
    state: TrainState, result: TrainingResult, folders: dict[Run, Path], metadata: dict[str, Any]
) -> None:
    """Write metrics and validation logits of the runs that have a folder."""
    for k, record in enumerate(state.records):
        if record.run in folders:
            folder, scores = folders[record.run], result.scores_of(record.run)
            write_run_metrics(folder, state.plan.task, record, scores=scores, metadata=metadata)
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
