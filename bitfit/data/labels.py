"""Labels, tags and scores as files write them, as numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitfit.data import readers
from bitfit.data.tasks import Task, label_text
from utils import UserError


def decode_labels(
    task: Task, values: list, place: Callable[[int], str], names: Sequence[str]
) -> np.ndarray:
    """Return labels as in a file as class numbers (rows,) int64, or scores (rows,) float32.

    Args:
        place: returns the position of a row for messages.
        names: the labels in their order, as the file writes them.
    """
    known, (low, high) = {name: label for label, name in enumerate(names)}, task.score_range
    labels = []
    for row, value in enumerate(values):
        word = label_text(value) or ""
        try:
            labels.append(float(word) if task.is_regression else known[word])
            if task.is_regression and not low <= labels[-1] <= high:
                raise ValueError
        except (ValueError, KeyError):
            expected = readers.quote_names(known) if known else f"a score from {low:g} to {high:g}"
            kind = "tag" if task.is_tagging else "label"
            problem = f"unknown {kind} {readers.quote_value(word or value)}"
            raise UserError(f"{place(row)}: {problem}; expected {expected}") from None
    return np.array(labels, np.float32 if task.is_regression else np.int64)


def name_classes(label: object, known: dict[Any, str]) -> object:
    """Return the name of a class number, or the names for a list; other values unchanged."""
    if isinstance(label, list):
        return [known.get(number, number) for number in label]
    return known.get(label, label)
