"""Cells of tasks that task files describe: tagging, whose statistics are over words."""

import json
import shutil

import numpy as np
import paper
import pytest
import transformers
from conftest import ROOT, TINY_BERT

from bitfit.study import cells, cost, results
from bitfit.study.cell_tasks import task_of

TAGGING = ROOT / "examples" / "tagging"
SMALL = ["--rows", "bitfit", "frozen", "--models", str(TINY_BERT), "--train-size", "16", "--seeds",
         "0", "1", "--learning-rates", "5e-3", "--epochs", "1"]  # fmt: skip


def plan(output, file, *more):
    return paper.main(
        ["plan", "-o", str(output), "--tables", "3", "--tasks", str(file), *SMALL, *more]
    )


def test_a_study_of_a_tagging_task(tmp_path, capsys):
    """From the plan to the report: the scores are those of the runs."""
    assert plan(tmp_path, TAGGING / "toy-pos.json") == 0
    study = cells.read_study(tmp_path)
    assert [cell.name for cell in study.cells] == [
        f"tiny_bert/{row}/toy-pos" for row in ("bitfit", "frozen")
    ]
    examples = cost.cell_sizes(study.cells[0]).rows["validation"]
    assert paper.main(["run", "-o", str(tmp_path), "--gpus", "cpu"]) == 0
    entries = results.read_entries(study)
    assert len(entries) == 2
    for entry in entries.values():
        assert entry.results.state == "done"
        assert len(entry.results.labels["validation"]) > 5 * examples  # words
        scores = entry.results.scores
        known = scores[(scores["split"] == "validation") & (scores["metric"] == "Accuracy")]
        assert np.allclose(entry.selected["last"].values, known.sort_values("seed")["value"])
    assert paper.main(["report", "-o", str(tmp_path), "--resamples", "50"]) == 0
    assert "toy-pos (Accuracy)" in capsys.readouterr().out
    differences = (tmp_path / "differences.csv").read_text()
    assert ",bitfit,frozen,toy-pos," in differences


def test_a_model_that_cannot_tag_is_refused_by_the_plan(tmp_path, capsys):
    shutil.copytree(TINY_BERT, tmp_path / "bart", ignore=shutil.ignore_patterns("config.json"))
    config = transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0)
    config.save_pretrained(tmp_path / "bart")
    more = ["--models", str(tmp_path / "bart")]
    assert plan(tmp_path / "study", TAGGING / "toy-pos.json", *more) == 2
    assert "no token classifier of the architecture bart" in capsys.readouterr().err


def test_another_task_file_of_that_name_is_another_cell(tmp_path, capsys):
    shutil.copytree(TAGGING, tmp_path / "data")
    file, output = tmp_path / "data" / "toy-pos.json", tmp_path / "study"
    assert plan(output, file) == 0
    record = json.loads(file.read_text()) | {"metrics": ["Accuracy"]}
    other = tmp_path / "data" / "other.json"
    other.write_text(json.dumps(record))
    assert task_of(cells.read_study(output).cells[0].args).metrics == ("Accuracy", "Macro-F1")
    assert plan(output, other) == 2
    assert "the task of --task-file has another metrics: give another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TAGGING / "toy-phrases.json", "a study cannot compare methods by Entity-F1"),
        (TAGGING / "nothing.json", "nothing.json"),
        ("colas", "invalid choice: 'colas'"),
    ],
)
def test_tasks_that_a_study_cannot_have(tmp_path, capsys, task, message):
    try:
        status = plan(tmp_path / "study", task)
    except SystemExit as exit_:
        status = exit_.code
    shown = capsys.readouterr().err
    assert status == 2 and message in shown and shown.count("\n") == 1
    assert not (tmp_path / "study").exists()
