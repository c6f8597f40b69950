"""Read and write files of tagged sentences: CoNLL columns, CoNLL-U, JSON Lines and Parquet.

A row of a table is a sentence: a list of words and, in labelled splits, a list with their tags.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from bitfit.data import readers
from bitfit.data.tasks import label_text
from bitfit.files import atomic_file, write_text
from utils import UserError

Columns = dict[str, list[list[str]]]  # {column: the words or tags of each sentence}
CONLLU = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
NEVER_EMPTY = {"UPOS", "XPOS", "DEPREL"}  # columns of CoNLL-U in which _ means a missing tag
COLUMN_FILES = (".conll", ".txt", ".tsv", ".conllu")  # one word per line
SUFFIXES = (*COLUMN_FILES, ".jsonl", ".parquet")


class ColumnFile(NamedTuple):
    """A file with one word per line and an empty line after each sentence."""

    lines: list[str]
    words: list[list[tuple[int, list[str]]]]  # by sentence: (index in `lines`, fields)
    columns: dict[str, int]  # {name, or number from 1: index of the field}
    separator: str  # a tab, or a blank for any number of them


def read_columns(path: Path) -> ColumnFile:
    """Return the words of a CoNLL file; UserError for a line with other columns than the first.

    Lines without a word are skipped: comments, -DOCSTART- and, in CoNLL-U, multiword tokens (1-2)
    and empty nodes (1.1). IDs of CoNLL-U have to count the words of a sentence.
    """
    is_conllu = path.suffix == ".conllu"
    lines = [line.strip(" ") for line in readers.read_lines(path)]
    rows = (line for line in lines if line.strip(" \t") and not line.startswith(("#", "-DOCSTART")))
    first = next(rows, "")
    separator = "\t" if is_conllu or "\t" in first else " "
    width = len(CONLLU) if is_conllu else len(split_fields(first, separator))
    words: list[list[tuple[int, list[str]]]] = [[]]
    for index, line in enumerate(lines):
        fields = split_fields(line, separator)
        if not line.strip(" \t") or line.startswith("-DOCSTART-"):
            words.append([])
        elif line.startswith("#") and not words[-1] and (is_conllu or len(fields) != width):
            continue  # A comment. Within a sentence # is a word.
        elif len(fields) != width:
            problem = f"{len(fields)} columns where {width} are expected"
            raise UserError(f"{path}:{index + 1}: {problem}")
        elif not (is_conllu and re.fullmatch(r"\d+[-.]\d+", fields[0])):
            if is_conllu and fields[0] != str(len(words[-1]) + 1):
                problem = f"ID {readers.quote_value(fields[0])}, expected {len(words[-1]) + 1}"
                raise UserError(f"{path}:{index + 1}: {problem}; an empty line ends a sentence")
            words[-1].append((index, fields))
    names = [*map(str, range(1, width + 1)), *CONLLU * is_conllu]
    columns = {name: number % width for number, name in enumerate(names)}
    return ColumnFile(lines, list(filter(None, words)), columns, separator=separator)


def split_fields(line: str, separator: str) -> list[str]:
    return line.split("\t") if separator == "\t" else re.split(" +", line)


def read_sentences(path: Path, wanted: Sequence[str]) -> readers.Table:
    """Return some columns of a file, by name or, in CoNLL files, also by number from 1."""
    if path.suffix not in COLUMN_FILES:
        return readers.READERS[path.suffix](path, wanted)
    file = read_columns(path)
    if file.words:
        readers.check_column_names(path, list(file.columns), wanted)
    values = {
        name: [[fields[file.columns[name]] for _, fields in sentence] for sentence in file.words]
        for name in wanted
    }
    lines = [[index + 1 for index, _ in sentence] for sentence in file.words]
    return readers.Table(str(path), values, [first for first, *_ in lines], word_lines=lines)


def check_words(table: readers.Table, name: str) -> list[list[str]]:
    """Return a column of words; a sentence or word that is missing or empty is an error."""
    for row, words in enumerate(table.columns[name]):
        if not isinstance(words, list) or not words:
            column, value = readers.quote_value(name), readers.quote_value(words)
            raise UserError(f"{table.place(row)}: no list of words in column {column}, but {value}")
        for number, word in enumerate(words):
            is_text = isinstance(word, str) and not readers.SURROGATES.search(word)
            if not is_text or readers.BLANK.fullmatch(word):
                problem = f"no word, but {readers.quote_value(word)}"
                raise UserError(f"{table.place_word(row, number)}: {problem}")
    return table.columns[name]


def check_tags(table: readers.Table, words: str, tags: str) -> list[str]:
    """Return the tags of all words of a checked column in order, as text."""
    found: list[str] = []
    for row, values in enumerate(table.columns[tags]):
        count = len(table.columns[words][row])
        if not isinstance(values, list) or len(values) != count:
            content = f"{len(values)} tags" if isinstance(values, list) else repr(values)
            problem = f"{count} words, but in column {readers.quote_value(tags)} {content}"
            raise UserError(f"{table.place(row)}: {problem}")
        for number, value in enumerate(values):
            if label_text(value) in (None, "") or (value == "_" and tags in NEVER_EMPTY):
                word = readers.quote_value(table.columns[words][row][number])
                problem = f"the word {word} has no tag, but {readers.quote_value(value)}"
                raise UserError(f"{table.place_word(row, number)}: {problem}")
        found += [str(label_text(value)) for value in values]
    return found


def write_tags(path: Path, source: Path | None, columns: Columns) -> None:
    """Write sentences with predicted tags in the format of their file, atomically.

    Args:
        source: the file of the sentences; None: they are of the Hub, and JSON Lines are written.
        columns: the words and the tags. Columns that the file has are replaced, others are added
            as the last.
    """
    if source and source.suffix == ".parquet":
        write_parquet(path, source, columns)
    elif source and source.suffix in COLUMN_FILES:
        write_text(path, replace_columns(read_columns(source), columns))
    else:
        (sentences, *_) = columns.values()
        lines = readers.read_lines(source) if source else ["{}"] * len(sentences)
        rows = [json.loads(line) | dict(zip(columns, values, strict=True))
                for line, *values in zip(lines, *columns.values(), strict=True)]  # fmt: skip
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace_columns(file: ColumnFile, columns: Columns) -> str:
    """Return the text of a CoNLL file with other values in some columns, or with more columns.

    If a value has a blank, tabs separate the columns.
    """
    texts = chain.from_iterable(chain.from_iterable(columns.values()))
    separator = "\t" if any(" " in text for text in texts) else file.separator
    lines = list(file.lines)
    for name, values in columns.items():
        column = file.columns.get(name)
        for sentence, of_sentence in zip(file.words, values, strict=True):
            for (index, fields), value in zip(sentence, of_sentence, strict=True):
                if column is None:
                    fields.append(value)
                else:
                    fields[column] = value
                lines[index] = separator.join(fields)
    return "".join(f"{line}\n" for line in lines)


def write_parquet(path: Path, source: Path, columns: Columns) -> None:
    """Write a Parquet file with other values in some columns, or with more columns."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(source).replace_schema_metadata(None)
    for name, values in columns.items():
        kept = [other for other in table.column_names if other != name]
        column = pyarrow.array(values, pyarrow.list_(pyarrow.string()))
        table = table.select(kept).append_column(name, column)
    with atomic_file(path) as temporary:
        parquet.write_table(table, temporary)
