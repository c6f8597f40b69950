"""Task files: the docs' tasks from data to predictions, and resuming with the same task file."""

import json
import os
import re
import shlex
import signal
import sys

import compare
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GLUE, TINY_BERT
from huggingface_hub import ModelCard
from interruption import differences, output_contents
from moments import at_step, send
from own_tasks import (
    BOOLQ,
    CB,
    NO_GOLD,
    ON_HUB,
    PAGE,
    SMALL,
    WORDS,
    flags,
    frames,
    made_up,
    predicted,
    task_with,
)
from processes import in_ranks, run_program
from sklearn.metrics import f1_score

import run_glue
from bitfit.data import task_files
from bitfit.data.tasks import TASKS, score
from bitfit.results.scores import write_predictions
from bitfit.tools import answers, multi_task
from glue_evaluator import GLUEvaluator
from utils import UserError


def commands():
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line]
    return [shlex.split(line.replace("bert-base-cased", str(TINY_BERT)))[2:] for line in lines]


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


def test_no_network_names_the_record(tmp_path, capsys):
    (tmp_path / "hub.json").write_text(json.dumps(ON_HUB))
    assert run_glue.main(flags(tmp_path / "out", tmp_path / "hub.json")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot load someone/reviews (plain_text) from the Hub or its cache" in line
    assert line.endswith('check the task\'s "hub", or give "files" in its place')


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


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_a_command_tells_what_it_leaves_out_and_what_leaks(tmp_path, caplog, ending):
    """In every format: one line for each file, and one for training rows that are scored too."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(14)]
    labels, files = ["-", *["no", "yes"] * 5], {}
    for split, split_texts in (
        ("train", texts[:11]),
        ("validation", texts[8:]),
        ("test", texts[10:]),
    ):
        frames(tmp_path, pd.DataFrame({"text": split_texts, "label": labels[: len(split_texts)]}))
        files[split] = f"{split}.{ending}"
        (tmp_path / f"x.{ending}").rename(tmp_path / files[split])
    record = {"name": "own", "texts": ["text"], "metrics": ["Accuracy"], "files": files}
    (tmp_path / "own.json").write_text(json.dumps(record | NO_GOLD))
    argv = flags(tmp_path / "out", tmp_path / "own.json", "--predict-test", kind="frozen")
    assert run_glue.main(argv) == 0
    message = caplog.text
    assert f"train.{ending}: 1 of 11 rows have no gold label and are left out" in message
    assert f"validation.{ending}: 1 of 6 rows have no gold label and are left out" in message
    assert "of 10 training examples 2 also occur in validation, 1 also occur in test" in message
    assert len(predicted(tmp_path / "out/own.tsv")) == 4


def test_its_model_card_and_its_answers(superglue, tmp_path):
    out = tmp_path / "out"
    file = superglue / "cb.json"
    assert run_glue.main(flags(out, file, "--export-model", "--save-evaluator", "-e", "1")) == 0
    card = ModelCard.load(out / "model/README.md")
    assert card.data.metrics == ["accuracy", "f1"]
    assert card.data.datasets is None and card.data.eval_results is None
    assert "fine-tuned on cb (a custom task)." in card.text
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
    error = capsys.readouterr().err
    assert (
        "not the interrupted run: the task of --task-file has another metrics: give that" in error
    )
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
    assert "--task-name was left out and is now rte" in capsys.readouterr().err


def run_as_rank(folder, files):
    """Run two seeds with the task file of this rank."""
    file = files[int(os.environ["RANK"])]
    run_program(flags(folder / "out", file, "--train-size", "16", "-s", "0", "1"), folder / "log")


def test_all_ranks_work_with_the_record_that_the_first_has_read(superglue, tmp_path):
    """The second rank opens no task file."""
    files = [superglue / "cb.json", superglue / "nowhere.json"]
    assert in_ranks(2, run_as_rank, tmp_path, files) == [0, 0], (tmp_path / "log").read_text()
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/args.json")]
    record = json.loads(json.dumps(task_files.validate_record(CB, "")))
    assert [args["task"] for args in found] == [record, record]
    assert sorted(args["trained_by"] for args in found) == [[0], [1]]
