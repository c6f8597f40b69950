"""Predict several tasks with one encoder: saved evaluators of one base model share a pass.

The evaluators are the runs of a `RunStack`, as in a sweep. Every text is an example of every
evaluator, and its tokens get the biases of that evaluator. All heads get the width of the widest,
and the logits of a task are cut to its number of classes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bitfit.artifacts import saved_evaluator
from bitfit.data.splits import TextColumns
from bitfit.data.tasks import Task, predictions, tags_of_sentences
from bitfit.data.tokens import TokenizedSplit, concatenate, tokenize
from bitfit.model import hub, loading
from bitfit.model.bias_terms import add_biases
from bitfit.model.fingerprints import fingerprint, fingerprints_of
from bitfit.model.forward import Forward, check_ids
from bitfit.model.predict import predict, predict_together
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.tools import saved_evaluators
from bitfit.tools.saved_evaluators import SavedEvaluator
from bitfit.training.prepare import assemble
from utils import UserError

TRIAL = [" ".join(["a small film is good,"] * n) for n in (1, 4, 16)]  # texts for first passes


class MultiTaskPredictor(NamedTuple):
    """Saved evaluators that predict together; K is their number."""

    names: list[str]  # K names for the answers
    tasks: list[Task]  # K
    lengths: list[int]  # K maximum numbers of tokens of an example
    tokenizer: Any
    forward: Forward
    stack: RunStack  # the trained values of the K evaluators
    token_budget: TokenBudget


def read_evaluators(
    folders: Iterable[str | Path], model_name: str | None = None
) -> list[SavedEvaluator]:
    """Read saved evaluators; UserError also if one of several changed the encoder's matrices."""
    found = saved_evaluators.read_evaluators(folders, model_name)
    for _, folder, metadata, tensors in found if len(found) > 1 else ():
        has_positions = any(name.endswith(saved_evaluator.POSITIONS) for name in tensors)
        if metadata["model_sha256"] or has_positions:
            raise UserError(f"{folder} ({metadata['fine_tune_type']}) changed weight matrices, "
                            "which the others share: give it alone")  # fmt: skip
    return found


def load_predictor(
    found: Sequence[SavedEvaluator],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    max_tokens: int | None = None,
) -> MultiTaskPredictor:
    """Load the base model of evaluators from `read_evaluators`; predict within `stack.patched`.

    Raise a UserError if the base model is missing, has changed, or cannot be shared.

    Args:
        max_length: maximum number of tokens of an example; None: each evaluator's limit.
        max_tokens: maximum number of tokens of a pass; None: the default of the device.
    """
    tasks = [evaluator.task for evaluator in found]
    lengths = [max_length or evaluator.metadata["max_sequence_len"] for evaluator in found]
    widest = max(tasks, key=lambda task: task.num_labels)
    model, tokenizer, trainable = load_base(found, widest)
    model.to(device)
    trial = TextColumns(([t.split() for t in TRIAL] if widest.is_tagging else TRIAL,), None)
    tokens = tokenize(trial, tokenizer, max(lengths)).to(device)
    runs = [Run(e.metadata["learning_rate"], e.metadata["seed"]) for e in found]
    prepared = assemble(
        model, found[0].metadata["model_name"], trainable, runs=runs, dtype=dtype,
        max_tokens=max_tokens, tokens=tokens,
    )  # fmt: skip
    if len(found) > 1 and (reason := prepared.reason_not_stackable(tokens)):
        raise UserError(f"these evaluators cannot answer together: {reason}; give one at a time")
    stack = prepared.new_stack()
    for row, evaluator in zip(stack.params, found, strict=True):
        copy_delta(row, stack, evaluator.tensors)
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        names = [str(evaluator.folder) for evaluator in found]
    return MultiTaskPredictor(
        names, tasks, lengths, tokenizer=tokenizer, forward=prepared.forward, stack=stack,
        token_budget=prepared.token_budget,
    )  # fmt: skip


