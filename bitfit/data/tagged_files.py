"""Read and write files of tagged sentences: CoNLL columns, CoNLL-U, JSON Lines and Parquet.

A row of a table is a sentence: a list of words and, in labelled splits, a list with their tags.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bitfit.data import readers
from bitfit.data.tasks import label_text
from bitfit.files import atomic_file, write_text
from utils import UserError

Tags = dict[str, list[list[str]]]  # {column: the tags of each sentence}
CONLLU = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
NEVER_EMPTY = {"UPOS", "XPOS", "DEPREL"}  # columns of CoNLL-U in which _ means a missing tag
COLUMN_FILES = (".conll", ".txt", ".tsv", ".conllu")  # one word per line
SUFFIXES = (*COLUMN_FILES, ".jsonl", ".parquet")
COLUMN_NAMES = re.compile(r"# *global\.columns *= *(.*)")
# Only characters without a width; or surrogates, which JSON can contain.
NO_WORD = re.compile(r"[\s\x00-\x1f\u200b-\u200f\u2060\ufeff]*|.*[\ud800-\udfff].*", re.DOTALL)


class ColumnFile(NamedTuple):
    """A file with one word per line and an empty line after each sentence."""

    lines: list[str]
    words: list[list[tuple[int, list[str]]]]  # by sentence: (index in `lines`, fields)
    columns: dict[str, int]  # {name, or number from 1: index of the field}
    separator: str  # a tab, or a blank for any number of them


def read_columns(path: Path) -> ColumnFile:
    """Return the words of a CoNLL file.

    Lines without a word are skipped: comments, -DOCSTART- and, in CoNLL-U, multiword tokens (1-2)
    and empty nodes (1.1).

    Raises:
        UserError: a line has another number of fields than the first word, or an unexpected ID.
    """
    is_conllu = path.suffix == ".conllu"
    lines = [line.strip(" ") for line in readers.read_lines(path)]
    rows = (line for line in lines if line.strip(" \t") and not line.startswith(("#", "-DOCSTART")))
    first = next(rows, "")
    separator = "\t" if is_conllu or "\t" in first else " "
    width = len(CONLLU) if is_conllu else len(split_fields(first, separator))
    columns = {str(index + 1): index for index in range(width)}
    columns |= {name: index for index, name in enumerate(CONLLU) if is_conllu}
    words: list[list[tuple[int, list[str]]]] = [[]]
    for index, line in enumerate(lines):
        fields = split_fields(line, separator)
        is_comment = line.startswith("#") and (
            is_conllu or len(fields) != width or (line.startswith("# ") and separator == "\t")
        )
        if not line.strip(" \t") or line.startswith("-DOCSTART-"):
            words += [[]] if words[-1] else []
        elif is_comment and not words[-1]:  # between sentences; else # is a word
            if names := COLUMN_NAMES.fullmatch(line):
                columns |= dict(zip(names[1].split(), range(width), strict=False))
        elif len(fields) != width:
            problem = f"{len(fields)} columns where {width} are expected"
            raise UserError(f"{path}:{index + 1}: {problem}")
        elif not (is_conllu and re.fullmatch(r"\d+[-.]\d+", fields[0])):
            if is_conllu and fields[0] != str(len(words[-1]) + 1):
                problem = f"ID {readers.quote_value(fields[0])}, expected {len(words[-1]) + 1}"
                raise UserError(f"{path}:{index + 1}: {problem}; an empty line ends a sentence")
            words[-1].append((index, fields))
    return ColumnFile(lines, words if words[-1] else words[:-1], columns, separator=separator)


def split_fields(line: str, separator: str) -> list[str]:
    return line.split("\t") if separator == "\t" else re.split(" +", line)


def read_sentences(path: Path, wanted: Sequence[str]) -> readers.Table:
    """Return the table of a file, in the format of the file's suffix.

    Args:
        wanted: the names of the columns to return; in CoNLL files also their numbers, from 1.
    """
    if path.suffix not in COLUMN_FILES:
        return readers.read_file(path, wanted)
    file = read_columns(path)
    if file.words:
        readers.check_column_names(path, list(file.columns), wanted)
    values = {
        name: [[fields[file.columns[name]] for _, fields in sentence] for sentence in file.words]
        for name in wanted
    }
    lines = [[index + 1 for index, _ in sentence] for sentence in file.words]
    first_lines = [of_sentence[0] for of_sentence in lines]
    return readers.Table(str(path), values, first_lines, word_lines=lines)


def place_word(table: readers.Table, row: int, number: int) -> str:
    """Return the position of a word, counted from 0, for the beginning of error messages."""
    lines = table.word_lines
    if lines is None:
        return f"{table.place(row)}: word {number + 1}"
    return f"{table.source}:{lines[row][number]}"


def check_words(table: readers.Table, name: str) -> list[list[str]]:
    """Return a column of words; a sentence or word that is missing or empty is an error."""
    for row, words in enumerate(table.columns[name]):
        if not isinstance(words, list) or not words:
            column, value = readers.quote_value(name), readers.quote_value(words)
            raise UserError(f"{table.place(row)}: no list of words in column {column}, but {value}")
        for number, word in enumerate(words):
            if not isinstance(word, str) or NO_WORD.fullmatch(word):
                problem = f"no word, but {readers.quote_value(word)}"
                raise UserError(f"{place_word(table, row, number)}: {problem}")
    return table.columns[name]


def check_tags(table: readers.Table, words: str, tags: str) -> list[list[str]]:
    """Return a column of tags as text, one for each word of a checked column."""
    found = []
    for row, values in enumerate(table.columns[tags]):
        count = len(table.columns[words][row])
        if not isinstance(values, list) or len(values) != count:
            is_list = isinstance(values, list)
            content = f"{len(values)} tags" if is_list else readers.quote_value(values)
            problem = f"{count} words, but in column {readers.quote_value(tags)} {content}"
            raise UserError(f"{table.place(row)}: {problem}")
        for number, value in enumerate(values):
            if label_text(value) in (None, "") or (value == "_" and tags in NEVER_EMPTY):
                word = readers.quote_value(table.columns[words][row][number])
                problem = f"the word {word} has no tag, but {readers.quote_value(value)}"
                raise UserError(f"{place_word(table, row, number)}: {problem}")
        found.append([str(label_text(value)) for value in values])
    return found


def write_tags(
    path: Path, source: Path | None, words: tuple[str, list[list[str]]], tags: Tags
) -> None:
    """Write sentences with predicted tags in the format of their file, atomically.

    Args:
        source: the file of the sentences; None: they are of the Hub, and JSON Lines are written.
        words: the column of the words, and the words of each sentence.
        tags: {column: tags of each word of each sentence}. Columns that exist are replaced, others
            are added as the last.
    """
    columns = dict([words]) if source is None else {}
    by_row = [dict(zip(columns | tags, row, strict=True))
              for row in zip(*(columns | tags).values(), strict=True)]  # fmt: skip
    if source is None:
        write_text(path, json_lines(by_row))
    elif source.suffix == ".jsonl":
        rows = [json.loads(line) for line in readers.read_lines(source)]
        write_text(path, json_lines([row | new for row, new in zip(rows, by_row, strict=True)]))
    elif source.suffix == ".parquet":
        write_parquet(path, source, tags)
    else:
        write_text(path, columns_text(read_columns(source), tags))


def columns_text(file: ColumnFile, tags: Tags) -> str:
    """Return the text of a CoNLL file with other tags."""
    lines = list(file.lines)
    for name, of_sentences in tags.items():
        column = file.columns.get(name)
        for sentence, of_words in zip(file.words, of_sentences, strict=True):
            for (index, _), tag in zip(sentence, of_words, strict=True):
                lines[index] = replace_field(lines[index], file.separator, column, value=tag)
    return "".join(f"{line}\n" for line in lines)


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def replace_field(line: str, separator: str, column: int | None, value: str) -> str:
    """Return a line with another value in a column, or with one more column."""
    parts = re.split("(\t)" if separator == "\t" else "( +)", line)  # fields at even indices
    if column is None:
        return f"{line}{separator}{value}"
    parts[2 * column] = value
    return "".join(parts)


def write_parquet(path: Path, source: Path, tags: Tags) -> None:
    """Write a Parquet file with columns of tags, which are replaced or added."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(source).replace_schema_metadata(None)
    for name, values in tags.items():
        column = pyarrow.array(values, pyarrow.list_(pyarrow.string()))
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    with atomic_file(path) as temporary:
        parquet.write_table(table, temporary)
