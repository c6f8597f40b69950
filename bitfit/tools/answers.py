"""Lines of text in, answers out: what scripts/predict.py asks of `bitfit.tools.multi_task`."""

from codecs import BOM_UTF8

import numpy as np

from bitfit.data.tasks import predictions
from bitfit.tools.multi_task import logits_of
from utils import UserError

NO_TEXT = {  # an input in which these stand has other lines or other letters than are read
    "\0": "not text, there is a zero byte; convert the input to UTF-8",
    "\r": "a carriage return within a line; end every line with a newline",
}


def batches(many, lines, size, name):
    """Yields up to `size` rows of texts at a time, as they come.

    Args:
        lines: bytes, one row each: a text, or two with a tab between.
        name: of where they come from, for errors.

    Raises:
        UserError: a line that cannot be answered, once those before it have been given.
    """
    batch = []
    for number, line in enumerate(lines, 1):
        try:
            batch.append(texts_of(many, line.removeprefix(BOM_UTF8) if number == 1 else line))
        except UserError as error:
            if batch:
                yield batch
            raise UserError(f"{name}:{number}: {error}") from None
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def texts_of(many, line):
    """A line's texts, one or two; tasks of one sentence read the first of two."""
    try:
        texts = tuple(line.decode().rstrip("\r\n").split("\t"))
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text; convert the input to UTF-8") from None
    for character, what in NO_TEXT.items():
        if any(character in text for text in texts):
            raise UserError(what)
    pairs = [n for n, task in zip(many.names, many.tasks, strict=True) if len(task.texts) > 1]
    if len(texts) > 2 or (len(texts) == 2 and not pairs):
        need = "one or two" if pairs else "one, for no evaluator here reads pairs"
        raise UserError(f"{len(texts)} texts with tabs between; give {need}")
    if len(texts) < 2 and pairs:
        raise UserError(f"one text, but {pairs[0]} reads two; put a tab between them")
    if not all(text.strip() for text in texts):
        raise UserError("an empty text; give every line one")
    return texts


def answers(many, rows):
    """[{evaluator: answer}] for rows of one or two texts; see `worded` for an answer."""
    each = map(worded, many.tasks, logits_of(many, rows))
    return [dict(zip(many.names, row, strict=True)) for row in zip(*each, strict=True)]


def worded(task, logits):
    """Logits (B, C) in words: [{"label", "probabilities"}], or [{"score"}] for a regression."""
    from scipy.special import softmax

    best = predictions(task, logits)
    if task.is_regression:
        return [{"score": round(float(value), 6)} for value in best]
    shares = softmax(logits.astype(np.float64), axis=1).round(6).tolist()
    return [
        {"label": task.labels[k], "probabilities": dict(zip(task.labels, own, strict=True))}
        for k, own in zip(best, shares, strict=True)
    ]
