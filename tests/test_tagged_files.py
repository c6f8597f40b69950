"""Files of tagged sentences: what is read, what is refused, and the files of predictions."""

import json
import random
import re

import datasets
import numpy as np
import pandas as pd
import pytest

from bitfit.data import tagged_files, task_files
from bitfit.data.splits import read_split
from utils import UserError

LABELS = ["B-X", "I-X", "O"]
WORDS = [
    "the",
    "#",
    "_",
    "caf\u00e9",
    "-DOC-",
    "1-2",
    "\u00a0x",
    '"',
    "don't",
    "\u4e2d\u6587",
    "{}",
]


def make_task(folder, content, suffix=".conll", words=1, tags=2, **more):
    """Return the task of a file that is its training, validation and test data."""
    path = folder / f"data{suffix}"
    if isinstance(content, pd.DataFrame):
        content.to_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    files = dict.fromkeys(["train", "validation", "test"], path.name)
    record = {"name": "x", "words": words, "tags": tags, "metrics": ["Accuracy"], "files": files}
    return task_files.resolve_task(record | {"labels": LABELS} | more, folder)[0]


def read_tags(task, folder):
    """Return (sentences, tags by sentence) of a task's training split."""
    texts = read_split(task, "train", folder)
    parts = np.split(np.array(task.labels)[texts.labels], texts.word_counts.cumsum()[:-1])
    return texts.columns[0], [part.tolist() for part in parts]


def columns_text(sentences, tags, separator="\t"):
    blocks = [
        "".join(f"{word}{separator}{tag}\n" for word, tag in zip(words, of, strict=True))
        for words, of in zip(sentences, tags, strict=True)
    ]
    return "\n".join(blocks)


def conllu_text(sentences, tags):
    """With all kinds of lines that are no words."""
    blocks = []
    for words, of in zip(sentences, tags, strict=True):
        rows = ["# text = a comment", "1-2\tab" + "\t_" * 8]
        for n, (word, tag) in enumerate(zip(words, of, strict=True), 1):
            rows.append(f"{n}\t{word}\tlemma\t{tag}" + "\t_" * 6)
        blocks.append("\n".join([*rows, f"{len(words)}.1\tempty" + "\t_" * 8]) + "\n\n")
    return "".join(blocks)


def json_lines(sentences, tags):
    rows = zip(sentences, tags, strict=True)
    return "".join(json.dumps({"id": 7, "w": words, "t": of}) + "\n" for words, of in rows)


FORMATS = {  # (suffix, words, tags, writer)
    "tabs": (".conll", 1, 2, columns_text),
    "blanks": (".txt", 1, 2, lambda w, t: columns_text(w, t, " ")),
    "CoNLL-U": (".conllu", "FORM", "UPOS", conllu_text),
    "JSON Lines": (".jsonl", "w", "t", json_lines),
    "Parquet": (".parquet", "w", "t", lambda w, t: pd.DataFrame({"id": 7, "w": w, "t": t})),
}


@pytest.mark.parametrize("name", FORMATS)
def test_words_and_tags_come_back_from_every_format(name, tmp_path):
    suffix, words, tags, text_of = FORMATS[name]
    rng = random.Random(name)
    sentences = [rng.choices(WORDS, k=rng.randint(1, 12)) for _ in range(50)]
    gold, predicted = ([rng.choices(LABELS, k=len(s)) for s in sentences] for _ in range(2))
    task = make_task(tmp_path, text_of(sentences, gold), suffix, words, tags)
    assert read_tags(task, tmp_path) == (sentences, gold)
    source = tmp_path / f"data{suffix}"
    columns = {task.texts[0]: sentences, task.tsv_label: predicted}
    tagged_files.write_tags(source, source, columns)  # in its own place
    assert read_tags(task, tmp_path) == (sentences, predicted)
    if suffix == ".parquet":
        expected = text_of(sentences, predicted)
        pd.testing.assert_frame_equal(pd.read_parquet(source).map(np.array),
                                      expected.map(np.array))  # fmt: skip
    elif suffix == ".jsonl":
        lines = text_of(sentences, predicted).splitlines()
        assert [json.loads(line) for line in source.read_text().splitlines()] == list(
            map(json.loads, lines)
        )
    else:
        assert source.read_text() == text_of(sentences, predicted)


