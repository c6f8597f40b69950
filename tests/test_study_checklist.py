"""`report --checklist` fills in the reproducibility checklist from the files of a study."""

import json

import pandas as pd
import paper
import pytest
from toy_study import plan

import run_glue
from bitfit.results.scores import read_metrics
from bitfit.study.cells import read_study


@pytest.fixture
def half(study):
    """A study with a finished cell, of bitfit, and one that has not started."""
    assert run_glue.main(study.cells[0].command(study.output)[2:]) == 0
    return study


def report(study, *words):
    return paper.main(["report", "--output-path", str(study.output), "--resamples", "9", *words])


def table_below(text, title):
    """Return the rows of the first table below a heading, as {column: text}."""
    lines = text.split(f"## {title}")[1].split("\n\n## ")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=False)) for row in rows[2:]]


def test_the_checklist_has_the_values_of_the_files_and_asks_for_others(half, capsys):
    assert report(half, "--checklist") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(half.output / "checklist.md")
    text = (half.output / "checklist.md").read_text(encoding="utf-8")
    done, waiting = table_below(text, "Parameters, search bounds, seeds and hours")
    folder = next(iter(half.cells[0].folders(half.output).values()))
    content = read_metrics(folder)[0]
    assert done["cell"] == half.cells[0].name
    assert done["trained parameters"] == f"{content['trained_parameters']:,}"
    assert done["all parameters"] == f"{content['all_parameters']:,}"
    assert (done["learning rates"], done["seeds"], done["runs"]) == ("0.001", "0 1", "2")
    assert (done["training examples"], done["epochs"], done["devices"]) == ("24", "2", "1 × cpu")
    assert float(done["hours"]) >= 0
    unknown = ("trained parameters", "all parameters", "hours", "devices")
    assert [waiting[name] for name in unknown] == ["please fill in"] * 4
    assert "1 of 2 cells are done." in text
    args = json.loads((half.output / half.cells[0].name / "args.json").read_text())
    assert f"torch {args['torch']} transformers {args['transformers']}" in text
    labels = args["splits"]["train"]["labels"]
    assert ", ".join(f"{label} {count}" for label, count in labels.items()) in text
    assert "- rte: Accuracy" in text
    questions = [line for line in text.splitlines() if line.startswith("- [ ] ")]
    asked = {line.removeprefix("- [ ] please fill in: ").split(":")[0] for line in questions}
    assert asked == {"A1", "A2", "B1", "B2", "B3", "B4", "B5", "B6", "C1", "C2", "D", "E"}


def test_best_settings_are_those_of_the_report(half):
    assert report(half, "--checklist") == 0
    text = (half.output / "checklist.md").read_text(encoding="utf-8")
    (best,) = table_below(text, "Trials, best settings and results")
    scores = pd.read_csv(half.output / "tables.csv", dtype=str).set_index("selection")
    assert best["trials"] == "4"  # two runs, two epochs
    assert best["learning rate"] == scores.loc["split", "learning_rate"] == "0.001"
    assert best["epoch"] == scores.loc["split", "epoch"]
    assert set(best["epoch"].split()) <= {"1", "2"}
    assert scores.loc["last", "epoch"] == "2"
    frame = read_metrics(half.output / half.cells[0].name / "lr0.001_seed0")[1]
    validation = frame[(frame["split"] == "validation") & (frame["metric"] == "Accuracy")]
    assert scores.loc["best", "epoch"].split()[0] == str(
        validation.loc[validation["value"].idxmax(), "epoch"]
    )


def test_results_name_the_size_and_whether_a_cell_is_finished(half):
    """Cells of Figure 2 have results too. An interrupted cell's scores end with `...`."""
    sizes = ["--figures", "2", "--sizes", "16", "--learning-rates", "1e-3", "full_ft=1e-4"]
    assert plan(half.output, *sizes, "--seeds", "0", tables=()) == 0
    cells = [cell for cell in read_study(half.output).cells if cell.size]
    assert run_glue.main(cells[0].command(half.output)[2:]) == 0
    path = half.output / half.cells[0].name / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    assert report(half, "--checklist") == 0
    text = (half.output / "checklist.md").read_text(encoding="utf-8")
    rows = table_below(text, "Trials, best settings and results")
    unfinished = {row["column"]: row["split"].endswith(" ...") for row in rows}
    assert unfinished == {"RTE": True, "RTE (16 examples)": False}


def test_answers_are_not_overwritten(half, capsys):
    path = half.output / "checklist.md"
    path.write_text("answers")
    assert report(half, "--checklist") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--checklist: {path} exists: rename it to keep its answers")
    assert path.read_text() == "answers"
    assert not (half.output / "report.html").exists()
    assert report(half) == 0


def test_a_study_without_scores_has_no_checklist(study, capsys):
    assert report(study, "--checklist") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no scores yet" in line
    assert not (study.output / "checklist.md").exists()
