"""Invalid task files end a command with one line that names the file and the key."""

import json

import pytest
from conftest import forbid_loading
from own_tasks import CB, ON_HUB, flags

import run_glue
from bitfit.data import task_files


def test_a_record_is_checked_to_the_same_record():
    """A saved evaluator's is checked once more when it is loaded."""
    record = task_files.validate_record(CB | {"exclude_labels": [-1, None, "", "-"]}, "")
    assert record["exclude_labels"] == ["-1", None, "", "-"]
    assert task_files.validate_record(record, "") == record
    assert "exclude_labels" not in task_files.validate_record(
        CB, ""
    )  # what older runs have label_text


REMOVED = object()

FAULTS = [
    ({"nmae": "x"}, 'unknown key "nmae"; known: name, texts, metrics, label, labels, scores'),
    ({"name": REMOVED}, 'the key "name" is missing'),
    ({"texts": REMOVED}, 'the key "texts" is missing'),
    ({"metrics": REMOVED}, 'the key "metrics" is missing'),
    ({"labels": REMOVED}, 'give one of the keys "labels" and "scores", none is there'),
    ({"scores": [0, 1]}, 'give one of the keys "labels" and "scores", not both'),
    ({"files": REMOVED}, 'give one of the keys "files" and "hub", none is there'),
    ({"hub": {}}, 'give one of the keys "files" and "hub", not both'),
    ({"name": "a/b"}, "\"name\": give letters, digits, - and _, not 'a/b'"),
    ({"name": ""}, '"name": give letters'),
    ({"name": "x" * 65}, '"name": give letters'),
    ({"name": 3}, '"name": give letters'),
    ({"name": "RTE"}, '"name": RTE is a task of GLUE: give another name'),
    ({"texts": []}, '"texts": give a list of one or two columns, each once'),
    ({"texts": ["a", "b", "c"]}, '"texts": give a list of one or two'),
    ({"texts": ["premise", "premise"]}, '"texts": give a list of one or two'),
    ({"texts": "premise"}, '"texts": give a list of one or two'),
    ({"label": ""}, '"label": give the name of a column'),
    ({"label": "premise"}, '"label": "premise" is one of the texts'),
    ({"labels": ["a"]}, '"labels": give a list of two or more words, each once'),
    ({"labels": []}, '"labels": give a list of two or more'),
    ({"labels": "ab"}, '"labels": give a list of two or more'),
    ({"labels": ["a", "b", "a"]}, '"labels": give a list of two or more words, each once'),
    ({"labels": [1, "1"]}, '"labels": give a list of two or more words, each once'),
    ({"labels": ["a", None]}, '"labels": give a list of two or more'),
    ({"labels": ["a", "\ud800"]}, '"labels": give a list of two or more'),
    ({"labels": ["a", "b\tc"]}, '"labels": give a list of two or more'),
    ({"labels": ["a", "b\x1b"]}, '"labels": give a list of two or more'),
    ({"labels": ["\u00e9", "e\u0301"]}, "\"labels\": 'e\\u0301' and '\\xe9' look alike: give"),
    ({"labels": ["a", "a\u200b"]}, "\"labels\": 'a\\u200b' and 'a' look alike: give one"),
    ({"labels": ["a", "a "]}, "\"labels\": 'a ' and 'a' look alike: give one"),
    ({"label": "a\nb"}, '"label": give the name of a column'),
    ({"exclude_labels": "-"}, '"exclude_labels": give a list of labels, or null for a missing one'),
    ({"exclude_labels": []}, '"exclude_labels": give a list of labels, or null'),
    ({"exclude_labels": [-1, "-1"]}, '"exclude_labels": give a list of labels, or null'),
    ({"exclude_labels": [["-"]]}, '"exclude_labels": give a list of labels, or null'),
    ({"exclude_labels": ["neutral"]}, '"exclude_labels": "neutral" is one of the labels'),
    ({"metrics": []}, '"metrics": give a list of some of Accuracy, F1, Macro-F1, MCC, each'),
    ({"metrics": ["accuracy"]}, '"metrics": accuracy is no metric of labels: give a list of'),
    ({"metrics": ["Accuracy", "Accuracy"]}, '"metrics": give a list of some of'),
    ({"metrics": ["Pearson"]}, '"metrics": Pearson is no metric of labels: give a list of some'),
    ({"metrics": ["F1"]}, '"metrics": F1 is for two labels; Macro-F1 is for more'),
    ({"labels": REMOVED, "scores": [0, 1]}, '"metrics": Accuracy is no metric of scores: give'),
    ({"labels": REMOVED, "scores": [1, 0]}, '"scores": give the lowest and the highest, as [0, 5]'),
    ({"labels": REMOVED, "scores": [0, True]}, '"scores": give the lowest'),
    ({"labels": REMOVED, "scores": [0, float("inf")]}, '"scores": give the lowest'),
    ({"files": []}, '"files": give an object, {"train": ..., ...}'),
    ({"files": {"train": "x.csv"}}, '"files": the split "validation" is missing'),
    ({"files": {"validation": "x.csv"}}, '"files": the split "train" is missing'),
    ({"files": CB["files"] | {"dev": "x.csv"}}, '"files": unknown split "dev"; name the splits'),
    ({"files": CB["files"] | {"test": None}}, '"files": test: give a name, not None'),
    ({"files": CB["files"] | {"test": "x.json"}}, '"files": test: x.json ends with none of .tsv'),
    ({"files": CB["files"] | {"test": "no.csv"}}, '"files": test: there is no file '),
    ({"files": CB["files"] | {"test": "a\x00.csv"}}, '"files": test: give a name, not'),
    ({"files": CB["files"] | {"test": "x" * 256 + ".csv"}}, '"files": test: there is no file '),
    ({"files": CB["files"] | {"test": "/x.csv"}}, '"files": test: /x.csv may lie outside of the'),
    ({"files": CB["files"] | {"test": "CB/../x.csv"}}, '"files": test: CB/../x.csv may lie'),
    ({"files": REMOVED, "hub": "x"}, '"hub": give an object, {...}, with the keys name, splits'),
    ({"files": REMOVED, "hub": {"name": "x"}}, '"hub": the key "splits" is missing'),
    ({"files": REMOVED, "hub": {"name": "x", "splits": {}}}, '"splits": give an object'),
    ({"files": REMOVED, "hub": ON_HUB["hub"] | {"revision": 3}}, '"hub": revision: give a name'),
    ({"files": REMOVED, "hub": ON_HUB["hub"] | {"trust": 1}}, '"hub": unknown key "trust"'),
]  # fmt: skip


