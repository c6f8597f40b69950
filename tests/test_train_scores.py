"""--train-score-rows: training scores on a sample of each run's examples, or none at all."""

import json

import compare
import numpy as np
import paper
import pytest
from conftest import TINY_BERT
from small_command import flags

import run_glue
from bitfit.data.tasks import score
from bitfit.results.scores import read_metrics
from bitfit.study import cells
from glue_evaluator import GLUEvaluator
from utils import UserError


@pytest.fixture
def make_evaluator(few_glue):
    """Return a function of the rows to score: two seeds, which draw 40 training examples each."""

    def make(rows):
        made = GLUEvaluator("cola", TINY_BERT, None, seed=[3, 5], data_dir=few_glue)
        made.preprocess_dataset("longest", 64, 8, train_size=40, train_score_rows=rows)
        return made

    return make


def test_the_sample_belongs_to_the_seed(make_evaluator):
    few, again, many, none = (make_evaluator(n).loaded.dataset for n in (10, 10, 1000, 0))
    for seed in (3, 5):
        drawn = few.split("train").rows_of_seed[seed]
        sample, same, whole = (d.scored()["train"].rows_of_seed[seed] for d in (few, again, many))
        assert len(set(sample)) == 10
        assert set(sample) < set(drawn)
        assert np.array_equal(sample, same)
        assert sorted(whole) == sorted(drawn)
    assert list(none.scored()) == ["validation"]


def test_a_negative_number_is_refused(make_evaluator):
    with pytest.raises(UserError, match="train_score_rows: '-1' is not a whole number at least 0"):
        make_evaluator(-1)


def test_the_score_is_that_of_the_sample(make_evaluator, caplog):
    caplog.set_level("INFO", "bitfit")
    evaluator = make_evaluator(10)
    evaluator.prepare("bitfit", 3e-3, components=["bias"], verbose=False)
    evaluator.train_and_evaluate(2)
    assert "; 40 training examples (10 of them scored), " in caplog.text
    tokens = evaluator.tokens("train")
    for number, seed in enumerate((3, 5)):
        evaluator.select(number)
        rows = evaluator.loaded.dataset.scored()["train"].rows_of_seed[seed]
        logits = evaluator.predict("train")[rows]
        (last,) = score(evaluator.task, logits, tokens.labels_of(rows)).values()
        assert evaluator.evaluations["train"]["MCC"][-1] == pytest.approx(last)
        assert len(evaluator.evaluations["train"]["MCC"]) == 2


@pytest.mark.pictures
@pytest.mark.parametrize("seeds", [["3"], ["3", "5"]])
def test_a_command_without_training_scores(tmp_path, monkeypatch, capsys, seeds):
    """All files but the training scores are those of a command with them."""
    for name, more in (("all", []), ("none", ["--train-score-rows", "0"])):
        assert run_glue.main(flags(tmp_path / name, "-s", *seeds, *more)) == 0
    printed = capsys.readouterr().out
    runs = [f"lr0.001_seed{seed}" for seed in seeds] if len(seeds) > 1 else ["."]
    for run in runs:
        (_, scores), (metrics, fewer) = (
            read_metrics(tmp_path / name / run) for name in ("all", "none")
        )
        assert fewer.to_csv(index=False) == scores[scores["split"] != "train"].to_csv(index=False)
        assert list(metrics["last"]) == ["epoch", "validation"]
        with_train, without = (
            {path.name for path in (tmp_path / name / run).iterdir()} for name in ("all", "none")
        )
        assert with_train == without
    ours = [json.loads((tmp_path / n / "args.json").read_text()) for n in ("all", "none")]
    assert [args.pop("train_score_rows") for args in ours] == [None, 0]
    assert ours[0]["data_sha256"] == ours[1]["data_sha256"]
    monkeypatch.setattr("sys.argv", ["compare.py", *(str(tmp_path / "none" / r) for r in runs)])
    compare.main()
    assert capsys.readouterr().out.splitlines()[-1].split()[-6] == "-"
    assert "train" not in printed.rpartition("RTE, ")[2]


def test_a_command_that_resumes_gives_the_same_number(tmp_path, capsys):
    assert run_glue.main(flags(tmp_path / "out", "--train-score-rows", "5")) == 0
    assert run_glue.main([*flags(tmp_path / "out"), "--resume"]) == 2
    message = "--train-score-rows was 5 and is now left out: give that again"
    assert message in capsys.readouterr().err
    args = json.loads((tmp_path / "out/args.json").read_text())
    del args["train_score_rows"]  # as earlier versions wrote it
    (tmp_path / "out/args.json").write_text(json.dumps(args))
    assert run_glue.main([*flags(tmp_path / "out"), "--resume"]) == 0


def test_evaluate_only(tmp_path):
    assert run_glue.main(flags(tmp_path / "run", "--save-evaluator")) == 0
    words = ["-o", str(tmp_path / "scored"), *flags("")[2:4], "-m", str(TINY_BERT)]
    words += [*flags("")[8:10], "--evaluate-only", "--start-from", str(tmp_path / "run")]
    assert run_glue.main([*words, "--train-score-rows", "0"]) == 0
    _, scores = read_metrics(tmp_path / "scored")
    assert list(scores["split"]) == ["validation"]


@pytest.mark.pictures
@pytest.mark.parametrize("rows", [0, 8])
def test_a_study_shows_gaps_of_samples_or_none(tmp_path, few_glue, rows, capsys):
    words = ["--tables", "3", "--rows", "frozen", "--models", str(TINY_BERT), "--tasks", "rte",
             "--data-dir", str(few_glue), "--train-size", "16", "--train-score-rows", str(rows),
             "--learning-rates", "1e-3", "--seeds", "0", "1", "--epochs", "1"]  # fmt: skip
    at = ["--output-path", str(tmp_path / "study")]
    assert paper.main(["plan", *at, *words]) == 0
    (cell,) = cells.read_study(tmp_path / "study").cells
    assert run_glue.main(cell.command(tmp_path / "study")[2:]) == 0
    assert paper.main(["report", *at]) == 0
    page = (tmp_path / "study/report.html").read_text()
    assert ("Generalization gap" in page) == bool(rows)
    assert ("With --train-score-rows, train scores are of 8 training examples." in page) == (
        rows == 8
    )
    assert len(list((tmp_path / "study/figures").glob("gap_*.png"))) == bool(rows)
