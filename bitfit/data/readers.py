"""Tables as they lie in files and in the Hub's data sets, whatever the task.

Every reader answers with a `Table`; every fault is a `UserError` that names the file and, where
there are lines, the line as an editor counts them.
"""

import codecs
import csv
import difflib
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from utils import UserError, convert_errors, first_line

if TYPE_CHECKING:
    import pyarrow

LOGGER = logging.getLogger("bitfit")
SHOWN, MANY = 80, 20  # the most characters of a value, and the most names, that a message quotes
POINTER = b"version https://git-lfs.github.com/spec/"  # what git-lfs leaves for an absent file
SHARD = re.compile(r"(\d+)-of-(\d+)(-[0-9a-f]+)?\.[a-z]+")  # some names end with a hash
# Letters that look like others: Cyrillic, then Greek, then dashes, digits and quotes.
LIKE_LETTERS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406"
    "\u03b1\u03bf\u03bd\u03c1\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d"
    "\u039f\u03a1\u03a4\u03a5\u03a7\u2010\u2011\u2013\u2014\u221210I\u2018\u2019",
    "aeopcyxijsABEKMHOPCTXlaovpABEZHlKMNOPTYX-----lOl''",
)


class Table(NamedTuple):
    """Some columns of a file or of a data set, and where each row stands in it."""

    source: str
    columns: dict[str, list]  # {name: [the value of each row]}
    numbers: Sequence[int]  # of each row: its first line from 1, or its index from 0
    has_lines: bool = True

    def place(self, row: int) -> str:
        """Where a row stands, as error messages begin."""
        between = ":" if self.has_lines else ": row index "
        return f"{self.source}{between}{self.numbers[row]}"

    def take(self, rows: Iterable[int]) -> Self:
        """The given rows, in that order."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return self._replace(columns=columns, numbers=[self.numbers[i] for i in rows])


def shown(value: object) -> str:
    """A value as messages quote it: no character of it can break a line, however long it is."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1]}"


def shown_all(names: Iterable) -> str:
    """Names as messages list them, in quotes where they cannot be told apart without."""
    names = list(names)
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    plain = re.compile(r"[!-~]([ -~]{,78}[!-~])?")
    words = [n if plain.fullmatch(str(n)) else shown(n) for n in names[:MANY]]
    return (", ".join(map(str, words)) or "none") + more


def look_alike(word: object, known: Iterable) -> str:
    """Where a word looks like a known one, a note of the characters that differ; else ""."""
    if not isinstance(word, str) or len(word) > SHOWN:
        return ""
    for other in known:
        if isinstance(other, str) and other != word and visible(other) == visible(word):
            parts = difflib.SequenceMatcher(None, word, other, autojunk=False).get_opcodes()
            changes = [
                f"{code_points(word[a:b])} for {code_points(other[c:d])}"
                for kind, a, b, c, d in parts
                if kind != "equal"
            ]
            return f" (it looks like {other!r}, but has {', '.join(changes)})"
    return ""


def visible(word: str) -> str:
    """A word without marks, blanks and characters of no width, like letters as one."""
    letters = unicodedata.normalize("NFKD", word).translate(LIKE_LETTERS)
    return "".join(c for c in letters if unicodedata.category(c)[0] not in "MCZ")


def code_points(letters: str) -> str:
    return " ".join(f"U+{ord(c):04X}" for c in letters) or "nothing"


def check_names(where: object, names: Sequence[str], wanted: Sequence[str]) -> None:
    """UserError where a column is there twice, or is missing."""
    counted = set()
    for name in names:
        if name in counted:
            raise UserError(f"{where}: the column {shown(name)} is there twice: give each once")
        counted.add(name)
    for name in wanted:
        if name not in counted:
            among = f"{shown_all(names)}{look_alike(name, names)}"
            raise UserError(f"{where}: no column {shown(name)} among {among}")


