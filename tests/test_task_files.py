"""Tasks of one's own: SuperGLUE's as the docs have them, the records' faults, every file format."""

import json
import re
import shlex
import signal
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GLUE, ROOT, TINY_BERT
from huggingface_hub import ModelCard
from interruption import differences, output_contents
from moments import at_step, send
from sklearn.metrics import f1_score

import run_glue
from bitfit.cli import experiment
from bitfit.data import task_files
from bitfit.data.splits import read_split
from bitfit.data.tasks import TASKS, label_text, predictions, score
from bitfit.distributed import Ranks
from bitfit.options import parse_args
from bitfit.results.scores import write_predictions
from bitfit.tools import answers, multi_task
from glue_evaluator import GLUEvaluator
from utils import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import compare

PAGE = (ROOT / "docs/own-tasks.md").read_text(encoding="utf-8")
SHOWN = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
BOOLQ, CB, SNLI, ON_HUB = SHOWN
SMALL = ["--model-name", str(TINY_BERT), "--gpu-device", "cpu", "--epochs", "1"]
WORDS = (GLUE / "RTE/dev.tsv").read_text(encoding="utf-8").split()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_up(folder, record, labels, rows=24):
    """Rows in SuperGLUE's layout: texts, `idx`, and but for the test split `label`."""
    rng = np.random.default_rng(0)
    for split, name in record["files"].items():
        made = []
        for idx in range(rows):
            row = {text: " ".join(rng.choice(WORDS, 9)) for text in record["texts"]} | {"idx": idx}
            made.append(row | ({} if split == "test" else {"label": labels[idx % len(labels)]}))
        write_rows(folder / name, made)


@pytest.fixture
def superglue(tmp_path):
    """The folder of the docs: both records, and rows made up for them."""
    folder = tmp_path / "superglue"
    made_up(folder, BOOLQ, [True, False, True])
    made_up(folder, CB, ["contradiction", "entailment", "neutral"])
    for record in (BOOLQ, CB):
        (folder / f"{record['name']}.json").write_text(json.dumps(record))
    return folder


def commands():
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line]
    return [shlex.split(line.replace("bert-base-cased", str(TINY_BERT)))[2:] for line in lines]


def flags(output, file, *more, kind="bitfit"):
    return ["-o", str(output), "--task-file", str(file), "-f", kind, *SMALL, *more]


def predicted(path):
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert list(table.columns) == ["index", "prediction"]
    assert table["index"].tolist() == [str(i) for i in range(len(table))]
    return table["prediction"]


@pytest.mark.pictures
def test_the_docs_commands(superglue, tmp_path, monkeypatch, capsys):
    """BoolQ, one run with all it leaves; CB, a sweep; then a table and a picture of both."""
    monkeypatch.chdir(tmp_path)
    for words in commands():
        assert run_glue.main([*words, *SMALL, "--seed", "0"]) == 0
    printed = capsys.readouterr().out
    assert "boolq, tiny_bert, bitfit (all), learning rate 0.001, seed 0" in printed
    assert "cb, tiny_bert, bitfit (all): validation Accuracy × 100" in printed
    assert len(predicted("out/boolq/boolq.tsv")) == 24
    assert set(predicted("out/boolq/boolq.tsv")) <= {"false", "true"}
    args = json.loads((tmp_path / "out/boolq/args.json").read_text())
    assert args["task"]["labels"] == ["false", "true"]
    assert args["task"]["label"] == "label"
    run = tmp_path / "out/cb/lr0.001_seed0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["task"] == "cb"
    assert set(metrics["last"]["validation"]) == {"Accuracy", "Macro-F1"}
    for folder in (tmp_path / "out/cb", run):
        assert (folder / "learning_curves_macro-f1.png").stat().st_size > 10_000
    assert len(pd.read_csv(tmp_path / "out/cb/results.csv")) == 2
    monkeypatch.setattr(sys, "argv", ["compare.py", "out/boolq", str(run), "--plot", "both.png"])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "boolq", "cb"]
    assert f"{100 * metrics['last']['validation']['Accuracy']:.1f}" in lines[2]
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_a_saved_evaluator_needs_no_task_file(superglue, tmp_path):
    output = tmp_path / "out"
    more = ["--save-evaluator", "--export-model", "--predict-test"]
    assert run_glue.main(flags(output, superglue / "cb.json", *more)) == 0
    (superglue / "cb.json").unlink()
    before = json.loads((output / "metrics.json").read_text())
    loaded = GLUEvaluator.load(output / "evaluator", None)
    assert loaded.task.record == json.loads((output / "args.json").read_text())["task"]
    assert loaded.evaluations == before["evaluations"]
    superglue.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"there is no file .*superglue.*train.jsonl"):
        loaded.evaluate("train")
    loaded = GLUEvaluator.load(output / "evaluator", None, data_dir=tmp_path / "moved")
    assert loaded.evaluate("validation") == pytest.approx(before["last"]["validation"])
    (path,) = loaded.export_model_test_set_predictions(tmp_path / "again")
    assert path.read_bytes() == (output / "cb.tsv").read_bytes()
    config = json.loads((output / "model/config.json").read_text())
    assert config["id2label"] == dict(zip("012", CB["labels"], strict=True))


