"""Read the texts and labels of a split, for GLUE's tasks and for custom tasks.

Every reader returns `TextColumns` and raises `UserError` with the file and the line. A test split
keeps all rows. In labelled splits, rows without a gold label and broken rows of some training files
are left out, and a log line gives their number.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitfit.data import glue_files, readers
from bitfit.data.tagged_files import check_tags, check_words, read_sentences
from bitfit.data.task_files import data_file
from bitfit.data.tasks import Task, label_text
from utils import LOGGER, UserError

HUB_DATASET = "nyu-mll/glue"


class TextColumns(NamedTuple):
    """One split: its sentence columns, and its labels as numbers (None for a test split).

    For tagging there is one column of lists of words, and every word has a label.
    """

    columns: tuple[list, ...]
    labels: np.ndarray | None
    # (rows,) bool: goes on with the previous row's sentence; None before long sentences are split.
    continues: np.ndarray | None = None
    place_word: Callable[[int, int], str] | None = None  # (row, word) -> position for messages

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def word_counts(self) -> np.ndarray | None:
        """Return the number of words of each row (rows,) int64; None for texts."""
        (rows, *_) = self.columns
        return np.array(list(map(len, rows))) if rows and isinstance(rows[0], list) else None

    def take(self, rows: Sequence[int] | np.ndarray) -> "TextColumns":
        """Return the given rows in the given order."""
        columns = tuple([column[i] for i in rows] for column in self.columns)
        counts = self.word_counts
        positions = rows if counts is None else word_positions(counts, np.asarray(rows))
        labels = None if self.labels is None else self.labels[positions]
        continues = None if self.continues is None else self.continues[rows]
        return TextColumns(columns, labels, continues)


def word_positions(word_counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the positions of the words of rows (B,) among all words; word_counts: (all rows,)."""
    counts, starts = word_counts[rows], np.cumsum(word_counts) - word_counts
    return np.repeat(starts[rows] - (counts.cumsum() - counts), counts) + np.arange(counts.sum())


def is_labelled(split: str) -> bool:
    """Return whether rows of a split have labels."""
    return split == "train" or split.startswith("validation")


def read_split(task: Task, split: str, data_dir: str | Path | None = None) -> TextColumns:
    """Return the texts and labels of one split, as `find_split`; UserError if there is none."""
    texts = find_split(task, split, data_dir)
    if texts is None:
        raise UserError(f"there is no {split} split of {task.name}")
    return texts


def find_split(task: Task, split: str, data_dir: str | Path | None = None) -> TextColumns | None:
    """Return the texts and labels of one split; None if the optional split "ax" does not exist.

    Raise a UserError for a missing file or split, broken rows, unknown labels, no network.

    Args:
        data_dir: a folder in GLUE's layout (`RTE/train.tsv`) or in the layout of `nyu-mll/glue`
            (`rte/train-00000-of-00001.parquet`); None: the Hub. For a custom task, the folder of
            the data files; None: the current folder.
    """
    if task.record:
        parts, numbered = [read_custom_split(task, split, Path(data_dir or "."))], False
    elif data_dir is None:
        parts, numbered = read_hub(task, split), True
    else:
        parts, numbered = read_local(task, split, Path(data_dir))
    if not parts:
        return None
    if not (task.record or is_labelled(split)):
        begins = accumulate((len(part.numbers) for part in parts), initial=0)
        for part, begin in zip(parts, begins, strict=False):
            glue_files.check_row_numbers(part, begin)
    if task.is_tagging:
        texts = make_tagged_columns(task, split, parts[0])
    else:
        tables = [make_text_columns(task, split, part, numbered=numbered) for part in parts]
        texts = concatenate_texts(tables)
    if not len(texts):
        problem = f"the {split} split of {task.name} is empty"
        raise UserError(f"{problem}: {parts[0].source} has no rows; give a file with rows")
    return texts


def column_names(task: Task, split: str, numbered: bool = False) -> list[str]:
    """Return the names of the columns to read: one or two texts, and the label if there is one.

    Args:
        numbered: whether the columns are those of `nyu-mll/glue`, where labels are numbers.
    """
    texts, label = (task.texts, "label") if numbered else (task.tsv_columns, task.tsv_label)
    return [*texts, label] if is_labelled(split) else [*texts]


def read_hub(task: Task, split: str) -> list[readers.Table]:
    """Return [table], or [] for an optional split that does not exist."""
    config, name = ("ax", "test") if split == "ax" else (task.name, split)
    copies = "give local copies: --data-dir <folder> and --model-name <folder>"
    wanted = column_names(task, split, numbered=True)
    try:
        return [readers.load_hub(HUB_DATASET, config, name, advice=copies, wanted=wanted)[0]]
    except UserError as error:
        if split != "ax":
            raise
        LOGGER.warning("there is no diagnostic set: %s", error)
        return []


def read_local(task: Task, split: str, data_dir: Path) -> tuple[list[readers.Table], bool]:
    """Return the tables of a split in a folder, and whether the files are those of nyu-mll/glue."""
    if not os.path.isdir(data_dir):  # `Path.is_dir` raises an error if a name is too long.
        raise UserError(f"there is no data folder {data_dir}: check --data-dir")
    config, stem = ("ax", "test") if split == "ax" else (task.name, split)
    shards = glue_files.find_shards(data_dir / config, stem)
    if shards:
        wanted = column_names(task, split, numbered=True)
        tables = [readers.read_parquet(path, wanted, glue_files.NUMBERS) for path in shards]
        return tables, True
    names = glue_files.AX_FILES if split == "ax" else glue_files.tsv_names(task, split)
    found = [name for name in names if (data_dir / name).is_file()]
    if found:
        return [read_glue_tsv(task, split, data_dir, name=found[0])], False
    if split == "ax":
        return [], False
    expected = f"{names[0]} or {config}/{stem}-*.parquet"
    raise UserError(f"no {split} split of {task.name} in {data_dir}: expected {expected}")


