"""Read several saved evaluators and check that they can be combined.

All must have the same base model, identified by the hash of its encoder.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitfit.artifacts import saved_evaluator
from bitfit.artifacts.run_folder import find_evaluator
from bitfit.data.tasks import Task
from bitfit.model.fingerprints import describe_change
from bitfit.model.trainable import components_to_terms
from utils import UserError


class SavedEvaluator(NamedTuple):
    """The content of the files of a saved evaluator."""

    name: str  # in tables
    folder: Path
    metadata: dict[str, Any]
    # {parameter name: trained values}, and for a random mask {name + POSITIONS: flat positions}
    tensors: dict[str, torch.Tensor]

    @property
    def task(self) -> Task:
        return saved_evaluator.task_of(self.metadata)


def read_evaluators(
    folders: Iterable[str | Path], model_name: str | None = None
) -> list[SavedEvaluator]:
    """Read the saved evaluators in folders, or in the `evaluator/` of run folders.

    Raise a UserError if one is missing, damaged or given twice, or bases or kinds of tasks differ.
    """
    folders = evaluator_folders(folders)
    evaluators = [
        SavedEvaluator(name, folder, *saved_evaluator.read_files(folder, model_name))
        for name, folder in zip(short_names(folders), folders, strict=True)
    ]
    check_same(
        evaluators, "kinds of tasks", lambda e: e.task.is_tagging, describe=lambda e: e.task.folder
    )
    check_same(
        evaluators, "base models", lambda e: e.metadata["encoder_sha256"], describe=describe_base
    )
    first, *others = evaluators
    for other in others:
        change = describe_change(first.metadata, other.metadata)
        if change:
            problem = f"{first.name} and {other.name} have different base models, whose {change}"
            raise UserError(f"{problem}: give evaluators with the same")
    return evaluators


def read_deltas(folders: Iterable[str | Path]) -> list[SavedEvaluator]:
    """Read saved evaluators, as `read_evaluators`; UserError for a whole model (full_ft)."""
    evaluators = read_evaluators(folders)
    for evaluator in evaluators:
        if evaluator.metadata["model_sha256"]:
            raise UserError(
                f"{evaluator.folder} trained everything (full_ft), so it has no delta: "
                f"{evaluator.folder / 'model'} is the whole model"
            )
    return evaluators


def evaluator_folders(folders: Iterable[str | Path]) -> list[Path]:
    """Return the folder of each evaluator; UserError if one is given twice."""
    paths = [find_evaluator(Path(folder)) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for number, folder in enumerate(paths):
        if resolved[number] in resolved[:number]:
            raise UserError(f"{folder} is given twice: give each once")
    return paths


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' paths without their common beginning and without `/evaluator`."""
    paths = [os.path.abspath(folder).removesuffix(f"{os.sep}evaluator") for folder in folders]
    shared = os.path.commonpath(paths)
    return [Path(p).name if p == shared else os.path.relpath(p, shared) for p in paths]


def describe_base(evaluator: SavedEvaluator) -> str:
    """Return the name of an evaluator's base model for tables and messages."""
    metadata = evaluator.metadata
    name = metadata["base_name"] + " (random encoder)" * metadata["random_encoder"]
    return name + " (added biases)" * metadata["add_biases"]


def describe_method(evaluator: SavedEvaluator) -> str:
    """Return the fine-tune type and the bias terms, or the seed of a random mask."""
    metadata = evaluator.metadata
    details = components_to_terms(metadata["components"]) or [f"seed {metadata['seed']}"]
    if "started_from" in metadata:
        details.append(f"started from {metadata['started_from']['task']}")
    return f"{metadata['fine_tune_type']} ({', '.join(details)})"


def check_same(
    evaluators: Sequence[SavedEvaluator],
    noun: str,
    key: Callable[[SavedEvaluator], Any],
    describe: Callable[[SavedEvaluator], str],
) -> None:
    """Raise UserError unless `key` is the same for all evaluators.

    Args:
        noun: names the property in the message.
        describe: returns the property of an evaluator as text for the message.
    """
    first = evaluators[0]
    for other in evaluators[1:]:
        if key(other) != key(first):
            both = " and ".join(f"{e.name} ({describe(e)})" for e in (first, other))
            raise UserError(f"{both} have different {noun}: give evaluators with the same")


def check_same_trainable(evaluators: Sequence[SavedEvaluator]) -> None:
    """Raise UserError unless the same parameters trained, at the same positions."""

    def key(evaluator: SavedEvaluator) -> tuple[str, set[str], set[str], dict[str, list[int]]]:
        positions = {
            n: t.tolist() for n, t in evaluator.tensors.items() if saved_evaluator.POSITIONS in n
        }
        metadata = evaluator.metadata
        components, saved = set(metadata["components"]), set(evaluator.tensors)
        return metadata["fine_tune_type"], components, saved, positions

    check_same(evaluators, "trained parameters", key, describe=describe_method)


def check_bitfit(evaluators: Iterable[SavedEvaluator], verb: str) -> None:
    """Raise UserError unless all evaluators are of bitfit; `verb` completes the message."""
    for evaluator in evaluators:
        kind = evaluator.metadata["fine_tune_type"]
        if kind != "bitfit":
            raise UserError(f"{evaluator.name} is {kind}: only bitfit has bias terms to {verb}")
