"""Custom tasks, described by a JSON file instead of the name of a GLUE task (docs/own-tasks.md).

The content of a task file is called a record. A record is checked completely before it is used, and
every error is one `UserError` that names the file and the key. `args.json` and `evaluator.json`
store the record with defaults, so that files with the same meaning give equal records.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bitfit.data.readers import READERS, SHARD, unique_keys
from bitfit.data.tagged_files import SUFFIXES, check_tags, check_words, read_sentences
from bitfit.data.tasks import METRICS, TASKS, Task, label_text
from utils import UserError

Json = Any  # a value of json.loads
Record = dict[str, Json]
# No control characters, and no surrogates, which JSON can contain.
WORD = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # files are named after it
ENTITY_TAG = r"O|[BIES]-.+"  # as seqeval reads them
SPLIT = r"train|(validation|test)(_[a-z0-9_]{1,32})?"


def resolve_task(
    task: str | Path | Record, data_dir: str | Path | None = None
) -> tuple[Task, str | Path | None]:
    """Return (Task, data_dir) of a task's name, a task file or a record; UserError if invalid."""
    if isinstance(task, str) and task in TASKS:
        return TASKS[task], data_dir
    if isinstance(task, dict):
        record, home = validate_record(task, "the task's record"), "."
        record = with_labels(record, data_dir or home)
    elif str(task).endswith(".json"):
        record, home = read_task_file(task, data_dir), default_data_dir(task)
        check_data_files(task, record, data_dir)
    else:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}, or give a .json file")
    return task_of(record), (data_dir or home) if "files" in record else None


def task_of(record: Record) -> Task:
    """Return the `Task` of a validated record (the content of a task file)."""
    splits = record["files"] if "files" in record else record["hub"]["splits"]
    return Task(
        name=record["name"], folder=record["name"],
        texts=tuple([record["words"]] if "words" in record else record["texts"]),
        labels=tuple(record.get("labels", ())), metrics=tuple(record["metrics"]),
        tsv_label=record["tags" if "words" in record else "label"], labels_by_name=True,
        splits={name: source for name, source in splits.items() if name != "train"},
        score_range=tuple(record.get("scores", Task.score_range)), record=record,
        excluded_labels=tuple(record.get("exclude_labels", ())),
    )  # fmt: skip


