"""Labels, tags and scores as files write them, as numbers."""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from bitfit.data import readers
from bitfit.data.tasks import Task, label_text
from utils import UserError


def decode_labels(
    task: Task, values: list, place: Callable[[int], str], numbered: bool
) -> np.ndarray:
    """Return labels as in a file as class numbers (rows,) int64, or scores (rows,) float32.

    Args:
        place: returns the position of a row for messages.
        numbered: as in `make_text_columns`.
    """
    number, read = (real, lambda value: value) if numbered else (float_of, label_text)
    names = range(len(task.labels)) if numbered else task.written_labels
    known, (low, high) = {name: label for label, name in enumerate(names)}, task.score_range
    labels = []
    for row, value in enumerate(values):
        word = read(value)
        try:
            labels.append(number(word) if task.is_regression else known[word])
            if task.is_regression and not low <= labels[-1] <= high:
                raise ValueError
        except (ValueError, TypeError, LookupError):
            expected = readers.quote_names(known) if known else f"a score from {low:g} to {high:g}"
            kind = "tag" if task.is_tagging else "label"
            problem = f"unknown {kind} {readers.quote_value(value if word is None else word)}"
            problem += readers.describe_look_alike(word, [*known, *task.excluded_labels])
            raise UserError(f"{place(row)}: {problem}; expected {expected}") from None
    return np.array(labels, np.float32 if task.is_regression else np.int64)


def real(value: object) -> float:
    """Return a real number; raise TypeError for other values."""
    if not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def float_of(word: str | None) -> float:
    """Return the number that a word spells; unlike `float`, reject 1_0."""
    if word is None or "_" in word:
        raise ValueError
    return float(word)


def name_classes(label: object, known: dict[Any, str]) -> object:
    """Return the name of a class number, or the names for a list; other values unchanged."""
    if isinstance(label, list):
        return [known.get(number, number) for number in label]
    return known.get(label, label)