@pytest.mark.parametrize("suffix", [".conll", ".jsonl", ".parquet"])
def test_tags_are_added_to_files_without_them(suffix, tmp_path):
    names = ("1", "4") if suffix == ".conll" else ("w", "t")
    content = {".conll": "a b\nc d\n\ne f\n", ".jsonl": '{"w": ["a", "c"]}\n{"w": ["e"]}\n',
               ".parquet": pd.DataFrame({"w": [["a", "c"], ["e"]]})}[suffix]  # fmt: skip
    task = make_task(tmp_path, content, suffix, *names)
    assert read_split(task, "test", tmp_path).columns == ([["a", "c"], ["e"]],)
    out = tmp_path / task.server_files["test"]
    source = tmp_path / f"data{suffix}"
    sentences, tags = [["a", "c"], ["e"]], [["O", "B-X"], ["I-X"]]
    tagged_files.write_tags(out, source, {names[0]: sentences, names[1]: tags})
    if suffix == ".conll":
        assert out.read_text() == "a b O\nc d B-X\n\ne f I-X\n"
    else:
        names = ("w", "t")
        table = tagged_files.read_sentences(out, names)
        assert table.columns == {"w": [["a", "c"], ["e"]], "t": [["O", "B-X"], ["I-X"]]}


def test_tags_with_blanks_are_written_with_tabs(tmp_path):
    source, out = tmp_path / "data.conll", tmp_path / "out.conll"
    source.write_text("a x\nb y\n\nc z\n")
    tags = [["noun phrase", "O"], ["O"]]
    tagged_files.write_tags(out, source, {"3": tags})
    assert tagged_files.read_sentences(out, ["1", "3"]).columns == {
        "1": [["a", "b"], ["c"]],
        "3": tags,
    }


@pytest.mark.parametrize(
    "content",
    [
        "a O\nb B-X\n\nc O\n",
        "a O\nb B-X\n\nc O",
        "\ufeffa O\r\nb B-X\r\n\r\nc O\r\n",
        "a O\rb B-X\r\rc O\r",
        "\n\n a  O \nb   B-X\n \n\t\nc O\n\n\n",
        "-DOCSTART- O\n\na\tO\nb\tB-X\n\n-DOCSTART- -X- O O\n\nc\tO\n",
        "# id 1\ttrain\na O\nb B-X\n\n# sentence 2 of 2\nc O\n",
        "# id = 1\na\tO\nb\tB-X\n\n#\ta\tcomment\nc\tO\n",
    ],
)
def test_columns_in_many_styles(content, tmp_path):
    task = make_task(tmp_path, content)
    assert read_tags(task, tmp_path) == ([["a", "b"], ["c"]], [["O", "B-X"], ["O"]])


def test_a_number_sign_is_a_word_where_it_has_all_columns(tmp_path):
    task = make_task(tmp_path, "# one comment\n#\tO\nb\tB-X\n#\tO\n")
    assert read_tags(task, tmp_path)[0] == [["#", "b", "#"]]


