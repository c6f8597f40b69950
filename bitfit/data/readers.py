"""Read tables from files and from the Hub's data sets, independently of the task.

Every reader returns a `Table`. Every error is a `UserError` that names the file and, in text files,
the line as an editor counts it.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from utils import LOGGER, UserError, convert_errors, first_line

if TYPE_CHECKING:
    import pyarrow

MAX_QUOTED, MAX_NAMES = 80, 20  # characters of a value, and names, in one message
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can contain them, and they are no text
BLANK = re.compile(r"[\s\x00-\x1f\u200b-\u200f\u2060\ufeff]*")  # only characters without a width
POINTER = b"version https://git-lfs.github.com/spec/"  # git-lfs leaves it for an absent file
SHARD = re.compile(r"(\d+)-of-(\d+)(-[0-9a-f]+)?\.[a-z]+")  # some names end with a hash


class Table(NamedTuple):
    """Some columns of a file or of a data set, with the position of every row."""

    source: str
    columns: dict[str, list]  # {name: [value per row]}
    numbers: Sequence[int]  # each row's first line from 1, or its index from 0
    has_lines: bool = True
    word_lines: Sequence[Sequence[int]] | None = None  # of sentences with one word per line

    def place(self, row: int) -> str:
        """Return the source and the position of a row, for the beginning of error messages."""
        between = ":" if self.has_lines else ": row index "
        return f"{self.source}{between}{self.numbers[row]}"

    def place_word(self, row: int, number: int) -> str:
        """Return the position of a word of a sentence, counted from 0, as `place`."""
        if self.word_lines:
            return f"{self.source}:{self.word_lines[row][number]}"
        return f"{self.place(row)}: word {number + 1}"

    def take(self, rows: Iterable[int]) -> Self:
        """Return the given rows in the given order."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return self._replace(columns=columns, numbers=[self.numbers[i] for i in rows])


def quote_value(value: object) -> str:
    """Return a value in quotes, shortened and without line breaks, for a message.

    Letters outside ASCII are shown with their code points too, because some look like others.
    """
    text = repr(value)
    if len(text) > MAX_QUOTED:
        return f"{text[: MAX_QUOTED - 4]}...{text[-1]}"
    return text if text.isascii() else f"{text} ({value!a})"


