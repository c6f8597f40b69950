"""Data of task files: every file format reads the same, and broken data is refused."""

import re

import datasets
import numpy as np
import pandas as pd
import pytest
from own_tasks import NO_GOLD, ON_HUB, SNLI, frames, task_with, write_rows

from bitfit.data import task_files
from bitfit.data.splits import read_split
from bitfit.data.tasks import label_text, predictions
from utils import UserError

TEXTS = ("NA", 'a "quoted", word', "", "null", "line\u2028separator \U0001f600 é", "1.0")

NUMBERS = (1, 0, 1, 1, 0, 0)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_every_format_reads_the_same(tmp_path, ending):
    frames(tmp_path, pd.DataFrame({"other": "x", "text": TEXTS, "label": NUMBERS}))
    files = {"train": f"x.{ending}", "validation": f"x.{ending}", "test": f"x.{ending}"}
    for split, labels in (("train", list(NUMBERS)), ("test", None)):
        texts = read_split(task_with(files=files), split, tmp_path)
        assert texts.columns == (list(TEXTS),)
        assert (texts.labels is None) == (labels is None)
        assert labels is None or texts.labels.tolist() == labels


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_scores_of_any_range_in_every_format(tmp_path, ending):
    scores = [-3.25, 0.1, 100.0]
    frames(tmp_path, pd.DataFrame({"text": ["a", "b", "c"], "label": scores}))
    files = {"train": f"x.{ending}", "validation": f"x.{ending}"}
    changes = {"labels": None, "metrics": ["Pearson"], "files": files}
    task = task_with(scores=[-5, 100], **changes)
    assert read_split(task, "train", tmp_path).labels.tolist() == np.float32(scores).tolist()
    assert predictions(task, np.array([[-9.0], [7.5], [1e9]])).tolist() == [-5, 7.5, 100]
    with pytest.raises(UserError, match=r"unknown label .*100.*; expected a score from -5 to 99.5"):
        read_split(task_with(scores=[-5, 99.5], **changes), "train", tmp_path)


def test_multi_line_csv(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"a\r\nb, ""c""",1\r\n"",0\r\n')
    task = task_with(files={"train": "x.csv", "validation": "x.csv"})
    assert read_split(task, "train", tmp_path).columns == (['a\nb, "c"', ""],)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (True, "true"), (np.False_, "false"), (1, "1"), (np.int8(1), "1"), (1.0, "1"),
        (np.float32(0.5), "0.5"), ("True", "True"), ("1.0", "1.0"), (-1, "-1"), (None, None),
        (float("nan"), None), (float("inf"), None), ([1], None), ({}, None),
    ],
)  # fmt: skip
def test_how_labels_are_written(value, word):
    assert label_text(value) == word


def test_a_missing_label_makes_no_other_numbers(tmp_path):
    """pandas makes floats of whole numbers where one is missing."""
    pd.DataFrame({"text": ["a", "b"], "label": [1, None]}).to_parquet(tmp_path / "x.parquet")
    task = task_with(files={"train": "x.parquet", "validation": "x.parquet"})
    with pytest.raises(UserError, match="row index 1: unknown label None; expected 0, 1"):
        read_split(task, "train", tmp_path)