def assert_one_line(argv, message, output, capsys):
    assert run_glue.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("run_glue.py: error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not output.exists()


@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_a_fault_of_the_record(superglue, tmp_path, monkeypatch, capsys, changes, message):
    forbid_loading(monkeypatch)
    record = {key: value for key, value in (CB | changes).items() if value is not REMOVED}
    file = superglue / "mine.json"
    file.write_text(json.dumps(record))
    assert_one_line(flags(tmp_path / "out", file), f"{file}: {message}", tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "mine.json is not JSON: Expecting property name"),
        ("", "mine.json is not JSON: Expecting value"),
        ('{"name": "a", "name": "b"}', 'mine.json is not JSON: the key "name" is given twice'),
        ("[" * 100_000, "mine.json is not JSON: "),
        (b"\xff{}", "mine.json is not JSON: "),
        ("[]", "mine.json: give an object, {...}, with the keys name, texts, metrics"),
        (None, "mine.json: No such file"),
    ],
)
def test_a_file_that_is_no_record(tmp_path, capsys, text, message):
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "mine.json").write_bytes(data)
    argv = flags(tmp_path / "out", tmp_path / "mine.json")
    assert_one_line(argv, message, tmp_path / "out", capsys)


def test_faults_of_flags(superglue, tmp_path, capsys):
    """Both flags or none; no such folder, or one that a Hub's data set does not need."""
    out, file = tmp_path / "out", superglue / "cb.json"
    with pytest.raises(SystemExit, match="2"):
        run_glue.main(flags(out, file, "--task-name", "rte"))
    assert capsys.readouterr().err.startswith("run_glue.py: error: give one of --task-name (a ")
    assert_one_line(
        flags(out, file, "--data-dir", "no"), "there is no file no/CB/test", out, capsys
    )
    (superglue / "hub.json").write_text(json.dumps(ON_HUB))
    argv = flags(out, superglue / "hub.json", "--data-dir", "no")
    assert_one_line(argv, 'hub.json: "hub" names a data set on the Hub: leave', out, capsys)


def test_wrong_data_and_no_test_split(superglue, tmp_path, capsys):
    out, file = tmp_path / "out", superglue / "cb.json"
    files = {split: name for split, name in CB["files"].items() if split != "test"}
    file.write_text(json.dumps(CB | {"files": files}))
    message = "the task file of cb names no test split to predict"
    assert_one_line(flags(out, file, "--predict-test"), message, out, capsys)
    file.write_text(json.dumps(CB | {"label": "gold", "files": files}))
    message = "train.jsonl: no column 'gold' among premise, hypothesis, idx, label"
    assert_one_line(flags(out, file), message, out, capsys)
    file.write_text(json.dumps(CB | {"labels": ["entailment", "neutral"], "files": files}))
    message = "train.jsonl:1: unknown label 'contradiction'; expected entailment, neutral"
    assert_one_line(flags(out, file), message, out, capsys)
