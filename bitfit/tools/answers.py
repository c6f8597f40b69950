"""Read lines of text and format predictions, for scripts/predict.py."""

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitfit.data.readers import Table
from bitfit.data.splits import TextColumns
from bitfit.data.tagged_files import SUFFIXES, check_words, read_sentences, write_tags
from bitfit.data.tasks import Task, predictions
from bitfit.output_paths import file_error
from bitfit.tools.multi_task import MultiTaskPredictor, predict_logits, predict_tags
from utils import UserError


def read_batches(
    predictor: MultiTaskPredictor, lines: Iterable[bytes], size: int, name: str
) -> Iterator[list[tuple[str, ...]]]:
    """Yield batches of up to `size` examples, as soon as their lines arrive.

    An invalid line raises a UserError after all lines before it.

    Args:
        lines: an example per line: a text, or two texts with a tab between them.
        name: the name of the input in messages.
    """
    batch = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.removeprefix(BOM_UTF8) if number == 1 else line
            batch.append(line_texts(predictor, text))
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
    if any(character in text for text in texts for character in "\0\r"):
        raise UserError("a zero byte or carriage return within a line; give UTF-8 lines")
    pairs = [name for name, task in zip(predictor.names, predictor.tasks, strict=True)
             if len(task.texts) > 1]  # fmt: skip
    if len(texts) != (2 if pairs else 1):
        wanted = f"{pairs[0]} reads two" if pairs else "no evaluator reads pairs"
        raise UserError(f"{len(texts)} texts with tabs between them, but {wanted}")
    if not all(text.strip() for text in texts):
        raise UserError("an empty text; give a text in every line")
    return texts


def read_words(tasks: Sequence[Task], source: str, output: str | None) -> Table | None:
    """Return the sentences of --input for --output; UserError if they cannot be read or written."""
    suffix = Path(source).suffix
    if output is None:
        if tasks[0].is_tagging and suffix in (".conll", ".conllu", ".jsonl", ".parquet"):
            raise UserError(f"--input {source}: to tag such a file, give --output FILE{suffix}")
        return None
    if not tasks[0].is_tagging:
        raise UserError("--output is for evaluators that tag words: leave it out")
    if suffix not in SUFFIXES:
        raise UserError(f"--input {source}: for --output give a file {', '.join(SUFFIXES)}")
    if problem := file_error(output, (suffix,)):
        raise UserError(f"--output {output} {problem}")
    if Path(output).resolve() == Path(source).resolve():
        raise UserError(f"--output {output} is the file of --input: give another")
    (words, *others), names = {task.texts[0] for task in tasks}, {task.tsv_label for task in tasks}
    if others or len(names) < len(tasks):
        raise UserError("these evaluators read other words or write the same tags: give one")
    table = read_sentences(Path(source), [words])
    if not check_words(table, words):
        raise UserError(f"--input {source} has no sentences")
    return table


def write_predicted_tags(predictor: MultiTaskPredictor, table: Table, output: str) -> None:
    """Write a file of sentences with the tags of all evaluators, in its format."""
    ((words, sentences),) = table.columns.items()
    texts = TextColumns((sentences,), None, place_word=table.place_word)
    names = [task.tsv_label for task in predictor.tasks]
    tags = dict(zip(names, predict_tags(predictor, texts), strict=True))
    write_tags(Path(output), Path(table.source), {words: sentences} | tags)


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