def read_glue_tsv(task: Task, split: str, data_dir: Path, name: str) -> readers.Table:
    """Return the table of a TSV file of GLUE."""
    path, wanted = data_dir / name, column_names(task, split)
    if name == glue_files.FIRST_TRAIN_FILE:
        return glue_files.read_mrpc_train_without_dev(path, wanted)
    names = task.tsv_names if is_labelled(split) else None
    skips = task.skips_short_rows and split == "train"
    optional = glue_files.NUMBERS
    return readers.read_tsv(path, wanted, names, skips_broken_rows=skips, optional=optional)


def source_file(task: Task, split: str, folder: str | Path) -> Path | None:
    """Return the file of a custom task's split, or None for a data set on the Hub."""
    files = (task.record or {}).get("files")
    return data_file(folder, files[split]) if files else None


def read_custom_split(task: Task, split: str, folder: Path) -> readers.Table:
    """Return the table of a split of a custom task."""
    wanted, record = column_names(task, split), task.record or {}
    path = source_file(task, split, folder)
    if path is not None:
        return (read_sentences if task.is_tagging else readers.READERS[path.suffix])(path, wanted)
    hub = record["hub"]
    copies = 'check the task\'s "hub", or give "files" in its place'
    dataset = hub["name"], hub["config"], hub["splits"][split]
    table, features = readers.load_hub(
        *dataset, advice=copies, wanted=wanted, revision=hub["revision"]
    )
    feature = features.get(task.tsv_label)
    classes = getattr(getattr(feature, "feature", feature), "names", None)
    if classes and is_labelled(split):  # Replace class numbers by the names of the classes.
        known, column = dict(enumerate(classes)), table.columns[task.tsv_label]
        for row, label in enumerate(column):
            is_list = isinstance(label, list)
            column[row] = [known.get(n, n) for n in label] if is_list else known.get(label, label)
    return table


def make_text_columns(task: Task, split: str, table: readers.Table, numbered: bool) -> TextColumns:
    """Return a table's texts and labels, if the split has any; `numbered` as in `column_names`."""
    names = column_names(task, split, numbered)
    if not is_labelled(split):
        return TextColumns(tuple(check_texts(table, names)), None)
    table, (*texts, label) = drop_unlabelled_rows(task, table), names
    columns = tuple(check_texts(table, texts))
    written = tuple(map(str, range(len(task.labels)))) if numbered else task.written_labels
    labels = decode_labels(task, table.columns[label], table.place, names=written)
    return TextColumns(columns, labels)


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


def make_tagged_columns(task: Task, split: str, table: readers.Table) -> TextColumns:
    """Return a table's sentences and, if the split has them, the tags of all words."""
    (words,) = task.texts
    sentences, labels = check_words(table, words), None
    if is_labelled(split):
        tags = check_tags(table, words, task.tsv_label)
        places = [(row, n) for row, of_row in enumerate(sentences) for n in range(len(of_row))]
        labels = decode_labels(
            task, tags, lambda word: table.place_word(*places[word]), names=task.labels
        )
    return TextColumns((sentences,), labels, place_word=table.place_word)


def concatenate_texts(parts: list[TextColumns]) -> TextColumns:
    """Return several `TextColumns` as one."""
    columns = zip(*(part.columns for part in parts), strict=True)
    labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
    return TextColumns(tuple(list(chain.from_iterable(column)) for column in columns), labels)


def drop_unlabelled_rows(task: Task, table: readers.Table) -> readers.Table:
    """Return a table without the rows whose labels the task file excludes; log how many."""
    if not task.excluded_labels:
        return table
    labels = list(map(label_text, table.columns[task.tsv_label]))
    kept = [row for row, label in enumerate(labels) if label not in task.excluded_labels]
    LOGGER.warning("%s: %d of %d rows have no gold label and are left out",
                   table.source, len(labels) - len(kept), len(labels))  # fmt: skip
    return table.take(kept)


def check_texts(table: readers.Table, names: Iterable[str]) -> list[list[str]]:
    """Return columns of texts; a missing text is an error, blank texts are logged."""
    columns = [table.columns[name] for name in names]
    for name, column in zip(names, columns, strict=True):
        for row, text in enumerate(column):
            if not isinstance(text, str) or readers.SURROGATES.search(text):
                column_name, value = readers.quote_value(name), readers.quote_value(text)
                message = f"no text in column {column_name}, but {value}"
                raise UserError(f"{table.place(row)}: {message}")
    blank = [(row, name) for name, column in zip(names, columns, strict=True)
             for row, text in enumerate(column) if readers.BLANK.fullmatch(text)]  # fmt: skip
    if blank:
        row, name = min(blank)
        count = f"{len(dict(blank))} of {len(columns[0])} rows have one, and are used as they are"
        LOGGER.warning("%s: a blank text in column %s; %s",
                       table.place(row), readers.quote_value(name), count)  # fmt: skip
    return columns
