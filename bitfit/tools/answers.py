"""Read lines of text and format predictions, for scripts/predict.py."""

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bitfit.data.tasks import Task, predictions
from bitfit.tools.multi_task import MultiTaskPredictor, predict_logits
from utils import UserError

INVALID_CHARACTERS = {  # signs that lines or letters would be misread
    "\0": "not text, there is a zero byte; convert the input to UTF-8",
    "\r": "a carriage return within a line; end every line with a newline",
}


def read_batches(
    predictor: MultiTaskPredictor, lines: Iterable[bytes], size: int, name: str
) -> Iterator[list[tuple[str, ...]]]:
    """Yield batches of up to `size` examples, as soon as their lines arrive.

    Args:
        lines: an example per line: a text, or two texts with a tab between them.
        name: the name of the input in messages.

    Raises:
        UserError: a line is invalid; all lines before are yielded first.
    """
    batch = []
    for number, line in enumerate(lines, 1):
        try:
            batch.append(
                line_texts(predictor, line.removeprefix(BOM_UTF8) if number == 1 else line)
            )
        except UserError as error:
            if batch:
                yield batch
            raise UserError(f"{name}:{number}: {error}") from None
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def line_texts(predictor: MultiTaskPredictor, line: bytes) -> tuple[str, ...]:
    """Return the one or two texts of a line. Tasks with one sentence read the first."""
    try:
        texts = tuple(line.decode().rstrip("\r\n").split("\t"))
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text; convert the input to UTF-8") from None
    for character, message in INVALID_CHARACTERS.items():
        if any(character in text for text in texts):
            raise UserError(message)
    pairs = [
        n for n, task in zip(predictor.names, predictor.tasks, strict=True) if len(task.texts) > 1
    ]
    if len(texts) > 2 or (len(texts) == 2 and not pairs):
        allowed = "one or two" if pairs else "one: no evaluator reads pairs"
        raise UserError(f"{len(texts)} texts with tabs between them; give {allowed}")
    if len(texts) < 2 and pairs:
        raise UserError(f"one text, but {pairs[0]} reads two; put a tab between them")
    if not all(text.strip() for text in texts):
        raise UserError("an empty text; give a text in every line")
    return texts


def predict_answers(
    predictor: MultiTaskPredictor, rows: Sequence[tuple[str, ...]]
) -> list[dict[str, dict[str, Any]]]:
    """Return {evaluator: answer} for examples of one or two texts; see `format_answers`."""
    by_task = map(format_answers, predictor.tasks, predict_logits(predictor, rows))
    return [dict(zip(predictor.names, row, strict=True)) for row in zip(*by_task, strict=True)]


def format_answers(task: Task, logits: np.ndarray) -> list[dict[str, Any]]:
    """Return [{"label", "probabilities"}] of logits (B, C), or [{"score"}] for a regression."""
    from scipy.special import softmax

    best = predictions(task, logits)
    if task.is_regression:
        return [{"score": round(float(value), 6)} for value in best]
    probabilities = softmax(logits.astype(np.float64), axis=1).round(6).tolist()
    return [
        {"label": task.labels[k], "probabilities": dict(zip(task.labels, values, strict=True))}
        for k, values in zip(best, probabilities, strict=True)
    ]
