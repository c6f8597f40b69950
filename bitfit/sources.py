"""GLUE's texts and labels, from the Hub, from GLUE's own TSV folders or from Parquet files; and
those of a task of one's own, from what its record names.

Every reader answers with `Texts`; every fault is a `UserError` that names file and line.
"""

import logging
import numbers
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitfit.tables import READERS, load_hub, read_lines, read_parquet
from bitfit.tasks import written
from utils import UserError

LOGGER = logging.getLogger("bitfit")
HUB_DATASET = "nyu-mll/glue"
HALVES = re.compile("[\ud800-\udfff]")
AX_FILES = ("AX/AX.tsv", "AX/diagnostic.tsv", "diagnostic/diagnostic.tsv")
OTHER_NAMES = {  # MRPC is also shipped under its first names
    "MRPC/train.tsv": "MRPC/msr_paraphrase_train.txt",
    "MRPC/test.tsv": "MRPC/msr_paraphrase_test.txt",
}


class Texts(NamedTuple):
    """One split: its sentence columns, and its labels as numbers (None for a test split)."""

    columns: tuple[list[str], ...]
    labels: np.ndarray | None

    def __len__(self):
        return len(self.columns[0])

    def take(self, rows):
        """The given rows, in that order."""
        columns = tuple([column[i] for i in rows] for column in self.columns)
        return Texts(columns, None if self.labels is None else self.labels[rows])


def is_labelled(split):
    return split == "train" or split.startswith("validation")


def read_split(task, split, data_dir=None):
    """The texts of one split of a task; None where the optional split "ax" is not there.

    Args:
        data_dir: a folder in GLUE's own layout (`RTE/train.tsv`) or in that of `nyu-mll/glue`
            (`rte/train-00000-of-00001.parquet`); None asks the Hub. Of a task of one's own, the
            folder that its files lie in; None: the current one.

    Raises:
        UserError: a missing file or split, broken rows, unknown labels, no network.
    """
    if task.record:
        texts = read_own(task, split, Path(data_dir or "."))
    elif data_dir is None:
        frame = read_hub(task, split)
        texts = None if frame is None else from_frame(task, split, frame, HUB_DATASET)
    else:
        texts = read_local(task, split, Path(data_dir))
    if texts is not None and not len(texts):
        raise UserError(f"the {split} split of {task.name} is empty: give a file with rows")
    return texts


def read_local(task, split, data_dir):
    if not data_dir.is_dir():
        raise UserError(f"there is no data folder {data_dir}: check --data-dir")
    config, stem = ("ax", "test") if split == "ax" else (task.name, split)
    parquet = sorted((data_dir / config).glob(f"{stem}-*.parquet"))
    if parquet:
        return from_frame(task, split, read_parquet(parquet), parquet[0])
    names = AX_FILES if split == "ax" else tsv_names(task, split)
    found = [data_dir / name for name in names if (data_dir / name).is_file()]
    if found:
        return read_tsv(task, found[0], is_labelled(split))
    if split == "ax":
        return None
    expected = f"{names[0]} or {config}/{stem}-*.parquet"
    raise UserError(f"no {split} split of {task.name} in {data_dir}: expected {expected}")


def read_own(task, split, folder):
    """A split of a task that has a record."""
    if "hub" in task.record:
        return from_frame(task, split, *read_own_hub(task, split))
    path = folder / task.record["files"][split]
    if not path.is_file():
        raise UserError(f'there is no file {path}: check the task\'s "files" and --data-dir')
    if path.suffix == ".tsv":
        return read_tsv(task, path, is_labelled(split))
    frame = READERS[path.suffix](path)
    if not len(frame):
        raise UserError(f"{path} is empty: give a file with rows")
    return from_frame(task, split, frame, path)


def tsv_names(task, split):
    name = f"{task.folder}/{task.splits.get(split, split)}.tsv"
    return (name, OTHER_NAMES[name]) if name in OTHER_NAMES else (name,)