U = "\t_" * 6
ERRORS = [  # (suffix, content, message)
    (".conll", "a O\nb\n", r":2: 1 columns where 2 are expected"),
    (".conll", "a O\n\nb O B\n", r":3: 3 columns where 2 are expected"),
    (".conll", "a O\n# a comment inside\n", r":2: 4 columns where 2 are expected"),
    (".conll", "a\nb\n", r": no column '2' among 1"),
    (".conll", "a O\n\nb o\n", r":3: unknown tag 'o'; expected B-X, I-X, O"),
    (".conll", "a O\nb \u041e\n", r":2: unknown tag .* \('\\u041e'\); expected B-X, I-X, O"),
    (".conll", "a\tO\n\tO\n", r":2: no word, but ''"),
    (".conll", "a\tO\n\u200b\tO\n", r":2: no word, but '\\u200b'"),
    (".conll", "a\tO\nb\t\n", r":2: the word 'b' has no tag, but ''"),
    (".conll", "\n\n", r"is empty: .* has no rows"),
    (".conll", "", r"is empty: .* has no rows"),
    (".conll", b"a O\n\xff O\n", r":2: not UTF-8 text"),
    (".conll", b"a O\nb\0 O\n", r":2: not text, there is a zero byte"),
    (".conllu", "1\ta\tO\n", r":1: 3 columns where 10 are expected"),
    (".conllu", f"1\ta\tl\tO{U}\n3\tb\tl\tO{U}\n", r":2: ID '3', expected 2; an empty lin"),
    (".conllu", f"1\ta\tl\tO{U}\n1\tb\tl\tO{U}\n", r":2: ID '1', expected 2"),
    (".conllu", f"1\ta\tl\tO{U}\n2\tb\tl\t_{U}\n", r":2: the word 'b' has no tag, but '_'"),
    (".jsonl", '{"w": ["a"], "t": ["O"]}\n{"w": ["a"], "t": []}\n', r":2: 1 words, but in .* 0 ta"),
    (".jsonl", '{"w": [], "t": []}\n', r":1: no list of words in column 'w', but \[\]"),
    (".jsonl", '{"w": "a b", "t": ["O"]}\n', r":1: no list of words in column 'w', but 'a b'"),
    (".jsonl", '{"w": ["a"]}\n{"w": ["a"], "t": ["O"]}', r":1: 1 words, but in column 't' None"),
    (".jsonl", '{"w": ["a", null], "t": ["O", "O"]}\n', r":1: word 2: no word, but None"),
    (".jsonl", '{"w": ["a", "\\ud800"], "t": ["O", "O"]}\n', r":1: word 2: no word, but '\\ud800'"),
    (".jsonl", '{"w": ["a"], "t": [null]}\n', r":1: word 1: the word 'a' has no tag, but None"),
    (".jsonl", '{"w": ["a"], "t": ["Q"]}\n', r":1: word 1: unknown tag 'Q'"),
    (".jsonl", '{"w": ["a"]}\n', r": no column 't' among w"),
    (".parquet", pd.DataFrame({"w": [["a"]], "t": [["Q"]]}), r": row index 0: word 1: unknown tag"),
    (".parquet", pd.DataFrame({"w": ["a"], "t": [["O"]]}), r": row index 0: no list of words"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), ERRORS)
def test_faults_are_named_with_their_line(suffix, content, message, tmp_path):
    names = {".conllu": ("FORM", "UPOS"), ".conll": (1, 2)}.get(suffix, ("w", "t"))
    task = make_task(tmp_path, content, suffix, *names)
    with pytest.raises(UserError, match=message) as error:
        read_split(task, "train", tmp_path)
    assert f"data{suffix}" in str(error.value)
    assert "\n" not in str(error.value)


def test_underscores_are_tags_in_other_columns(tmp_path):
    content = f"1\t_\tl\tO{U}\n2\tb\tl\tO\t_\tX=1" + "\t_" * 4 + "\n"
    task = make_task(tmp_path, content, ".conllu", "FORM", "FEATS", labels=["_", "X=1"])
    assert read_tags(task, tmp_path) == ([["_", "b"]], [["_", "X=1"]])


