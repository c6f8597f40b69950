"""The files of GLUE's folders and of the Parquet layout of `nyu-mll/glue`."""

import logging
from pathlib import Path

from bitfit.data import readers
from bitfit.data.tasks import Task
from utils import UserError

LOGGER = logging.getLogger("bitfit")
AX_FILES = ("AX/AX.tsv", "AX/diagnostic.tsv", "diagnostic/diagnostic.tsv")
FIRST_TRAIN_FILE = "MRPC/msr_paraphrase_train.txt"  # contains the rows of dev.tsv too
MRPC_IDS = ["#1 ID", "#2 ID"]  # the columns that identify MRPC's rows
NUMBERS = ("index", "idx", "id")  # columns of row numbers, here and in nyu-mll/glue
OTHER_NAMES = {  # MRPC is also distributed under its original names
    "MRPC/train.tsv": FIRST_TRAIN_FILE,
    "MRPC/test.tsv": "MRPC/msr_paraphrase_test.txt",
}


def find_shards(folder: Path, stem: str) -> list[Path]:
    """Return the Parquet files of a split in order; UserError for missing and repeated files."""
    found: dict[tuple[int, int], Path] = {}  # {(number, number of files): file}
    for path in sorted(folder.glob(f"{stem}-*.parquet")):
        match = readers.SHARD.fullmatch(path.name.removeprefix(f"{stem}-"))
        if not match:
            raise UserError(f"{path}: a split's files are named {stem}-00000-of-00001.parquet")
        other = found.setdefault((int(match[1]), int(match[2])), path)
        if other != path:
            raise UserError(f"{other} and {path.name} are the same part of {stem}: remove one")
    counts = sorted({count for _, count in found})
    if len(counts) > 1:
        problem = f"{folder}: some files of {stem} are of {counts[0]}, others of {counts[1]}"
        raise UserError(f"{problem}: remove the files of one set")
    count, numbers = max(counts, default=0), {number for number, _ in found}
    for number in range(count):
        if number not in numbers:
            name = f"{stem}-{number:05}-of-{count:05}.parquet"
            raise UserError(f"{folder / name} is missing: {len(found)} of {count} files are there")
    if len(found) > count:
        raise UserError(f"{found[max(found)]}: its number is too high: remove it")
    return [found[key] for key in sorted(found)]


def tsv_names(task: Task, split: str) -> tuple[str, ...]:
    """Return the names that the TSV file of a split may have in GLUE\'s folder."""
    name = f"{task.folder}/{task.splits.get(split, split)}.tsv"
    return (name, OTHER_NAMES[name]) if name in OTHER_NAMES else (name,)


def read_mrpc_train_without_dev(path: Path, wanted: list[str]) -> readers.Table:
    """Read MRPC's original training file without the rows of dev.tsv.

    Raises:
        UserError: there is no dev.tsv, or the file does not contain all rows of dev.tsv.
    """
    dev = path.with_name("dev.tsv")
    if not dev.is_file():
        problem = f"{path} contains the validation rows too, which only {dev} tells"
        raise UserError(f"{problem}: give that file, or train.tsv")
    table, dev_table = (readers.read_tsv(file, [*MRPC_IDS, *wanted]) for file in (path, dev))
    found = matching_rows(table, dev_table)
    if not all(found):
        problem = f"{path} has no rows with the IDs of {found.count([])} rows of {dev}"
        raise UserError(f"{problem}, so it may contain them under other IDs: give train.tsv")
    dropped, rows = {row for same in found for row in same}, range(len(table.numbers))
    message = "%s: %d of %d rows are left out, because dev.tsv has them"
    LOGGER.warning(message, path, len(dropped), len(rows))
    table = table.take([row for row in rows if row not in dropped])
    return table._replace(columns={name: table.columns[name] for name in wanted})


def matching_rows(table: readers.Table, others: readers.Table) -> list[list[int]]:
    """Return the numbers of equal rows in `table` for each row of `others`.

    Rows are equal by their two IDs, or by all columns if several rows have the same IDs.
    """
    rows = list(zip(*table.columns.values(), strict=True))
    by_ids: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows):
        by_ids.setdefault(row[:2], []).append(number)
    found = []
    for other in zip(*others.columns.values(), strict=True):
        same = by_ids.get(other[:2], [])
        found.append(same if len(same) == 1 else [n for n in same if rows[n] == other])
    return found


def drop_row_numbers(table: readers.Table, begin: int) -> readers.Table:
    """Return a table without its column of row numbers.

    Args:
        begin: the number of rows in earlier files of the same split.

    Raises:
        UserError: a number is not the position of its row, counted from 0.
    """
    for name in table.columns.keys() & NUMBERS:
        for row, value in enumerate(table.columns[name], begin):
            if str(value) != str(row):
                message = f"{readers.quote_value(name)} is {readers.quote_value(value)}"
                message += f", but {row} is expected: predictions number the rows from 0"
                advice = "give all rows in their order, or remove that column"
                raise UserError(f"{table.place(row - begin)}: {message}: {advice}")
    columns = {name: values for name, values in table.columns.items() if name not in NUMBERS}
    return table._replace(columns=columns)
