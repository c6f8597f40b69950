"""Commands with several sets of bias terms: each run equals that of a command with one set."""

import json
import signal

import pandas as pd
import pytest
from conftest import GLUE, TINY_BERT
from interruption import differences, output_contents
from moments import at_step, send

import run_glue
from glue_evaluator import GLUEvaluator
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SETS = {"all": ["all"], "query-intermediate": ["query", "intermediate"], "none": ["none"]}
RATES = ["-l", "1e-3", "3e-3"]
FILES = ["--save-evaluator", "--export-model", "--predict-test"]


def flags(output, model, *sets, more=()):
    words = ["-o", str(output), "-t", "rte", "-m", str(model), "--data-dir", str(GLUE), "-e", "2",
             "--train-size", "24", "-d", "cpu", "-f", "bitfit", *more]  # fmt: skip
    return words + [word for terms in sets for word in ("--bias-terms", *terms)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, no_dropout):
    folder = tmp_path_factory.mktemp("mixed") / "out"
    assert run_glue.main(flags(folder, no_dropout, *SETS.values(), more=[*RATES, *FILES])) == 0
    return folder


def contents(folder):
    """Return the contents of a run's files, without the number of runs in the pass."""
    content = output_contents(folder)
    content["metrics.json"].pop("runs_in_one_pass")
    return content


@pytest.mark.parametrize("name", SETS)
def test_each_run_leaves_the_files_of_a_command_with_one_set(mixed, no_dropout, tmp_path, name):
    """Bit by bit: evaluator, model, card, figures, scores, logits, predictions and args.json."""
    more = [*RATES, *FILES]
    assert run_glue.main(flags(tmp_path / "out", no_dropout, SETS[name], more=more)) == 0
    for run in ("lr0.001_seed0", "lr0.003_seed0"):
        alone, found = contents(tmp_path / "out" / run), contents(mixed / f"{run}_{name}")
        assert {"model/README.md", "evaluator/delta.safetensors", "RTE.tsv"} <= alone.keys()
        assert differences(alone, found) == []
    loaded = GLUEvaluator.load(mixed / f"{run}_{name}" / "evaluator", None)
    assert loaded.evaluations == alone["metrics.json"]["evaluations"]
    assert loaded.prepared.method.fine_tune_type == ("frozen" if name == "none" else "bitfit")


def test_a_single_run_differs_by_rounding(mixed, no_dropout, tmp_path):
    """A stack sums the gradients of a bias in another order than a single run."""
    more = ["-l", "1e-3"]
    assert run_glue.main(flags(tmp_path / "alone", no_dropout, SETS["all"], more=more)) == 0
    alone = json.loads((tmp_path / "alone/metrics.json").read_text())["train_loss"]
    found = json.loads((mixed / "lr0.001_seed0_all/metrics.json").read_text())["train_loss"]
    assert found == pytest.approx(alone, rel=1e-5)


def test_sets_one_after_the_other_equal_separate_commands(
    no_dropout, tmp_path, monkeypatch, capsys
):
    """Of a model whose runs cannot share a pass: a set does not change the method of the next."""
    monkeypatch.setattr("bitfit.model.forward_trials.reason_not_stackable", lambda *_: "a reason")
    sets = {"none": ["none"], "query": ["query"], "all": ["all"]}
    assert run_glue.main(flags(tmp_path / "out", no_dropout, *sets.values(), more=FILES)) == 0
    assert "RTE, tiny, bitfit: validation" in capsys.readouterr().out
    for name, terms in sets.items():
        alone = tmp_path / name / "out"  # A model card has the last part of the path.
        assert run_glue.main(flags(alone, no_dropout, terms, more=FILES)) == 0
        found = contents(tmp_path / f"out/lr0.001_seed0_{name}")
        assert differences(contents(alone), found) == []