@pytest.mark.parametrize(
    ("name", "label", "more"),
    [
        ("rte", "label", {"labels": ["entailment", "not_entailment"], "metrics": ["Accuracy"]}),
        ("stsb", "score", {"scores": [0, 5], "metrics": ["Spearman", "Pearson"]}),
    ],
)
def test_a_task_of_glue_by_its_record_is_glues(tmp_path, name, label, more):
    """To the last bit: trained values, every score, every prediction."""
    task = TASKS[name]
    files = {split: f"{task.folder}/{stem}.tsv" for split, stem in task.splits.items()}
    record = {"name": "own", "texts": list(task.texts), "label": label, **more}
    record["files"] = {"train": f"{task.folder}/train.tsv"} | files
    (tmp_path / "own.json").write_text(json.dumps(record))
    both = ["-l", "3e-3", "--train-size", "24", "--save-evaluator", "--predict-test"]
    both += ["--data-dir", str(GLUE)]
    assert run_glue.main(flags(tmp_path / "own", tmp_path / "own.json", *both)) == 0
    plain = ["-o", str(tmp_path / "glue"), "-t", name, "-f", "bitfit", *SMALL, *both]
    assert run_glue.main(plain) == 0
    pairs = {"own.tsv": task.server_files["test"], "metrics.csv": "metrics.csv"}
    pairs |= dict.fromkeys(["evaluator/delta.safetensors", "validation_logits.safetensors"])
    for mine, glues in pairs.items():
        found = (tmp_path / "own" / mine).read_bytes()
        assert found == (tmp_path / "glue" / (glues or mine)).read_bytes(), mine
    args = json.loads((tmp_path / "glue/args.json").read_text())
    assert "task" not in args and args["task_file"] is None


# Files

TEXTS = ("NA", 'a "quoted", word', "", "null", "line\u2028separator \U0001f600 é", "1.0")
NUMBERS = (1, 0, 1, 1, 0, 0)


def frames(folder, frame):
    """The same table in each format; what GLUE's TSV cannot hold is not in it."""
    frame.to_csv(
        folder / "x.tsv", sep="\t", index=False, quoting=3, escapechar=None, quotechar="\0"
    )
    frame.to_csv(folder / "x.csv", index=False)
    frame.to_parquet(folder / "x.parquet")
    write_rows(folder / "x.jsonl", frame.to_dict("records"))


def task_with(**changes):
    """The Task of a record with one text, its files in `x.<ending>` but for the changes."""
    record = {"name": "own", "texts": ["text"], "labels": [0, 1], "metrics": ["Accuracy"]}
    record["files"] = {"train": "x.jsonl", "validation": "x.jsonl"}
    record |= changes
    record = {key: value for key, value in record.items() if value is not None}
    return task_files.task_of(task_files.validate_record(record, "x"))


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
    own = {"labels": None, "metrics": ["Pearson"], "files": files}
    task = task_with(scores=[-5, 100], **own)
    assert read_split(task, "train", tmp_path).labels.tolist() == np.float32(scores).tolist()
    assert predictions(task, np.array([[-9.0], [7.5], [1e9]])).tolist() == [-5, 7.5, 100]
    with pytest.raises(UserError, match=r"unknown label .*100.*; expected a score from -5 to 99.5"):
        read_split(task_with(scores=[-5, 99.5], **own), "train", tmp_path)


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
        ('{"text": "a", "label": "\\u0661"}', "unknown label '\u0661'; expected 0, 1"),
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
        ("text, label\na, 1\n", "x.csv:1: no column 'label' among text, ' label' (it looks like"),
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
        what = "a blank text in column 'text'; 3 of 5 rows have one, and are used as they are"
        assert line == f"{tmp_path / 'x'}.{ending}{first}: {what}"
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