def read_task_file(path: str | Path, data_dir: str | Path | None = None) -> Record:
    """Return the validated content of a task file (its record); UserError if it is invalid.

    Args:
        data_dir: the folder of the data files; None: the folder of the task file.
    """
    try:
        record = json.loads(Path(path).read_bytes(), object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(f"cannot read the task file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the task file {path} is not JSON: {error}") from None
    record = validate_record(record, path)
    if "hub" in record and data_dir is not None:
        raise UserError(f'{path}: "hub" names a data set on the Hub: leave --data-dir out')
    return with_labels(record, data_dir or default_data_dir(path))


def check_data_files(path: str | Path, record: Record, data_dir: str | Path | None = None) -> None:
    """Raise a UserError if a data file that the task file names does not exist."""
    for split, name in record.get("files", {}).items():
        try:
            data_file(data_dir or default_data_dir(path), name)
        except UserError as error:
            raise UserError(f'{path}: "files": {split}: {error}') from None


def data_file(folder: str | Path, name: str) -> Path:
    """Return the path of a data file of a task file; UserError if it is no readable file.

    A name outside the folder is refused, because --data-dir would have no effect on it.
    """
    file, shard = Path(folder, name), SHARD.search(name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        problem = f"{name} may lie outside of the data folder"
        raise UserError(f"{problem}: give a path inside that folder, and the folder as --data-dir")
    if not os.path.isfile(file):  # `Path.is_file` raises an error if a name is too long.
        raise UserError(f'there is no file {file}: check the task\'s "files" and --data-dir')
    if shard and int(shard[2]) > 1:
        raise UserError(f"{file} is one of {int(shard[2])} files: give a file with all examples")
    return file


def default_data_dir(path: str | Path) -> str:
    """Return the default folder of the data files of a task file."""
    return str(Path(path).parent)


def validate_record(record: Record, source: object) -> Record:
    """Return the content of a task file with defaults, labels as text, and splits by name.

    The message of a UserError begins with `source` and names the key.
    """
    try:
        is_tagging = isinstance(record, dict) and not {"words", "tags"}.isdisjoint(record)
        record = check_keys_of_tagging(record) if is_tagging else check_keys(record)
        name = record["name"]
        require(matches(NAME, name), "name", f"give letters, digits, - and _, not {name!r}")
        require(name.lower() not in TASKS, "name", f"{name} is a task of GLUE: give another name")
        for key, parse in PARSERS.items():
            if key in record:
                record[key] = parse(record[key])
        labels = record.get("labels", [])
        suffixes = SUFFIXES if is_tagging else tuple(READERS)
        for split, file in record.get("files", {}).items():
            message = f"{split}: {file} ends with none of {', '.join(suffixes)}"
            require(Path(file).suffix in suffixes, "files", message)
        for word in record.get("exclude_labels", ()):
            require(word not in labels, "exclude_labels", f'"{word}" is one of the labels')
        check_metrics(record["metrics"], labels, is_tagging)
        return record
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_keys(record: Json) -> Record:
    """Return the content of a task file with texts, with defaults and sorted keys."""
    known = ("label", "labels", "scores", "files", "hub", "exclude_labels")
    require_keys(record, ("name", "texts", "metrics"), known)
    require_one_of(record, "labels", "scores")
    require_one_of(record, "files", "hub")
    record = dict(sorted(({"label": "label"} | record).items()))
    texts, label = record["texts"], record["label"]
    require(are_distinct(texts, 1, 2), "texts", "give a list of one or two columns, each once")
    require(matches(WORD, label), "label", "give the name of a column")
    require(label not in texts, "label", f'"{label}" is one of the texts')
    return record


def check_keys_of_tagging(record: Record) -> Record:
    """Return the content of a task file with words and tags, with sorted keys.

    Columns of CoNLL files may be numbers from 1; the record has them as text.
    """
    require_keys(record, ("name", "words", "tags", "metrics"), ("labels", "files", "hub"))
    require_one_of(record, "files", "hub")
    require("labels" in record or "files" in record, "labels", "give the tags of the Hub's data")
    columns = {key: str(record[key]) for key in ("words", "tags")}
    for key, column in columns.items():
        is_column = isinstance(record[key], str | int) and matches(WORD, column)
        require(is_column, key, "give the name of a column, or in CoNLL files its number from 1")
    message = f"{columns['tags']} is the column of the words"
    require(columns["words"] != columns["tags"], "tags", message)
    return dict(sorted(record.items())) | columns


def with_labels(record: Record, folder: str | Path) -> Record:
    """Return a record of tagging with "labels": if it has none, the training tags, sorted."""
    if "words" not in record or "labels" in record:
        return record
    file = data_file(folder, record["files"]["train"])
    table = read_sentences(file, (record["words"], record["tags"]))
    check_words(table, record["words"])
    tags = check_tags(table, record["words"], record["tags"])
    require(len(set(tags)) > 1, "files", f"train: {file} has no two different tags")
    labels = parse_labels(sorted(set(tags)))
    check_metrics(record["metrics"], labels, is_tagging=True)
    return record | {"labels": labels}


def require(condition: object, key: str, message: str) -> None:
    if not condition:
        raise UserError(f'"{key}": {message}')


def require_keys(
    value: object, required: Sequence[str], optional: Sequence[str] = (), inside: str = ""
) -> None:
    """Raise a UserError unless a JSON value is an object with these keys."""
    known = (*required, *optional)
    if not isinstance(value, dict):
        raise UserError(f"{inside}give an object, {{...}}, with the keys {', '.join(known)}")
    unknown = [key for key in value if key not in known]
    missing = [key for key in required if key not in value]
    if unknown:
        raise UserError(f'{inside}unknown key "{unknown[0]}"; known: {", ".join(known)}')
    if missing:
        raise UserError(f'{inside}the key "{missing[0]}" is missing')


def require_one_of(record: dict[str, Json], first: str, second: str) -> None:
    if (first in record) == (second in record):
        reason = "not both" if first in record else "none is there"
        raise UserError(f'give one of the keys "{first}" and "{second}", {reason}')


def matches(pattern: str, word: Json) -> bool:
    return isinstance(word, str) and re.fullmatch(pattern, word) is not None


def are_distinct(words: Json, least: int, most: float = math.inf) -> bool:
    """Return whether a JSON value is a list of `least` to `most` distinct words."""
    if not isinstance(words, list) or not all(matches(WORD, word) for word in words):
        return False
    return least <= len(words) <= most and len(set(words)) == len(words)


def parse_labels(labels: Json) -> list[str]:
    words: Json = [label_text(label) for label in labels] if isinstance(labels, list) else None
    require(are_distinct(words, 2), "labels", "give a list of two or more words, each once")
    seen: dict[str, str] = {}
    for word in words:
        other = seen.setdefault(normalize_label(word), word)
        both = f"{word!a} and {other!a}"
        require(other == word, "labels", f"{both} look alike: give one of them")
    return words


def normalize_label(word: str) -> str:
    """Return a label as it looks: composed accents, no zero-width characters, single blanks."""
    letters = [c for c in unicodedata.normalize("NFC", word) if unicodedata.category(c) != "Cf"]
    return " ".join("".join(letters).split())


def parse_excluded_labels(labels: Json) -> list[str | None]:
    """Return the labels of excluded examples as text; None stands for a missing label."""
    advice = "give a list of labels, or null for a missing one, each once"
    require(isinstance(labels, list) and labels, "exclude_labels", advice)
    words = [label_text(label) for label in labels]
    for label, word in zip(labels, words, strict=True):
        require(label in (None, "") or matches(WORD, word), "exclude_labels", advice)
    require(len(set(words)) == len(words), "exclude_labels", advice)
    return words


def parse_scores(scores: Json) -> list[float]:
    valid = isinstance(scores, list) and len(scores) == 2
    valid = valid and all(type(s) in (int, float) and abs(s) < 1e30 for s in scores)
    require(valid and scores[0] < scores[1], "scores", "give the lowest and the highest, as [0, 5]")
    return [float(score) for score in scores]


def check_metrics(metrics: Json, labels: Sequence[str], is_tagging: bool) -> None:
    """Raise a UserError unless the metrics are known and fit the task's tags, labels or scores."""
    kind = "tags" if is_tagging else "labels" if labels else "scores"
    advice = f"give a list of some of {', '.join(METRICS[kind])}, each once"
    require(are_distinct(metrics, 1), "metrics", advice)
    for name in metrics:
        require(name in METRICS[kind], "metrics", f"{name} is no metric of {kind}: {advice}")
    others = [label for label in labels if not re.fullmatch(ENTITY_TAG, label)]
    message = f"Entity-F1 is for the tags O, B-..., I-..., not {', '.join(others[:3])}"
    require(not others or "Entity-F1" not in metrics, "metrics", message)
    message = "F1 is for two labels; Macro-F1 is for more"
    require(len(labels) <= 2 or "F1" not in metrics, "metrics", message)


def parse_splits(splits: Json, key: str) -> dict[str, str]:
    """Return {split: file or Hub split}, sorted, so that the order in the file has no effect."""
    require(isinstance(splits, dict) and splits, key, 'give an object, {"train": ..., ...}')
    for split, source in splits.items():
        advice = "name the splits train, validation, test, validation_... or test_..."
        require(matches(SPLIT, split), key, f'unknown split "{split}"; {advice}')
        require(matches(WORD, source), key, f"{split}: give a name, not {source!r}")
    for split in ("train", "validation"):
        require(split in splits, key, f'the split "{split}" is missing')
    return dict(sorted(splits.items()))


def parse_hub(hub: Json) -> dict[str, Any]:
    require_keys(hub, ("name", "splits"), ("config", "revision"), inside='"hub": ')
    hub = {"config": None, "revision": None, **hub}
    for key in ("name", "config", "revision"):
        valid = matches(WORD, hub[key]) or (hub[key] is None and key != "name")
        require(valid, "hub", f"{key}: give a name, not {hub[key]!r}")
    return hub | {"splits": parse_splits(hub["splits"], "splits")}


PARSERS: dict[str, Callable] = {
    "labels": parse_labels,
    "scores": parse_scores,
    "exclude_labels": parse_excluded_labels,
    "files": partial(parse_splits, key="files"),
    "hub": parse_hub,
}
