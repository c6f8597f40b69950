"""GLUE's texts and labels, from the Hub, from GLUE's own TSV folders or from Parquet files.

Every reader answers with `Texts`; every fault is a `UserError` that names file and line.
"""

import logging
import numbers
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import UserError, blaming, one_line

LOGGER = logging.getLogger("bitfit")
HUB_DATASET = "nyu-mll/glue"
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
            (`rte/train-00000-of-00001.parquet`); None asks the Hub.

    Raises:
        UserError: a missing file or split, broken rows, unknown labels, no network.
    """
    if data_dir is None:
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


def read_lines(path):
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from None
    # Not splitlines(): it would also break rows at characters such as U+2028.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


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
        number: a score as it is written -> that from 0 to 5.
    """
    expected = "a score from 0 to 5" if task.is_regression else ", ".join(map(str, known))
    labels = []
    for row, value in enumerate(values):
        try:
            labels.append(number(value) if task.is_regression else known[value])
            if task.is_regression and not 0 <= labels[-1] <= 5:
                raise ValueError
        except (ValueError, TypeError, LookupError):
            raise UserError(f"{place(row)}: unknown label {value!r}; expected {expected}") from None
    return np.array(labels, np.float32 if task.is_regression else np.int64)


def read_parquet(paths):
    import pandas as pd

    def unreadable(error):
        return UserError(f"{paths[0]}: not a readable Parquet file: {one_line(error)}")

    with blaming(unreadable):  # pyarrow raises several kinds of its own
        return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)


def read_hub(task, split):
    import datasets

    config, name = ("ax", "test") if split == "ax" else (task.name, split)
    datasets.disable_progress_bars()

    def unreachable(error):
        return UserError(
            f"cannot load {HUB_DATASET} ({config}) from the Hub or its cache: {one_line(error)}; "
            "give local copies: --data-dir <folder> and --model-name <folder>"
        )

    try:
        with blaming(unreachable):  # network, cache and parser faults have no common class
            return datasets.load_dataset(HUB_DATASET, config, split=name).to_pandas()
    except UserError:
        if split == "ax":
            return None
        raise


def from_frame(task, split, frame, source):
    """A table with the columns of `nyu-mll/glue`, labels as numbers -> Texts."""
    labelled = is_labelled(split)
    wanted = task.texts + (("label",) if labelled else ())
    missing = [name for name in wanted if name not in frame]
    if missing:
        raise UserError(f"{source}: no column {missing[0]!r} among {', '.join(frame.columns)}")
    for name in task.texts:
        bad = [i for i, text in enumerate(frame[name]) if not isinstance(text, str)]
        if bad:
            raise UserError(f"{source}: row {bad[0]} has no text in column {name!r}")
    columns = tuple(frame[name].tolist() for name in task.texts)
    if not labelled:
        return Texts(columns, None)
    known = {number: number for number in range(len(task.labels))}
    labels = decode_labels(task, frame["label"], known, lambda i: f"{source}: row {i}", real)
    return Texts(columns, labels)


def real(value):
    if not isinstance(value, numbers.Real):
        raise TypeError
    return value