def check_pointer(path: Path) -> None:
    """UserError where git-lfs left a pointer in the place of a file."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a git-lfs pointer, not the file: run `git lfs pull` there")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; they end with LF, CR LF or, where there is no LF at all, CR."""
    check_pointer(path)
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    end = b"\n" if b"\n" in data else b"\r"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(end, 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from None
    if "\0" in text:  # so UTF-16 reads without a byte order mark
        line = data.count(end, 0, data.index(b"\0")) + 1
        raise UserError(f"{path}:{line}: not text, there is a zero byte; convert it to UTF-8")
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
    """Tab-separated UTF-8, never quoted, so that a `"` is text.

    Args:
        wanted: the names of the columns to give.
        names: of all columns, where the file has no line of them.
        skips_broken_rows: leave rows with too few or too many fields out, and print how many.
        optional: the names of columns to give too, where they are there.
    """
    lines = read_lines(path)
    warn_of_returns(path, lines)
    first = 1 if names else 2  # the number of the first line that holds a row
    names = names or (lines.pop(0).split("\t") if lines else [])
    rows = [line.split("\t") for line in lines]
    numbers: Sequence[int] = range(first, first + len(rows))
    if skips_broken_rows:
        rows, numbers = whole_rows(path, rows, numbers, len(names))
    wanted = [*wanted, *(name for name in optional if name in names)]
    return table_of(path, names, rows, numbers, wanted)


def warn_of_returns(path: Path, lines: list[str]) -> None:
    """Print how many rows hold a carriage return: with other line ends too, it ends none."""
    found = [number for number, line in enumerate(lines, 1) if "\r" in line]
    if found:
        what = f"{len(found)} rows have one, and it is text"
        advice = "if it should end a line, convert the file"
        LOGGER.warning("%s:%d: a carriage return within a row; %s: %s",
                       path, found[0], what, advice)  # fmt: skip


def whole_rows(
    path: Path, rows: list[list[str]], numbers: Sequence[int], width: int
) -> tuple[list[list[str]], list[int]]:
    """The rows that have so many fields, and their numbers; a line tells of the others."""
    kept = [i for i, row in enumerate(rows) if len(row) == width]
    if len(kept) < len(rows):
        first = next(i for i, row in enumerate(rows) if len(row) != width)
        what = f"{len(rows) - len(kept)} of {len(rows)} rows do not have {width} fields"
        LOGGER.warning("%s:%d: broken; %s and are left out", path, numbers[first], what)
    return [rows[i] for i in kept], [numbers[i] for i in kept]


def read_csv(path: Path, wanted: Sequence[str]) -> Table:
    """Comma-separated UTF-8 with a line of names, quoted with `"`.

    pandas itself would fill up short rows, cut long ones, and take `NA` for nothing.
    """
    csv.field_size_limit(2**31 - 1)  # else a text has no more than 131,072 letters
    reader = csv.reader(io.StringIO("\n".join(read_lines(path)), newline=""), strict=True)
    rows, numbers, line = [], [], 1
    try:
        for row in reader:
            rows.append(row)
            numbers.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not CSV: {error}") from None
    return table_of(path, rows[0] if rows else [], rows[1:], numbers[1:], wanted)


def table_of(
    path: Path,
    names: Sequence[str],
    rows: list[list[str]],
    numbers: Sequence[int],
    wanted: Sequence[str],
) -> Table:
    """The `Table` of rows of fields."""
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(names):
            what = f"{len(row)} columns where {len(names)} are expected"
            raise UserError(f"{path}:{number}: {what}")
        if row == names:  # files put together; with no labels it reads as texts
            what = "the line of column names once more"
            if len(names) > 1:
                raise UserError(f"{path}:{number}: {what}: take it out")
            LOGGER.warning("%s:%d: %s; it is used as a text", path, number, what)
    if names:
        check_names(f"{path}:1", names, wanted)
    places = {name: names.index(name) for name in wanted if names}
    columns = {name: [row[places[name]] for row in rows] for name in wanted}
    return Table(str(path), columns, numbers)


def read_json_lines(path: Path, wanted: Sequence[str]) -> Table:
    """A JSON object a line; nothing is taken for a date or a number that is none."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(json.loads(line, object_pairs_hook=each_once))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{shown(rows[-1])} is none")
        except (ValueError, RecursionError) as error:
            what = f"not a JSON object in one line: {first_line(error)}"
            raise UserError(f"{path}:{number}: {what}") from None
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows:
        check_names(path, names, wanted)
    columns = {name: [row.get(name) for row in rows] for name in wanted}
    return Table(str(path), columns, range(1, len(rows) + 1))


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key given twice json itself would keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice)} is given twice")
    return value


def read_parquet(path: Path, wanted: Sequence[str], optional: Sequence[str] = ()) -> Table:
    def unreadable(error: Exception) -> UserError:
        return UserError(f"{path}: not a readable Parquet file: {first_line(error)}")

    check_pointer(path)
    with convert_errors(unreadable):  # pyarrow raises several kinds of its own
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            names = file.schema_arrow.names
    check_names(path, names, wanted)
    wanted = [*wanted, *(name for name in optional if name in names)]
    with convert_errors(unreadable), ParquetFile(path) as file:
        return arrow_table(path, file.read(columns=wanted), wanted)


def arrow_table(source: object, table: "pyarrow.Table", wanted: Sequence[str]) -> Table:
    columns = {name: table[name].to_pylist() for name in wanted}
    return Table(str(source), columns, range(table.num_rows), has_lines=False)


def load_hub(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    otherwise: str,
    wanted: Sequence[str],
) -> tuple[Table, dict[str, Any]]:
    """(table, features) of a data set on the Hub; `otherwise`: what to do where there is none."""

    def unreachable(error: Exception) -> UserError:
        what = f"cannot load {name} ({config or 'default'}) from the Hub or its cache"
        return UserError(f"{what}: {first_line(error)}; {otherwise}")

    with convert_errors(unreachable):  # network, cache and parser faults have no common class
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
        source, table = f"{name} ({split})", rows.with_format("arrow")[:]
    check_names(source, table.column_names, wanted)
    return arrow_table(source, table, wanted), rows.features


def read_file(path: Path, wanted: Sequence[str]) -> Table:
    """A file of a task of one's own, read by its ending."""
    return READERS[path.suffix](path, wanted)


READERS = {".tsv": read_tsv, ".csv": read_csv, ".jsonl": read_json_lines, ".parquet": read_parquet}
