"""The files of GLUE's folders and of the Parquet layout of `nyu-mll/glue`."""

from pathlib import Path

from bitfit.data import readers
from bitfit.data.tasks import Task
from utils import LOGGER, UserError

AX_FILES = ("AX/AX.tsv", "AX/diagnostic.tsv", "diagnostic/diagnostic.tsv")
FIRST_TRAIN_FILE = "MRPC/msr_paraphrase_train.txt"  # contains the rows of dev.tsv too
MRPC_IDS = ["#1 ID", "#2 ID"]  # the columns that identify MRPC's rows
NUMBERS = ("index", "idx", "id")  # columns of row numbers, here and in nyu-mll/glue
OTHER_NAMES = {  # MRPC is also distributed under its original names
    "MRPC/train.tsv": FIRST_TRAIN_FILE,
    "MRPC/test.tsv": "MRPC/msr_paraphrase_test.txt",
}


def find_shards(folder: Path, stem: str) -> list[Path]:
    """Return the Parquet files of a split in order; UserError unless they are one whole set."""
    found: list[tuple[int, int, Path]] = []  # (number, number of files, file)
    for path in folder.glob(f"{stem}-*.parquet"):
        match = readers.SHARD.fullmatch(path.name.removeprefix(f"{stem}-"))
        found.append((int(match[1]), int(match[2]), path) if match else (-1, -1, path))
    found.sort()
    if [part[:2] for part in found] != [(number, len(found)) for number in range(len(found))]:
        names = readers.quote_names(path.name for *_, path in found)
        advice = "expected all of 00000-of-N to (N-1)-of-N for one N, each once"
        raise UserError(f"{folder}: the files of {stem} are {names}; {advice}")
    return [path for *_, path in found]


def tsv_names(task: Task, split: str) -> tuple[str, ...]:
    """Return the names that the TSV file of a split may have in GLUE\'s folder."""
    name = f"{task.folder}/{task.splits.get(split, split)}.tsv"
    return (name, OTHER_NAMES[name]) if name in OTHER_NAMES else (name,)


def read_mrpc_train_without_dev(path: Path, wanted: list[str]) -> readers.Table:
    """Read MRPC's original train file without the rows of dev.tsv; UserError if it lacks some."""
    dev = path.with_name("dev.tsv")
    if not dev.is_file():
        problem = f"{path} contains the validation rows too, which only {dev} tells"
        raise UserError(f"{problem}: give that file, or train.tsv")
    table, dev_table = (readers.read_tsv(file, [*MRPC_IDS, *wanted]) for file in (path, dev))
    ids, dev_ids = (
        list(zip(*(file.columns[name] for name in MRPC_IDS), strict=True))
        for file in (table, dev_table)
    )
    in_dev = set(dev_ids)
    if missing := in_dev - set(ids):
        problem = f"{path} has no rows with the IDs of {len(missing)} rows of {dev}"
        raise UserError(f"{problem}, so it may contain them under other IDs: give train.tsv")
    kept = [row for row, pair in enumerate(ids) if pair not in in_dev]
    message = "%s: %d of %d rows are left out, because dev.tsv has them"
    LOGGER.warning(message, path, len(ids) - len(kept), len(ids))
    columns = {name: table.columns[name] for name in wanted}
    return table._replace(columns=columns).take(kept)


def check_row_numbers(table: readers.Table, begin: int) -> None:
    """Raise UserError if a column of row numbers does not count on after `begin` earlier rows."""
    for name in table.columns.keys() & NUMBERS:
        for row, value in enumerate(table.columns[name], begin):
            if str(value) != str(row):
                column, found = readers.quote_value(name), readers.quote_value(value)
                problem = f"{column} is {found}, but {row} is expected"
                advice = "give all rows in order from 0, or remove that column"
                raise UserError(f"{table.place(row - begin)}: {problem}: {advice}")
