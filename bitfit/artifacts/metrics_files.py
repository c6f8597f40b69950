"""The metrics and logits files of the runs of a training."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitfit.data.tasks import Task, compact, score
from bitfit.data.tokens import TokenizedSplit
from bitfit.distributed import Group
from bitfit.files import atomic_file, write_text
from bitfit.model.run import Run
from bitfit.model.trainable import components_to_terms, count_trainable
from bitfit.results.scores import last_and_best, scores_by_split, scores_frame
from bitfit.training import store
from bitfit.training.prepare import PreparedModel
from bitfit.training.result import TrainingResult, new_result
from bitfit.training.setup import LoadedData, Setup
from bitfit.training.state import Record, TrainState

LOGITS = "validation_logits.safetensors"


def score_initial(
    setup: Setup,
    data: LoadedData,
    prepared: PreparedModel,
    *,
    group: Group,
    folders: dict[Run, Path],
) -> TrainingResult:
    """Score a model that was not trained, as epoch 0, and write the metrics of its run."""
    (run,), result = prepared.runs, new_result(prepared.new_stack())
    task, begin, scores, tensors = data.dataset.task, time.perf_counter(), [], {}
    for name, split in data.dataset.scored().items():
        rows, tokens = split.rows_of_seed[data.dataset.seeds[0]], split.tokens
        logits = prepared.predict(data, name, group=group, rows=rows)
        labels, sentences = tokens.labels_of(rows), tokens.sentences_of(rows)
        of_split = score(task, logits, labels=labels, sentences=sentences)
        scores += [(run.name, 0, name, metric, value) for metric, value in of_split.items()]
        if name != "train":
            tensors[name] = torch.from_numpy(compact(task, logits)[None])
            tensors |= label_tensors(name, tokens)
    result.scores = scores_frame(scores)
    result.record.seconds["evaluation"] = time.perf_counter() - begin
    metadata = metrics_metadata(setup, data, prepared) | {"trained_parameters": 0}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        write_run_metrics(
            folder, task, record=result.record, scores=result.scores, metadata=metadata
        )
        save_logits(folder, tensors)
    return result


def write_metrics(
    state: TrainState,
    result: TrainingResult,
    folders: dict[Run, Path],
    *,
    setup: Setup,
    data: LoadedData,
    prepared: PreparedModel,
) -> None:
    """Write metrics and validation logits of the runs that have a folder."""
    for k, record in enumerate(state.records):
        if record.run in folders:
            folder, scores = folders[record.run], result.scores_of(record.run)
            metadata = metrics_metadata(setup, data, prepared.for_run(record.run))
            write_run_metrics(folder, state.plan.task, record, scores=scores, metadata=metadata)
            write_logits(folder, state, k)


def write_run_metrics(
    folder: Path, task: Task, record: Record, scores: pd.DataFrame, metadata: dict[str, Any]
) -> None:
    """Write metrics.json (metadata and all scores) and metrics.csv (one score per line)."""
    content = metadata | record.run.fields
    content |= {"diverged": record.diverged, "stopped": record.stopped}
    content |= {"train_loss": record.train_loss}
    content["seconds"] = {name: round(value, 2) for name, value in record.seconds.items()}
    content |= {"epochs": scores["epoch"].unique().tolist()}
    content |= {"evaluations": scores_by_split(scores)}
    content |= {"main_metric": task.metrics[0]} | last_and_best(scores, task)
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    curve = scores.groupby(["split", "metric"], sort=False).ngroup()
    table = scores.iloc[curve.argsort(kind="stable")][["epoch", "split", "metric", "value"]]
    write_text(folder / "metrics.csv", table.to_csv(index=False))


def metrics_metadata(setup: Setup, data: LoadedData, prepared: PreparedModel) -> dict[str, Any]:
    """Return the content of metrics.json of runs with the same trained parameters."""
    method, model, splits = prepared.method, prepared.model, setup.task.validation_splits
    return {
        "task": setup.task.name,
        "model": str(setup.model_name),
        "model_commit": setup.model_commit,
        "random_encoder": setup.random_encoder,
        **({"add_biases": True} if setup.add_biases else {}),
        "fine_tune_type": method.fine_tune_type,
        "bias_terms": components_to_terms(method.components),
        "validation_rows": {split: len(data.tokens(split).lengths) for split in splits},
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
        tensors |= label_tensors(split, state.plan.scored[split].tokens)
    save_logits(folder, tensors)


def label_tensors(split: str, tokens: TokenizedSplit) -> dict[str, torch.Tensor]:
    """Return the labels of a split, and the sentence of each word if the task tags words."""
    tensors = {f"{split}.labels": tokens.require_labels().cpu()}
    sentences = tokens.sentences_of(np.arange(len(tokens.lengths)))
    if sentences is not None:
        tensors[f"{split}.sentences"] = torch.from_numpy(sentences)
    return tensors


def save_logits(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write validation_logits.safetensors, unless there are no logits."""
    if tensors:
        with atomic_file(folder / LOGITS) as temporary:
            store.save_tensors(tensors, temporary)