NO_GOLD = {"labels": ["no", "yes"], "exclude_labels": ["-", -1, None, ""]}


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
    ("label", "message"),
    [
        ("\u0435ntailment", "U+0435 for U+0065"),  # Cyrillic
        ("entailment\u200b", "U+200B for nothing"),
        ("ent ailment", "U+0020 for nothing"),
        ("entailment\r", "U+000D for nothing"),
        ("\uff45ntailment", "U+FF45 for U+0065"),  # of double width
        ("entai1ment", "U+0031 for U+006C"),
        ("e\u0301ntailment", "U+0301 for nothing"),
    ],
)
def test_labels_that_look_alike(tmp_path, label, message):
    write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": label}])
    task = task_with(labels=["neutral", "entailment"])
    what = f"unknown label {label!r} (it looks like 'entailment', but has {message}); expected neut"
    with pytest.raises(UserError, match=re.escape(what)):
        read_split(task, "train", tmp_path)


# The Hub, by a data set in a folder


def test_a_data_set_of_the_hubs_kind(tmp_path, monkeypatch):
    """Class numbers are read as their names; a validation set is cut off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "reviews").mkdir()
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"])
    )
    rows = {"text": [f"text {i}" for i in range(10)], "label": [i % 2 for i in range(10)]}
    for split, own in (("train", rows), ("test", rows | {"label": [-1] * 10})):
        whole = datasets.Dataset.from_dict(own, features=features)
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
        own = datasets.Dataset.from_dict({"text": texts, "label": [-1, 0, 1, None]}, features)
        (tmp_path / "snli").mkdir(exist_ok=True)
        own.to_parquet(tmp_path / f"snli/{split}-00000-of-00001.parquet")
    splits = {"train": "train", "validation": "train", "test": "test"}
    record = ON_HUB | {"hub": {"name": str(tmp_path / "snli"), "splits": splits}}
    with pytest.raises(UserError, match=r"snli \(train\): row index 0: unknown label '-1'"):
        read_split(task_files.resolve_task(record)[0], "train")
    task = task_files.resolve_task(record | {"exclude_labels": [-1, None]})[0]
    texts = read_split(task, "train")
    assert texts.columns == (["b", ""],) and texts.labels.tolist() == [1, 0]
    assert "(train): 2 of 4 rows have no gold label and are left out" in caplog.text
    assert "(train): row index 2: a blank text in column 'text'; 1 of 2 rows" in caplog.text
    with pytest.raises(UserError, match=r"snli \(test\): row index 1: no text in column 'text'"):
        read_split(task, "test")


def test_no_network_names_the_record(tmp_path, capsys):
    (tmp_path / "hub.json").write_text(json.dumps(ON_HUB))
    assert run_glue.main(flags(tmp_path / "out", tmp_path / "hub.json")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot load someone/reviews (plain_text) from the Hub or its cache" in line
    assert line.endswith('check the task\'s "hub", or give "files" in its place')


# Scores


def test_macro_f1_is_the_mean_of_the_labels_own():
    task = task_with(labels=["a", "b", "c"], metrics=["Macro-F1", "Accuracy"])
    labels, found = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 2])
    of_each = [f1_score(labels == k, found == k) for k in range(3)]
    scores = score(task, np.eye(3)[found], labels)
    assert scores["Macro-F1"] == pytest.approx(np.mean(of_each))
    assert len(set(of_each)) == 3
    constant = score(task, np.eye(3)[np.zeros(6, int)], labels)
    assert constant["Macro-F1"] == pytest.approx(0.5 / 3)


def test_more_splits_than_three(tmp_path):
    """However they are ordered in the file, the main score is that of `validation`."""
    splits = ("validation_hard", "test_b", "validation", "test", "train")
    record = BOOLQ | {"files": {split: f"{split}.jsonl" for split in splits}}
    for split in splits:
        made_up(tmp_path, BOOLQ | {"files": {split: f"{split}.jsonl"}}, [True, False], 8)
    (tmp_path / "q.json").write_text(json.dumps(record))
    output = tmp_path / "out"
    assert run_glue.main(flags(output, tmp_path / "q.json", "--predict-test")) == 0
    assert {path.name for path in output.glob("*.tsv")} == {"boolq.tsv", "boolq-b.tsv"}
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["evaluations"]) == ["train", "validation", "validation_hard"]
    assert task_files.read_task_file(tmp_path / "q.json") == task_files.validate_record(
        record | {"files": dict(sorted(record["files"].items()))}, ""
    )


def test_from_python(superglue, monkeypatch, tmp_path):
    """A path, or the record itself, whose files then lie in the current folder."""
    monkeypatch.chdir(superglue)
    rows = []
    for task in (superglue / "cb.json", "cb.json", CB):
        evaluator = GLUEvaluator(task, str(TINY_BERT), None)
        evaluator.preprocess_dataset("longest", 64, 8)
        rows.append(evaluator.tokens("train").ids)
        assert evaluator.task.name == "cb"
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    with pytest.raises(UserError, match=r"^the task's record: \"name\": rte is a task of GLUE"):
        GLUEvaluator(CB | {"name": "rte"}, str(TINY_BERT), None)
    with pytest.raises(UserError, match=r"unknown task 'cbb'; known: cola, .*, or give a .json"):
        GLUEvaluator("cbb", str(TINY_BERT), None)


def test_scores_that_are_excluded_are_none_of_the_range():
    scores = {"labels": None, "metrics": ["Pearson"], "scores": [-5, 5]}
    with pytest.raises(UserError, match='"exclude_labels": -1 is one of the scores'):
        task_with(exclude_labels=[-1], **scores)
    assert task_with(exclude_labels=[-9], **scores).excluded_labels == ("-9",)


def test_a_record_is_checked_to_the_same_record():
    """A saved evaluator's is checked once more when it is loaded."""
    record = task_files.validate_record(CB | {"exclude_labels": [-1, None, "", "-"]}, "")
    assert record["exclude_labels"] == ["-1", None, "", "-"]
    assert task_files.validate_record(record, "") == record
    assert "exclude_labels" not in task_files.validate_record(
        CB, ""
    )  # what older runs have label_text


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
    with pytest.raises(UserError, match=r"a-00000-of-00002.jsonl is one of 2 files: give one"):
        read_split(tasks[3], "train", tmp_path / "in")


