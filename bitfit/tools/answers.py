"""Read lines of text and format predictions, for scripts/predict.py."""

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitfit.data.splits import TextColumns
from bitfit.data.tagged_files import SUFFIXES, check_words, read_sentences, write_tags
from bitfit.data.tasks import Task, predictions
from bitfit.output_paths import file_error
from bitfit.tools.multi_task import MultiTaskPredictor, predict_logits, predict_tags
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


def check_files(tasks: Sequence[Task], source: str, output: str | None) -> None:
    """Check --input and --output of scripts/predict.py before the model is loaded.

    Raises:
        UserError: the evaluators cannot read or write them.
    """
    suffix = Path(source).suffix
    if output is None:
        if tasks[0].is_tagging and suffix in (".conll", ".conllu", ".jsonl", ".parquet"):
            raise UserError(f"--input {source}: to tag such a file, give --output FILE{suffix}")
        return
    if not tasks[0].is_tagging:
        raise UserError("--output is for evaluators that tag words: leave it out")
    if suffix not in SUFFIXES:
        raise UserError(f"--input {source}: for --output give a file {', '.join(SUFFIXES)}")
    if problem := file_error(output, (suffix,)):
        raise UserError(f"--output {output} {problem}")
    (words, *others), names = {task.texts[0] for task in tasks}, [task.tsv_label for task in tasks]
    if others or len(set(names)) < len(names):
        raise UserError("these evaluators read other words or write the same tags: give one")
    if not check_words(read_sentences(Path(source), [words]), words):
        raise UserError(f"--input {source} has no sentences")


def tag_file(predictor: MultiTaskPredictor, source: Path, output: Path) -> None:
    """Write a file of sentences with the tags of all evaluators, in its format."""
    words = predictor.tasks[0].texts[0]
    table = read_sentences(source, [words])
    sentences = check_words(table, words)
    texts = TextColumns((sentences,), None, place_word=table.place_word)
    names = [task.tsv_label for task in predictor.tasks]
    tags = dict(zip(names, predict_tags(predictor, texts), strict=True))
    write_tags(output, source, {words: sentences} | tags)


def predict_answers(
    predictor: MultiTaskPredictor, rows: Sequence[tuple[str, ...]]
) -> list[dict[str, dict[str, Any]]]:
    """Return {evaluator: answer} for examples of one or two texts; see `format_answers`."""
    by_task: Iterable[list[dict[str, Any]]]
    if predictor.tasks[0].is_tagging:
        sentences = [row[0].split() for row in rows]
        by_task = [
            [{"words": words, "tags": tags} for words, tags in zip(sentences, of_task, strict=True)]
            for of_task in predict_tags(predictor, TextColumns((sentences,), None))
        ]
    else:
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
