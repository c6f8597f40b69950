"""From a task file to tagged files: run_glue.py and scripts/predict.py on the toy sentences."""

import io
import json
import re
import shutil

import numpy as np
import predict
import pytest
from conftest import ROOT, TINY_BERT
from documentation import commands
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from toy_tagging import write_tagging

import run_glue
from bitfit.data.splits import read_split
from bitfit.data.tagged_files import read_sentences
from bitfit.data.task_files import resolve_task, validate_record
from bitfit.data.tasks import score
from glue_evaluator import GLUEvaluator
from utils import UserError

TAGGING = ROOT / "examples" / "tagging"
NAMES = ("toy-pos", "toy-phrases")
CPU = ["--gpu-device", "cpu"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Output folders of both toy tasks, whose rows are cut at 12 tokens."""
    folder = tmp_path_factory.mktemp("out")
    for name in NAMES:
        assert run_glue.main([
            "-o", str(folder / name), "--task-file", str(TAGGING / f"{name}.json"), *CPU,
            "-m", str(TINY_BERT), "-f", "bitfit", "-l", "3e-3", "-e", "1", "--train-size", "80",
            "--max-seq-length", "12", "--save-evaluator", "--predict-test", "--export-model",
        ]) == 0  # fmt: skip
    return folder


def evaluators(outputs, *names):
    return [str(outputs / name / "evaluator") for name in names]


def words_of(path):
    return [line.replace("\t", " ").split(" ")[0] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_predicted_file_has_all_words_with_the_evaluators_tags(name, outputs):
    evaluator = GLUEvaluator.load(outputs / name / "evaluator", None)
    evaluator.preprocess_dataset("longest", 12, 8, test_splits=True)
    logits = evaluator.predict("test")
    table = read_sentences(outputs / name / f"{name}.conll", ["1", "2"])
    assert words_of(outputs / name / f"{name}.conll") == words_of(TAGGING / "test.conll")
    tags = [evaluator.task.labels[k] for k in logits.argmax(axis=1)]
    assert [tag for of in table.columns["2"] for tag in of] == tags
    assert evaluator.tokens("test").continues.any()


@pytest.mark.parametrize("name", NAMES)
def test_args_json_describes_the_splits(name, outputs):
    args = json.loads((outputs / name / "args.json").read_text())
    task, folder = resolve_task(TAGGING / f"{name}.json")
    assert args["task"] == task.record
    assert args["uncommitted_changes"] in (True, False, None)
    texts, splits = read_split(task, "validation", folder), args["splits"]
    counts = np.bincount(texts.labels)
    assert splits["validation"]["sentences"] == 120
    assert splits["validation"]["words"] == counts.sum()
    assert splits["validation"]["tags"] == dict(zip(task.labels, counts.tolist(), strict=True))
    assert splits["train"]["rows"] == 80
    assert splits["test"]["words"] == len(words_of(TAGGING / "test.conll")) - 60


def test_the_kept_logits_give_the_scores_again(outputs):
    folder = outputs / "toy-phrases"
    tensors = load_file(folder / "validation_logits.safetensors")
    task = resolve_task(TAGGING / "toy-phrases.json")[0]
    logits, labels = tensors["validation"], tensors["validation.labels"]
    assert logits.shape == (1, len(labels), 7)
    assert logits.dtype == np.float16
    again = score(task, logits[-1].astype(np.float32), labels, tensors["validation.sentences"])
    last = json.loads((folder / "metrics.json").read_text())["last"]["validation"]
    assert again == pytest.approx(last)


def test_a_changed_test_file_is_noticed(outputs, tmp_path):
    shutil.copytree(TAGGING, tmp_path / "data")
    evaluator = GLUEvaluator.load(outputs / "toy-pos" / "evaluator", None,
                                  data_dir=tmp_path / "data")  # fmt: skip
    evaluator.preprocess_dataset("longest", 12, 8, test_splits=True)
    (tmp_path / "data" / "test.conll").write_text("the\n")
    with pytest.raises(UserError, match="the test split of toy-pos has changed since it was read"):
        evaluator.export_model_test_set_predictions(tmp_path / "out")


def test_the_model_card_is_of_a_token_classifier(outputs):
    card = ModelCard.load(outputs / "toy-phrases" / "model" / "README.md")
    assert card.data.pipeline_tag == "token-classification"
    assert "AutoModelForTokenClassification" in card.text


@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
def test_predict_writes_the_tags_of_all_evaluators_into_one_file(names, outputs, tmp_path):
    out = tmp_path / "out.conll"
    source = str(TAGGING / "test.conll")
    arguments = [*evaluators(outputs, *names), "-i", source, "-o", str(out), *CPU]
    assert predict.main(arguments) == 0
    assert words_of(out) == words_of(TAGGING / "test.conll")
    for number, name in enumerate(names, 2):
        alone = read_sentences(outputs / name / f"{name}.conll", ["2"]).columns["2"]
        assert read_sentences(out, [str(number)]).columns[str(number)] == alone


def test_predict_answers_lines_of_words(outputs, monkeypatch, capsys):
    lines = [" ".join(s) for s in read_sentences(TAGGING / "test.conll", ["1"]).columns["1"]]
    stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert predict.main([*evaluators(outputs, *NAMES), *CPU, "-b", "7"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for name in NAMES:
        table = read_sentences(outputs / name / f"{name}.conll", ["1", "2"])
        expected = [{"words": words, "tags": tags} for words, tags in zip(
            table.columns["1"], table.columns["2"], strict=True)]  # fmt: skip
        assert [answer[name] for answer in answers] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "test.conll"], "to tag such a file, give --output FILE.conll"),
        (
            ["-i", "test.conll", "-o", "./test.conll"],
            "test.conll is the file of --input: give anoth",
        ),
        (["-i", "test.conll", "-o", "out.jsonl"], "out.jsonl is not a .conll file"),
        (["-o", "out.conll"], "--input -: for --output give a file .conll, .txt"),
        (["-i", "nowhere.conll", "-o", "out.conll"], "cannot read --input nowhere.conll"),
        (["-i", "empty.conll", "-o", "out.conll"], "--input empty.conll has no sentences"),
        (["-i", "soft.conll", "-o", "out.conll"], "soft.conll:2: '\\xad' has no sub-tokens"),
        (["-i", "zero.conll", "-o", "out.conll"], "zero.conll:1: no word, but '\\u200b'"),
        (["-i", "test.conll", "-o", "no/out.conll"], "no/out.conll is not a .conll file in an ex"),
    ],
)
def test_faults_of_predict(arguments, message, outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TAGGING / "test.conll", tmp_path)
    for name, text in {"empty": "\n", "soft": "a\n\u00ad\n", "zero": "\u200b\n"}.items():
        (tmp_path / f"{name}.conll").write_text(text)
    assert predict.main([*evaluators(outputs, "toy-pos"), *CPU, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out.conll").exists()


def test_taggers_and_classifiers_do_not_answer_together(outputs, tmp_path, capsys):
    assert run_glue.main([
        "-o", str(tmp_path / "out"), "-t", "sst2", "--data-dir", str(ROOT / "examples/glue"), *CPU,
        "-m", str(TINY_BERT), "-f", "frozen", "-e", "1", "--train-size", "8", "--save-evaluator",
    ]) == 0  # fmt: skip
    other = str(tmp_path / "out" / "evaluator")
    assert predict.main([*evaluators(outputs, "toy-pos"), other, *CPU]) == 2
    assert "have different kinds of tasks" in capsys.readouterr().err
    assert predict.main([other, "-i", str(TAGGING / "test.conll"), "-o", "x.conll", *CPU]) == 2
    assert "--output is for evaluators that tag words" in capsys.readouterr().err


def test_the_commands_of_the_documentation(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    words = [line.split() for line in commands() if "examples/tagging" in line]
    train, tag = [
        command for command in words if command[1] in ("run_glue.py", "scripts/predict.py")
    ]
    assert run_glue.main([*train[2:], *CPU, "--epochs", "1"]) == 0
    assert predict.main([*tag[2:], *CPU]) == 0
    predicted = checkout / "out" / "phrases" / "toy-phrases.conll"
    assert (checkout / "out" / "tagged.conll").read_text() == predicted.read_text()


def test_the_task_file_of_the_documentation_is_valid():
    text = (ROOT / "docs" / "tagging.md").read_text(encoding="utf-8")
    records = re.findall(r"```json\n(\{\n.*?)```", text, re.DOTALL)
    assert records
    for record in records:
        assert validate_record(json.loads(record), "")["words"] == "FORM"


def test_the_toy_sentences_are_generated(tmp_path):
    write_tagging(tmp_path, seed=0)
    for path in TAGGING.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