def read_tsv(task, path, labelled):
    """A file of GLUE's own: tab-separated UTF-8, never quoted, so that a `"` is text."""
    lines = read_lines(path)
    names = task.tsv_names if labelled and task.tsv_names else None
    first = 1 if names else 2  # the number of the first line that holds a row
    names = names or (lines.pop(0).split("\t") if lines else ())
    wanted = task.tsv_columns + ((task.tsv_label,) if labelled else ())
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(f"{path}:1: no column {missing[0]!r} among {', '.join(names) or 'none'}")
    rows = split_rows(lines, len(names), path, first, task.skips_short_rows)
    columns = [[row[names.index(name)] for _, row in rows] for name in wanted]
    if not labelled:
        return Texts(tuple(columns), None)
    known = {word: number for number, word in enumerate(task.written_labels)}
    labels = decode_labels(task, columns[-1], known, lambda row: f"{path}:{rows[row][0]}")
    return Texts(tuple(columns[:-1]), labels)


def split_rows(lines, width, path, first, skips_short_rows):
    """[(line number, fields)], each with `width` fields."""
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, first)]
    wrong = [number for number, row in rows if len(row) != width]
    if wrong and not skips_short_rows:
        count = len(rows[wrong[0] - first][1])
        raise UserError(f"{path}:{wrong[0]}: {count} columns where {width} are expected")
    if wrong:
        LOGGER.warning("%s: %d broken rows are left out", path, len(wrong))
    return [(number, row) for number, row in rows if len(row) == width]


def decode_labels(task, values, known, place, number=float):
    """Labels as files write them -> numbers, float32 for a regression.

    Args:
        known: {a label as it is written: its number}
        place: row number -> where that row stands.
        number: a score as it is written -> that score.
    """
    low, high = task.score_range
    expected = ", ".join(map(str, known)) or f"a score from {low:g} to {high:g}"
    labels = []
    for row, value in enumerate(values):
        try:
            labels.append(number(value) if task.is_regression else known[value])
            if task.is_regression and not low <= labels[-1] <= high:
                raise ValueError
        except (ValueError, TypeError, LookupError):
            raise UserError(f"{place(row)}: unknown label {value!r}; expected {expected}") from None
    return np.array(labels, np.float32 if task.is_regression else np.int64)


def read_hub(task, split):
    config, name = ("ax", "test") if split == "ax" else (task.name, split)
    copies = "give local copies: --data-dir <folder> and --model-name <folder>"
    try:
        return load_hub(HUB_DATASET, config, name, None, copies)[0]
    except UserError:
        if split == "ax":
            return None
        raise


def read_own_hub(task, split):
    """(frame, where it is from): a column of class numbers becomes one of their names."""
    hub, label = task.record["hub"], task.tsv_label
    copies = 'check the task\'s "hub", or give "files" in its place'
    where = hub["name"], hub["config"], hub["splits"][split], hub["revision"]
    frame, features = load_hub(*where, copies)
    names = getattr(features.get(label), "names", None)
    if names and is_labelled(split):
        frame[label] = frame[label].map(dict(enumerate(names)))
    return frame, f"{hub['name']} ({split})"


def from_frame(task, split, frame, source):
    """A table with the columns of `nyu-mll/glue`, labels as numbers, or of a record -> Texts."""
    labelled, label = is_labelled(split), task.tsv_label if task.record else "label"
    wanted = task.texts + ((label,) if labelled else ())
    missing = [name for name in wanted if name not in frame]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r} among {', '.join(frame.columns)}")
    for name in task.texts:
        bad = [i for i, text in enumerate(frame[name]) if not is_text(text)]
        if bad:
            raise UserError(f"{source}: row {bad[0]} has no text in column {name!r}")
    columns = tuple(frame[name].tolist() for name in task.texts)
    if not labelled:
        return Texts(columns, None)
    if task.record:
        values, names, number = map(written, frame[label]), task.labels, float
    else:
        values, names, number = frame[label], range(len(task.labels)), real
    known = {name: place for place, name in enumerate(names)}
    labels = decode_labels(task, values, known, lambda i: f"{source}: row {i}", number)
    return Texts(columns, labels)


def is_text(value):
    """Whether it is a word that UTF-8 can hold: JSON can name halves of letters."""
    return isinstance(value, str) and HALVES.search(value) is None


def real(value):
    if not isinstance(value, numbers.Real):
        raise TypeError
    return value