def load_base(
    found: Sequence[SavedEvaluator], task: Task
) -> tuple[torch.nn.Module, Any, dict[str, np.ndarray | None]]:
    """Return base model, tokenizer and trained parameters; UserError for another base model."""
    base = found[0].metadata
    name = base["model_name"]
    revision, _ = hub.resolve_revision(name, base["model_revision"])
    tokenizer = loading.load_tokenizer(name, revision, task.is_tagging)
    config = loading.load_config(name, task, revision)
    fingerprints = fingerprints_of(config, tokenizer)
    for _, folder, metadata, _ in found:
        saved_evaluator.check_base(folder, metadata, fingerprints)
    random_encoder = base["random_encoder"] and not base["model_sha256"]
    model, _ = loading.load_model(name, task, random_encoder, revision=revision)
    encoder = fingerprint(model)
    trainable: dict[str, np.ndarray | None] = {}
    if any(evaluator.metadata["add_biases"] for evaluator in found):
        add_biases(model)
    for _, folder, metadata, tensors in found:
        trainable |= saved_evaluator.read_trainable(
            model, encoder, metadata, tensors=tensors, folder=folder
        )
    return model, tokenizer, trainable


def copy_delta(params: torch.Tensor, stack: RunStack, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the trained values of an evaluator into one run's parameters (n,) of a stack.

    Other parameters keep the values of the base model. If a head has fewer classes than the stack,
    the values of the additional classes are never read.
    """
    for name, (a, _) in stack.slices.items():
        if name in tensors:
            values = tensors[name].flatten()
            params[a : a + len(values)] = values


def predict_logits(
    predictor: MultiTaskPredictor, rows: Sequence[tuple[str, ...]]
) -> list[np.ndarray]:
    """Return K arrays of logits (B, C), float32, for B examples, within `stack.patched`.

    If only heads trained, the encoder runs once for all evaluators.
    """
    numbers_of_texts = [len(task.texts) for task in predictor.tasks]
    ways = list(zip(numbers_of_texts, predictor.lengths, strict=True))
    distinct = list(dict.fromkeys(ways))  # evaluators that read the same tokens share them
    parts = []
    for texts, length in distinct:
        columns = tuple(map(list, zip(*(row[:texts] for row in rows), strict=True)))
        parts.append(tokenize(TextColumns(columns, None), predictor.tokenizer, length))
    begins = len(rows) * np.array([distinct.index(way) for way in ways])
    return logits_of_tokens(predictor, concatenate(parts), begins[:, None] + np.arange(len(rows)))


def predict_tags(predictor: MultiTaskPredictor, texts: TextColumns) -> list[list[list[str]]]:
    """Return the tags of each word of each sentence of K evaluators, within `stack.patched`.

    Raise a UserError if the evaluators have other lengths, or a word has no sub-tokens.
    """
    length = predictor.lengths[0]
    if len(set(predictor.lengths)) > 1:
        message = f"these evaluators were trained with other lengths: {predictor.lengths}"
        raise UserError(f"{message}: give --max-seq-length")
    tokens = tokenize(texts, predictor.tokenizer, length)
    positions = np.tile(np.arange(len(tokens.lengths)), (len(predictor.tasks), 1))
    logits = logits_of_tokens(predictor, tokens, positions)
    counts = [len(words) for words in texts.columns[0]]
    return [
        tags_of_sentences(task, predictions(task, of_task), counts)
        for task, of_task in zip(predictor.tasks, logits, strict=True)
    ]


def logits_of_tokens(
    predictor: MultiTaskPredictor, tokens: TokenizedSplit, positions: np.ndarray
) -> list[np.ndarray]:
    """Return K arrays of logits (B, C) or (words, C) of the rows at `positions` (K, B)."""
    model = predictor.forward.model
    check_ids(model, model.name_or_path, tokens)
    tokens = tokens.to(predictor.stack.params.device)
    is_tagging = tokens.word_counts is not None
    shares = predictor.stack.shares_encoder and len(predictor.tasks) > 1
    if shares and predictor.forward.packed_encoder:  # for the reason, see `predict_runs`
        with predictor.stack.routing():
            together = predict(predictor.forward, tokens, predictor.token_budget)  # (K, rows, C)
        if not is_tagging:
            together = np.take_along_axis(together, positions[..., None], axis=1)
    else:
        rows, budget = dict(enumerate(positions)), predictor.token_budget
        forward, stack = predictor.forward, predictor.stack
        together = predict_together(forward, stack, tokens, budget=budget, rows=rows)
    both = zip(together, predictor.tasks, strict=True)
    return [logits[:, : task.num_labels] for logits, task in both]