def test_missing_labels_are_the_sorted_tags_of_the_training_split(tmp_path):
    make_task(tmp_path, "a V\nb N\n\nc N\n")
    files = {"train": "data.conll", "validation": "data.conll"}
    record = {"name": "x", "words": 1, "tags": 2, "metrics": ["Accuracy"], "files": files}
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert task_files.resolve_task(tmp_path / "x.json")[0].labels == ("N", "V")
    assert task_files.read_task_file(tmp_path / "x.json")["labels"] == ["N", "V"]
    again = task_files.validate_record(task_files.read_task_file(tmp_path / "x.json"), "")
    assert again["labels"] == ["N", "V"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": None}, '"words": give the name of a column, or in CoNLL files its number'),
        ({"tags": 1}, '"tags": 1 is the column of the words'),
        ({"tags": ...}, 'the key "tags" is missing'),
        ({"words": ...}, 'the key "words" is missing'),
        ({"texts": ["a"]}, 'unknown key "texts"'),
        ({"exclude_labels": ["O"]}, 'unknown key "exclude_labels"'),
        ({"scores": [0, 1]}, 'unknown key "scores"'),
        ({"labels": ["O"]}, '"labels": give a list of two or more'),
        ({"labels": ["N", "V"], "metrics": ["Entity-F1"]}, "Entity-F1 is for the tags O, B-"),
        ({"metrics": ["F1"]}, '"metrics": F1 is no metric of tags'),
        ({"files": {"train": "a.csv", "validation": "a.conll"}}, '"files": train: a.csv ends with'),
        ({"files": ..., "hub": {"name": "a/b", "splits": {"train": "t", "validation": "v"}},
          "labels": ...}, '"labels": give the tags'),
    ],
)  # fmt: skip
def test_faults_of_the_task_file(changes, message, tmp_path):
    files = {"train": "a.conll", "validation": "a.conll"}
    record = {"name": "x", "words": 1, "tags": 2, "metrics": ["Accuracy"], "files": files}
    record = {k: v for k, v in (record | {"labels": LABELS} | changes).items() if v is not ...}
    with pytest.raises(UserError, match=re.escape(message)):
        task_files.resolve_task(record, tmp_path)


def test_entity_metrics_are_checked_with_the_tags_of_the_training_split(tmp_path):
    make_task(tmp_path, "a V\nb N\n")
    files = {"train": "data.conll", "validation": "data.conll"}
    record = {"name": "x", "words": 1, "tags": 2, "metrics": ["Entity-F1"], "files": files}
    with pytest.raises(UserError, match=r"Entity-F1 is for .* I-..., not N, V"):
        task_files.resolve_task(record, tmp_path)


def test_one_tag_is_refused_with_the_training_file(tmp_path):
    make_task(tmp_path, "a V\nb V\n")
    files = {"train": "data.conll", "validation": "data.conll"}
    record = {"name": "x", "words": 1, "tags": 2, "metrics": ["Accuracy"], "files": files}
    with pytest.raises(UserError, match=r'"files": train: .*data.conll has no two different tags'):
        task_files.resolve_task(record, tmp_path)


def test_class_labels_of_the_hub_are_read_as_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "ner").mkdir()
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        ner=datasets.List(datasets.ClassLabel(names=["O", "B-X", "I-X"])),
    )
    rows = {"tokens": [["a", "b"], ["c"]], "ner": [[1, 2], [0]]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "ner/train-00000-of-00001.parquet")
    hub = {"name": str(tmp_path / "ner"), "splits": dict.fromkeys(["train", "validation"], "train")}
    record = {"name": "x", "words": "tokens", "tags": "ner", "metrics": ["Entity-F1"],
              "labels": LABELS, "hub": hub}  # fmt: skip
    task, folder = task_files.resolve_task(record)
    assert read_tags(task, folder) == ([["a", "b"], ["c"]], [["B-X", "I-X"], ["O"]])
    with pytest.raises(UserError, match=r"row index 0: word 2: unknown tag 'I-X'"):
        read_split(task_files.resolve_task(record | {"labels": ["O", "B-X"]})[0], "train")
    out = tmp_path / "x.jsonl"
    columns = {"tokens": [["a"], ["c"]], "ner": [["O"], ["B-X"]]}
    tagged_files.write_tags(out, None, columns)
    assert out.read_text() == '{"tokens": ["a"], "ner": ["O"]}\n{"tokens": ["c"], "ner": ["B-X"]}\n'