def test_the_report_has_a_line_for_each_set_and_rate(mixed, no_dropout, capsys):
    table = pd.read_csv(mixed / "results.csv", keep_default_na=False)
    assert table["bias_terms"].unique().tolist() == ["all", "query intermediate", "none"]
    words = flags(mixed, no_dropout, *SETS.values(), more=[*RATES, *FILES, "--resume"])
    assert run_glue.main(words) == 0
    assert "is finished" in capsys.readouterr().out
    args = json.loads((mixed / "args.json").read_text())
    assert args["bias_terms"] == [*SETS.values()]
    assert run_glue.main(flags(mixed, no_dropout, *SETS.values(), more=["--resume"])) == 2


def test_a_resumed_command_equals_an_uninterrupted_one(mixed, no_dropout, tmp_path):
    words = flags(tmp_path / "out", no_dropout, *SETS.values(), more=[*RATES, *FILES])
    with at_step(4, send(signal.SIGTERM)):
        assert run_glue.main(words) == 128 + signal.SIGTERM
    assert run_glue.main([*words, "--resume"]) == 0
    assert differences(output_contents(mixed), output_contents(tmp_path / "out")) == []


def test_keep_best_exports_the_best_run_of_all_sets(no_dropout, tmp_path, capsys):
    more = [*FILES, "--keep", "best"]
    sets = [["query"], ["none"]]
    assert run_glue.main(flags(tmp_path / "out", no_dropout, *sets, more=more)) == 0
    best = json.loads((tmp_path / "out/results.json").read_text())["best"]["run"]
    (model,) = (tmp_path / "out").glob("*/model")
    assert model.parent.name == best
    card = (model / "README.md").read_text()
    assert "and of 2 runs" in card and "--bias-terms query --bias-terms none" in card
    assert "bias terms learning rate" in capsys.readouterr().out


def test_none_alone_is_frozen(no_dropout, tmp_path):
    assert run_glue.main(flags(tmp_path / "none", no_dropout, ["none"])) == 0
    words = flags(tmp_path / "frozen", no_dropout)
    words[words.index("bitfit")] = "frozen"
    assert run_glue.main(words) == 0
    found = (output_contents(tmp_path / name) for name in ("none", "frozen"))
    assert differences(*found) == []


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([["query"], ["key"], ["query"]], "--bias-terms query: trains the same as --bias-terms"),
        ([["query", "key"], ["key", "query"]], "--bias-terms key query: trains the same as"),
        ([["all"], ["all", "query"]], "--bias-terms all query: trains the same as"),
        (
            [["query"], ["query", "key"]],
            "--bias-terms query key: trains the same as --bias-terms "
            "query, apart from biases without a gradient: give one of them",
        ),
        ([["none"], ["none"]], "--bias-terms none: trains the same as --bias-terms none: give one"),
        ([["all"], ["gate"]], "--bias-terms gate: this bert model has no such bias"),
        ([["all"], ["none", "query"]], "--bias-terms none trains the classifier alone"),
    ],
)
def test_invalid_sets_are_one_line(tmp_path, capsys, sets, message):
    assert run_glue.main(flags(tmp_path / "out", TINY_BERT, *sets)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_sets_from_python():
    evaluator = GLUEvaluator("rte", str(TINY_BERT), None, seed=[0, 1], data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 32, 8, train_size=8)
    sets = [["attention.self.query.bias", "intermediate"], ["none"]]
    evaluator.prepare("bitfit", 1e-3, components=sets, verbose=False)
    names = [run.name for run in evaluator.runs]
    assert names == [f"lr0.001_seed{seed}_{terms}" for terms in ("query-intermediate", "none")
                     for seed in (0, 1)]  # fmt: skip
    with pytest.raises(UserError, match="a set of bias terms is given twice"):
        evaluator.prepare("bitfit", 1e-3, components=[["query"], ["query"]], verbose=False)
    with pytest.raises(UserError, match="only bitfit has sets of bias terms, not frozen"):
        evaluator.prepare("frozen", 1e-3, components=sets, verbose=False)