DATA_FAULTS: dict[str, list] = {
    "x.jsonl": [
        ('{"text": "a", "label": 2}', "x.jsonl:1: unknown label '2'; expected 0, 1"),
        ('{"text": "a", "label": 1}\n{"text": 7, "label": 1}', "x.jsonl:2: no text in column"),
        ('{"txt": "a", "label": 1}', "x.jsonl: no column 'text' among txt, label"),
        ('{"text": "a"}', "x.jsonl: no column 'label' among text"),
        ('{"text": "\\ud800", "label": 1}', "x.jsonl:1: no text in column 'text', but '\\ud800'"),
        ('{"text": "a", "label": 1}\n{"text": ', "x.jsonl:2: not a JSON object in one line"),
        ('{"text": "a", "label": 1, "text": "b"}', 'in one line: the key "text" is given twice'),
        ('{"text": "a", "label": 1}\r{"text": "b", "label": 2}', "x.jsonl:2: unknown label '2'"),
        ('{"text": "a", "label": 1}\n\n{"text": "b", "label": 1}', "x.jsonl:2: not a JSON object"),
        ('{"text": "a", "label": 1}\n{"label": 1}', "x.jsonl:2: no text in column"),
        ('{"text": NaN, "label": 1}', "x.jsonl:1: no text in column 'text', but nan"),
        ('{"text": "a", "label": [1]}', "x.jsonl:1: unknown label [1]; expected 0, 1"),
        ('{"text": "a", "label": "\\u0661"}', "unknown label '\u0661' ('\\u0661'); expected 0, 1"),
        ('["text", "label"]', "x.jsonl:1: not a JSON object in one line"),
        ("", "the train split of own is empty: "),
        (b"\xff", "x.jsonl:1: not UTF-8 text"),
    ],
    "x.csv": [
        ("text,label\na,b,1\n", "x.csv:2: 3 columns where 2 are expected"),
        ("text,label\na,1\nb\n", "x.csv:3: 1 columns where 2 are expected"),
        ("text,label,text\na,1,b\n", "x.csv:1: the column 'text' occurs twice"),
        ("text,label\ntext,label\n", "x.csv:2: the header line occurs again: remove it"),
        ('text,label\n"a\n\nb",1\nc,2\n', "x.csv:5: unknown label '2'; expected 0, 1"),
        ('text,label\n"a\nb",2\n', "x.csv:2: unknown label '2'"),  # where the row begins
        ('text,label\na,1\n"b\nc,1\n', "x.csv:3: not CSV: unexpected end of data"),
        ("text,label\na,1\n\nb,1\n", "x.csv:3: 0 columns where 2 are expected"),
        ("text,label\ra,1\rb,2\r", "x.csv:3: unknown label '2'"),
        ("text;label\na;1\n", "x.csv:1: no column 'text' among text;label"),
        ("text, label\na, 1\n", "x.csv:1: no column 'label' among text, ' label'"),
        ("text,label\na,1.0\n", "x.csv:2: unknown label '1.0'; expected 0, 1"),
        ('text,label\n"a,1\n', "x.csv:2: not CSV: unexpected end of data"),
        ("text,label\na,True\n", "x.csv:2: unknown label 'True'; expected 0, 1"),
        ("text,label\n", "the train split of own is empty: "),
        ("", "the train split of own is empty: "),
    ],
    "x.tsv": [
        ("text\tlabel\na\tb\n", "x.tsv:2: unknown label 'b'; expected 0, 1"),
        ("text\tlabel\na\t\t1\n", "x.tsv:2: 3 columns where 2 are expected"),
        ("label\n1\n", "x.tsv:1: no column 'text' among label"),
        ("text\tlabel\ttext\na\t1\tb\n", "x.tsv:1: the column 'text' occurs twice"),
        ("text\tlabel\na\t1\ttext\tlabel\n", "x.tsv:2: 4 columns where 2 are expected"),
        ("text\tlabel\ra\t1\rb\t2", "x.tsv:3: unknown label '2'"),
        ("text\tlabel\n", "the train split of own is empty: "),
    ],
    "x.parquet": [("no", "x.parquet: not a readable Parquet file")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [(name, *fault) for name, faults in DATA_FAULTS.items() for fault in faults],
)
def test_broken_data(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError, match=re.escape(message)):
        read_split(task_with(files={"train": name, "validation": name}), "train", tmp_path)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_blank_texts_are_texts_in_every_format(tmp_path, caplog, ending):
    """They are counted, and the first is named as an editor, or pandas, counts."""
    rows = {"text": ["a", "", " \u3000", "b", "\ufeff"], "label": [0, 1, 0, 1, 0]}
    frames(tmp_path, pd.DataFrame(rows))
    task = task_with(files=dict.fromkeys(("train", "validation", "test"), f"x.{ending}"))
    first = {"jsonl": ":2", "parquet": ": row index 1"}.get(ending, ":3")
    for split in ("train", "validation", "test"):
        assert read_split(task, split, tmp_path).columns == (rows["text"],)
        (line,) = caplog.messages
        message = "a blank text in column 'text'; 3 of 5 rows have one, and are used as they are"
        assert line == f"{tmp_path / 'x'}.{ending}{first}: {message}"
        caplog.clear()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_missing_text_is_no_text(tmp_path, ending):
    frames(tmp_path, pd.DataFrame({"text": ["a", None], "label": [0, 1]}))
    task = task_with(files=dict.fromkeys(("train", "validation", "test"), f"x.{ending}"))
    for split in ("train", "validation", "test"):
        with pytest.raises(
            UserError, match=r"(:2|row index 1): no text in column 'text', but [Nn]"
        ):
            read_split(task, split, tmp_path)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_rows_without_a_gold_label(tmp_path, caplog, ending):
    """They are left out and counted; places in the file are still right, and no test row goes."""
    rows = {"text": list("abcdef"), "label": ["-", "yes", "-1", "", "no", "maybe"]}
    frames(tmp_path, pd.DataFrame(rows)[:5])
    task = task_with(files=dict.fromkeys(("train", "validation", "test"), f"x.{ending}"), **NO_GOLD)
    for split in ("train", "validation"):
        texts = read_split(task, split, tmp_path)
        assert texts.columns == (["b", "e"],) and texts.labels.tolist() == [1, 0]
        (line,) = caplog.messages
        assert line == f"{tmp_path}/x.{ending}: 3 of 5 rows have no gold label and are left out"
        caplog.clear()
    assert read_split(task, "test", tmp_path).columns == (list("abcde"),)
    assert caplog.text == ""
    frames(tmp_path, pd.DataFrame(rows))
    place = {"jsonl": ":6", "parquet": ": row index 5"}.get(ending, ":7")
    with pytest.raises(
        UserError, match=f"x.{ending}{place}: unknown label 'maybe'; expected no, y"
    ):
        read_split(task, "train", tmp_path)


def test_snli_as_the_docs_have_it(tmp_path):
    labels = ["neutral", "-", "contradiction", "entailment"]
    rows = [{"gold_label": label, "sentence1": "a", "sentence2": label} for label in labels]
    for name in SNLI["files"].values():
        write_rows(tmp_path / name, rows)
    task = task_files.resolve_task(SNLI)[0]
    assert read_split(task, "validation", tmp_path).labels.tolist() == [1, 2, 0]
    assert len(read_split(task, "test", tmp_path)) == 4


def test_json_and_parquet_say_null(tmp_path):
    rows = [{"text": "a", "label": None}, {"text": "b"}, {"text": None, "label": -1.0}]
    write_rows(tmp_path / "x.jsonl", [*rows, {"text": "c", "label": "yes"}])
    assert read_split(task_with(**NO_GOLD), "train", tmp_path).columns == (["c"],)
    pd.DataFrame({"text": ["a", "b"], "label": [None, 0.5]}).to_parquet(tmp_path / "x.parquet")
    scores = {"labels": None, "scores": [0, 1], "metrics": ["Pearson"], "exclude_labels": [None]}
    files = {"train": "x.parquet", "validation": "x.parquet"}
    texts = read_split(task_with(files=files, **scores), "train", tmp_path)
    assert texts.columns == (["b"],) and texts.labels.tolist() == [0.5]


def test_no_row_with_a_gold_label(tmp_path):
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": "-"}])
    with pytest.raises(UserError, match="the train split of own is empty: "):
        read_split(task_with(**NO_GOLD), "train", tmp_path)


@pytest.mark.parametrize(
    "label",
    [
        "\u0435ntailment",  # Cyrillic
        "entailment\u200b",
        "ent ailment",
        "entailment\r",
        "\uff45ntailment",  # of double width
        "entai1ment",
        "e\u0301ntailment",
    ],
)
def test_labels_that_look_alike(tmp_path, label):
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": label}])
    task = task_with(labels=["neutral", "entailment"])
    shown = repr(label) if repr(label).isascii() else f"{label!r} ({label!a})"
    text = f"unknown label {shown}; expected neutral, entailment"
    with pytest.raises(UserError, match=re.escape(text)):
        read_split(task, "train", tmp_path)


def test_a_data_set_of_the_hubs_kind(tmp_path, monkeypatch):
    """Class numbers are read as their names; a validation set is cut off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "reviews").mkdir()
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"])
    )
    rows = {"text": [f"text {i}" for i in range(10)], "label": [i % 2 for i in range(10)]}
    for split, content in (("train", rows), ("test", rows | {"label": [-1] * 10})):
        whole = datasets.Dataset.from_dict(content, features=features)
        whole.to_parquet(tmp_path / f"reviews/{split}-00000-of-00001.parquet")
    hub = {"name": str(tmp_path / "reviews"), "splits": ON_HUB["hub"]["splits"]}
    task, folder = task_files.resolve_task(ON_HUB | {"hub": hub}, None)
    assert folder is None
    assert read_split(task, "train").labels.tolist() == [1, 0] * 4 + [1]  # neg, pos by the record
    assert read_split(task, "validation").columns == (["text 9"],)
    assert read_split(task, "test").labels is None
    with pytest.raises(
        UserError, match=r"reviews \(train\[:90%\]\): row index 0: unknown label 'pos'"
    ):
        read_split(
            task_files.resolve_task(ON_HUB | {"hub": hub, "labels": ["a", "b"]}, None)[0], "train"
        )


def test_a_data_set_of_the_hubs_kind_without_gold_labels(tmp_path, monkeypatch, caplog):
    """SNLI's are -1 in a column of classes; blank and missing texts are as in files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"])
    )
    for split, texts in (("train", ["a", "b", "", "d"]), ("test", ["a", None, "c", "d"])):
        dataset = datasets.Dataset.from_dict({"text": texts, "label": [-1, 0, 1, None]}, features)
        (tmp_path / "snli").mkdir(exist_ok=True)
        dataset.to_parquet(tmp_path / f"snli/{split}-00000-of-00001.parquet")
    splits = {"train": "train", "validation": "train", "test": "test"}
    record = ON_HUB | {"hub": {"name": str(tmp_path / "snli"), "splits": splits}}
    with pytest.raises(UserError, match=r"snli \(train\): row index 0: unknown label '-1'"):
        read_split(task_files.resolve_task(record)[0], "train")
    task = task_files.resolve_task(record | {"exclude_labels": [-1, None]})[0]
    train = read_split(task, "train")
    assert train.columns == (["b", ""],) and train.labels.tolist() == [1, 0]
    assert "(train): 2 of 4 rows have no gold label and are left out" in caplog.text
    assert "(train): row index 2: a blank text in column 'text'; 1 of 2 rows" in caplog.text
    with pytest.raises(UserError, match=r"snli \(test\): row index 1: no text in column 'text'"):
        read_split(task, "test")


def test_data_files_outside_of_the_folder(tmp_path):
    """A link in the folder may lead anywhere; one of several Parquet files is no split."""
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": 1}])
    (tmp_path / "in/y.jsonl").symlink_to(tmp_path / "x.jsonl")
    names = ("y.jsonl", str(tmp_path / "x.jsonl"), "../x.jsonl", "a-00000-of-00002.jsonl")
    tasks = [task_with(files={"train": name, "validation": "y.jsonl"}) for name in names]
    assert len(read_split(tasks[0], "train", tmp_path / "in")) == 1
    for task in tasks[1:3]:
        with pytest.raises(UserError, match=r"x.jsonl may lie outside of the data folder: give"):
            read_split(task, "train", tmp_path / "in")
    write_rows(tmp_path / "in" / names[3], [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"a-00000-of-00002.jsonl is one of 2 files: give a"):
        read_split(tasks[3], "train", tmp_path / "in")