def quote_names(names: Iterable) -> str:
    """Return names as a list for a message, in quotes where their ends are unclear."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    plain = re.compile(r"[!-~]([ -~]{,78}[!-~])?")
    words = [n if plain.fullmatch(str(n)) else quote_value(n) for n in names[:MAX_NAMES]]
    return (", ".join(map(str, words)) or "none") + more


def check_column_names(source: object, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise a UserError if a column occurs twice or is missing."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{source}: the column {quote_value(name)} occurs twice: give it once")
    for name in wanted:
        if name not in names:
            raise UserError(f"{source}: no column {quote_value(name)} among {quote_names(names)}")


def check_no_lfs_pointer(path: Path) -> None:
    """Raise a UserError if git-lfs has left a pointer in place of the file."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a git-lfs pointer, not the file: run `git lfs pull` there")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file with LF, CR LF or, if there is no LF at all, CR endings."""
    check_no_lfs_pointer(path)
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    end = b"\n" if b"\n" in data else b"\r"
    try:
        text, position = data.decode(), data.find(b"\0")
        problem = "not text, there is a zero byte"  # as in UTF-16 without a byte order mark
    except UnicodeDecodeError as error:
        text, position, problem = "", error.start, "not UTF-8 text"
    if position >= 0:
        line = data.count(end, 0, position) + 1
        raise UserError(f"{path}:{line}: {problem}; convert the file to UTF-8")
    # Not splitlines(): it would also break rows at characters such as U+2028.
    lines = [line.removesuffix("\r") for line in text.split(end.decode())]
    return lines[:-1] if lines[-1] == "" else lines


def read_tsv(
    path: Path,
    wanted: Sequence[str],
    names: Sequence[str] | None = None,
    skips_broken_rows: bool = False,
    optional: Sequence[str] = (),
) -> Table:
    """Read tab-separated UTF-8 without quoting, so that a `"` is text.

    Args:
        wanted: the names of the columns to return.
        names: the names of all columns, if the file has no header line.
        skips_broken_rows: leave out rows with too few or too many fields, and log how many.
        optional: the names of columns to return if they exist.
    """
    lines = read_lines(path)
    if returns := [number for number, line in enumerate(lines, 1) if "\r" in line]:
        message = "%s:%d: a carriage return within a row; %d rows have one, and it is text"
        LOGGER.warning(message, path, returns[0], len(returns))
    first = 1 if names else 2  # the number of the first line that holds a row
    names = names or (lines.pop(0).split("\t") if lines else [])
    rows = [line.split("\t") for line in lines]
    numbers: Sequence[int] = range(first, first + len(rows))
    kept = [i for i, row in enumerate(rows) if not skips_broken_rows or len(row) == len(names)]
    if len(kept) < len(rows):
        count = f"{len(rows) - len(kept)} of {len(rows)} rows do not have {len(names)} fields"
        LOGGER.warning("%s: %s and are left out", path, count)
        rows, numbers = [rows[i] for i in kept], [numbers[i] for i in kept]
    wanted = [*wanted, *(name for name in optional if name in names)]
    return make_table(path, names, rows, numbers=numbers, wanted=wanted)


def read_csv(path: Path, wanted: Sequence[str]) -> Table:
    """Read comma-separated UTF-8 with a header line, quoted with `"`.

    pandas would fill short rows, cut long ones, and read `NA` as missing.
    """
    csv.field_size_limit(2**31 - 1)  # The default limits a text to 131,072 characters.
    reader = csv.reader(io.StringIO("\n".join(read_lines(path)), newline=""), strict=True)
    rows, numbers, line = [], [], 1
    try:
        for row in reader:
            rows.append(row)
            numbers.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV: {error}") from None
    return make_table(path, rows[0] if rows else [], rows[1:], numbers=numbers[1:], wanted=wanted)


def make_table(
    path: Path,
    names: Sequence[str],
    rows: list[list[str]],
    numbers: Sequence[int],
    wanted: Sequence[str],
) -> Table:
    """Return the `Table` of rows of fields."""
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(names):
            problem = f"{len(row)} columns where {len(names)} are expected"
            raise UserError(f"{path}:{number}: {problem}")
        if row == names and len(names) > 1:  # of several files in one; a single name may be a text
            raise UserError(f"{path}:{number}: the header line occurs again: remove it")
    if names:
        check_column_names(f"{path}:1", names, wanted)
    places = {name: names.index(name) for name in wanted if names}
    columns = {name: [row[places[name]] for row in rows] for name in wanted}
    return Table(str(path), columns, numbers)


def read_json_lines(path: Path, wanted: Sequence[str]) -> Table:
    """Read one JSON object per line, without guessing dates or numbers."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(json.loads(line, object_pairs_hook=unique_keys))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{quote_value(rows[-1])} is none")
        except (ValueError, RecursionError) as error:
            problem = f"not a JSON object in one line: {first_line(error)}"
            raise UserError(f"{path}:{number}: {problem}") from None
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows:
        check_column_names(path, names, wanted)
    columns = {name: [row.get(name) for row in rows] for name in wanted}
    return Table(str(path), columns, range(1, len(rows) + 1))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for a repeated key (json keeps its last value)."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {json.dumps(twice)} is given twice")
    return value


def read_parquet(path: Path, wanted: Sequence[str], optional: Sequence[str] = ()) -> Table:
    def unreadable(error: Exception) -> UserError:
        return UserError(f"{path}: not a readable Parquet file: {first_line(error)}")

    check_no_lfs_pointer(path)
    with convert_errors(unreadable):  # pyarrow raises exceptions of several classes.
        from pyarrow import parquet

        names = parquet.read_schema(path).names
    check_column_names(path, names, wanted)
    wanted = [*wanted, *(name for name in optional if name in names)]
    with convert_errors(unreadable), parquet.ParquetFile(path) as file:
        return arrow_table(path, file.read(columns=wanted), wanted)


def arrow_table(source: object, table: "pyarrow.Table", wanted: Sequence[str]) -> Table:
    columns = {name: table[name].to_pylist() for name in wanted}
    return Table(str(source), columns, range(table.num_rows), has_lines=False)


def load_hub(
    name: str,
    config: str | None,
    split: str,
    advice: str,
    wanted: Sequence[str],
    revision: str | None = None,
) -> tuple[Table, dict[str, Any]]:
    """Return table and features of a data set on the Hub; `advice` ends the message of an error."""
    problem = f"cannot load {name} ({config or 'default'}) from the Hub or its cache"
    # Errors of network, cache and parser have no common class.
    with convert_errors(lambda error: UserError(f"{problem}: {first_line(error)}; {advice}")):
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
        source, table = f"{name} ({split})", rows.with_format("arrow")[:]
    check_column_names(source, table.column_names, wanted)
    return arrow_table(source, table, wanted), rows.features


READERS = {".tsv": read_tsv, ".csv": read_csv, ".jsonl": read_json_lines, ".parquet": read_parquet}