# Faults of the record: status 2, one line that names file and key, nothing label_text

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
    ({"labels": ["\u00e9", "e\u0301"]}, "\"labels\": 'e\u0301' (U+0065 U+0301) and '\u00e9' (U"),
    ({"labels": ["a", "a\u200b"]}, "\"labels\": 'a\\u200b' (U+0061 U+200B) and 'a' (U+0061) look"),
    ({"labels": ["a", "a "]}, "\"labels\": 'a ' (U+0061 U+0020) and 'a' (U+0061) look alike: give"),
    ({"label": "a\nb"}, '"label": give the name of a column'),
    ({"exclude_labels": "-"}, '"exclude_labels": give a list of labels, or null for a missing one'),
    ({"exclude_labels": []}, '"exclude_labels": give a list of labels, or null'),
    ({"exclude_labels": [-1, "-1"]}, '"exclude_labels": give a list of labels, or null'),
    ({"exclude_labels": [["-"]]}, '"exclude_labels": give a list of labels, or null'),
    ({"exclude_labels": ["neutral"]}, '"exclude_labels": "neutral" is one of the labels'),
    ({"metrics": []}, '"metrics": give a list of some of Accuracy, F1, Macro-F1, MCC, Spearman'),
    ({"metrics": ["accuracy"]}, '"metrics": unknown metric "accuracy"; known: Accuracy, F1'),
    ({"metrics": ["Accuracy", "Accuracy"]}, '"metrics": give a list of some of'),
    ({"metrics": ["Pearson"]}, '"metrics": Pearson is not for labels; Accuracy, F1, Macro-F1, MCC'),
    ({"metrics": ["F1"]}, '"metrics": F1 is for two labels; Macro-F1 is for more'),
    ({"labels": REMOVED, "scores": [0, 1]}, '"metrics": Accuracy is not for scores; Spearman'),
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
    monkeypatch.setattr("glue_evaluator.GLUEvaluator", None)  # a call would fail: no work begins
    record = {key: value for key, value in (CB | changes).items() if value is not REMOVED}
    file = superglue / "mine.json"
    file.write_text(json.dumps(record))
    assert_one_line(flags(tmp_path / "out", file), f"{file}: {message}", tmp_path / "out", capsys)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_a_command_tells_what_it_leaves_out_and_what_leaks(tmp_path, caplog, ending):
    """In every format: one line for each file, and one for training rows that are scored too."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(14)]
    labels, files = ["-", *["no", "yes"] * 5], {}
    for split, own in (("train", texts[:11]), ("validation", texts[8:]), ("test", texts[10:])):
        frames(tmp_path, pd.DataFrame({"text": own, "label": labels[: len(own)]}))
        files[split] = f"{split}.{ending}"
        (tmp_path / f"x.{ending}").rename(tmp_path / files[split])
    record = {"name": "own", "texts": ["text"], "metrics": ["Accuracy"], "files": files}
    (tmp_path / "own.json").write_text(json.dumps(record | NO_GOLD))
    argv = flags(tmp_path / "out", tmp_path / "own.json", "--predict-test", kind="frozen")
    assert run_glue.main(argv) == 0
    said = caplog.text
    assert f"train.{ending}: 1 of 11 rows have no gold label and are left out" in said
    assert f"validation.{ending}: 1 of 6 rows have no gold label and are left out" in said
    assert "of 10 training examples 2 also occur in validation, 1 also occur in test" in said
    assert len(predicted(tmp_path / "out/own.tsv")) == 4


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


def test_its_model_card_and_its_answers(superglue, tmp_path):
    out = tmp_path / "out"
    file = superglue / "cb.json"
    assert run_glue.main(flags(out, file, "--export-model", "--save-evaluator", "-e", "1")) == 0
    card = ModelCard.load(out / "model/README.md")
    assert card.data.metrics == ["accuracy", "f1"]
    assert card.data.datasets is None and card.data.eval_results is None
    assert "fine-tuned on cb (a task of its own)." in card.text
    assert json.loads(card.text.split("```json")[1].split("```")[0])["labels"] == CB["labels"]
    many = multi_task.load_predictor(multi_task.read_evaluators([out]), torch.device("cpu"))
    with many.stack.patched(torch.float32):
        (answer,) = answers.predict_answers(many, [("It rains.", "It is wet.")])
    assert list(answer["cb"]["probabilities"]) == CB["labels"]


def test_scores_in_a_small_range_are_written_with_their_digits(tmp_path):
    record = {"name": "fine", "texts": ["a"], "scores": [0, 0.001], "metrics": ["Pearson"],
              "files": {"train": "a.csv", "validation": "b.csv"}}  # fmt: skip
    task = task_files.resolve_task(record)[0]
    write_predictions(tmp_path / "fine.tsv", task, np.array([0.0001234567]))
    assert (tmp_path / "fine.tsv").read_text().splitlines()[1] == "0\t0.0001235"


# Resume, ranks


def test_resume_wants_the_same_record(superglue, tmp_path, monkeypatch, capsys):
    """Stopped, refused with another record, ended with the same one from elsewhere as if never
    stopped."""
    more = ["--save-evaluator", "--predict-test", "-s", "0", "1", "-e", "2"]
    file = superglue / "cb.json"
    assert run_glue.main(flags(tmp_path / "quiet", file, *more)) == 0
    with at_step(2, send(signal.SIGTERM)):  # in mid epoch
        assert run_glue.main(flags(tmp_path / "out", file, *more)) == 128 + signal.SIGTERM
    file.write_text(json.dumps(CB | {"metrics": ["Macro-F1", "Accuracy"]}))
    capsys.readouterr()
    assert run_glue.main([*flags(tmp_path / "out", file, *more), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "not the interrupted run: the task of --task-file has another metrics: give that" in said
    keys = list(reversed(CB))
    (tmp_path / "b.json").write_text(json.dumps({key: CB[key] for key in keys}, indent=8))
    again = flags(tmp_path / "out", tmp_path / "b.json", *more, "--data-dir", str(superglue))
    assert run_glue.main([*again, "--resume"]) == 0
    quiet, left = (output_contents(tmp_path / name) for name in ("quiet", "out"))
    where = {"task_file": str(tmp_path / "b.json"), "data_dir": str(superglue)}
    expected = {k: v | where if k.endswith("args.json") else v for k, v in quiet.items()}
    assert differences(expected, left) == []
    assert len(left) > 10
    (superglue / "CB/train.jsonl").unlink()  # a finished run asks for nothing
    assert run_glue.main([*again, "--resume"]) == 0
    glues = ["-o", str(tmp_path / "out"), "-t", "rte", "-f", "bitfit", *SMALL, *more, "--resume"]
    assert run_glue.main(glues) == 2
    assert "--task-name was None and is now rte" in capsys.readouterr().err


def test_all_ranks_work_with_the_record_that_the_first_has_read(tmp_path):
    """A second rank opens no task file. (`trained_by` two ranks: tried by hand, it takes long.)"""
    args = parse_args("", flags(tmp_path / "out", tmp_path / "nowhere.json"))
    record = json.loads(json.dumps(task_files.validate_record(CB, "")))
    said = iter([None, record, None, True])  # nothing wrong, the record; nothing wrong, finished
    ranks = Ranks()
    ranks.rank, ranks.size = 1, 2
    ranks.all_gather_object = lambda fact: [next(said), fact]
    experiment.run(args, None, ranks)
    assert args.task == record == task_files.validate_record(CB, "")
    said = iter(["mine.json: there is something wrong", None])
    with pytest.raises(UserError, match="there is something wrong"):
        experiment.run(args, None, ranks)
