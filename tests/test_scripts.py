"""The commands of scripts/ that README.md and docs/ show."""

import glob
import json
import os
import re
import shlex
import subprocess

import compare
import deltas
import pandas as pd
import paper
import predict
import pytest
from conftest import ROOT, TINY_BERT
from documentation import TEXT, active_environment, plain
from quick_python import run_script

import run_glue
from bitfit.options import TERMS
from bitfit.results.plots import METHOD_STYLES
from bitfit.results.scores import scores_frame
from utils import UserError


def test_the_demo(checkout, quick_python, monkeypatch):
    monkeypatch.setenv("REAL_PICTURES", "1")
    result = subprocess.run(
        ["bash", "scripts/demo.sh", "--epochs", "1", "--train-size", "16"],
        cwd=checkout, env=active_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [line for line in result.stdout.splitlines() if line.startswith("$ python ")]
    assert len(printed) == 5
    assert "--epochs 1 --train-size 16" in printed[0]
    table = result.stdout.split(printed[-1])[1].split()
    assert table.count("CoLA") == 4
    assert (checkout / "out/demo/methods.png").stat().st_size > 10_000
    assert not (checkout / ".venv").exists()  # the active environment was used


@pytest.mark.parametrize("failing", [None, "ruff", "mypy", "pytest"])
def test_the_test_command_runs_all_tools_until_one_fails(failing, tmp_path):
    """With a stand-in for Python, which writes its arguments to a file."""
    (tmp_path / "python").write_text(f"""#!/bin/bash
        [ "$1" = - ] && exit 0  # all requirements are installed
        echo "$*" >>{tmp_path}/log
        [ "$2" != "{failing}" ]""")
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": str(tmp_path)}
    command = ["bash", "scripts/test.sh", "tests/test_tasks.py", "-x"]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == int(bool(failing))
    lines = (tmp_path / "log").read_text().splitlines()
    tools = [line.split()[1] for line in lines]
    assert tools == {None: ["ruff", "ruff", "mypy", "pytest"], "ruff": ["ruff"],
                     "mypy": ["ruff", "ruff", "mypy"]}.get(failing, tools)  # fmt: skip
    assert failing in ("ruff", "mypy") or lines[-1] == "-m pytest tests/test_tasks.py -x"


def test_the_sweep_script(checkout, small, quick_python):
    (command,) = plain("bash scripts/sweep_learning_rates.sh")
    flags = [*small, "--model-name", str(TINY_BERT), "--learning-rate", "1e-3", "--seed", "0", "1"]
    result = subprocess.run(
        [*command.split(), *flags], cwd=checkout, env=active_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("$ python run_glue.py --task-name rte --output-path out/sweep-rte ")
    assert "--learning-rate 1e-4 4e-4 7e-4 1e-3 --seed 0 1 2 3 4 --batch-size 16" in first
    rows = (checkout / "out/sweep-rte/results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2
    nothing = subprocess.run(
        ["bash", "scripts/sweep_learning_rates.sh"], cwd=checkout, capture_output=True, text=True
    )
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("The paper's grid on one task: bash scripts/sweep")


def test_compare(quick_python, small, tmp_path, monkeypatch):
    monkeypatch.setenv("REAL_PICTURES", "1")
    (command,) = plain("python scripts/compare.py ")
    monkeypatch.chdir(ROOT)
    for name, kind in (("rte-bitfit", "bitfit"), ("rte-full", "full_ft")):
        argv = ["-o", str(tmp_path / "out" / name), "-t", "rte", "-f", kind, "-m", str(TINY_BERT)]
        assert run_glue.main([*argv, *small]) == 0
    words = command.split()[2:]
    result = run_script("scripts/compare.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("RTE ") == 2
    assert (tmp_path / "out/methods.png").stat().st_size > 10_000


def test_predict(small, tmp_path, monkeypatch, capsys):
    commands = plain("python scripts/predict.py ")
    (command,) = [line for line in commands if "texts.tsv" in line]  # the other tags words
    for task in ("cola", "rte", "stsb"):
        argv = ["-o", str(tmp_path / "out" / task), "-t", task, "-f", "bitfit", "--save-evaluator"]
        assert run_glue.main([*argv, "-m", str(TINY_BERT), *small]) == 0
    (tmp_path / "texts.tsv").write_text("the glad wug grows\tthe happy wug swells\n")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert predict.main(shlex.split(command)[2:]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1])
    assert {name: list(answer) for name, answer in json.loads(line).items()} == {
        name: list(answer) for name, answer in shown.items()
    }


@pytest.mark.long
def test_the_papers_commands(quick_python, few_glue, tmp_path, monkeypatch, capsys):
    """One after the other, on one small cell each."""
    small = ["--models", str(TINY_BERT), "--data-dir", str(few_glue), "--epochs", "1", "--tasks",
             "rte", "--train-size", "16", "--learning-rates", "1e-3", "--seeds", "0", "1",
             "--rows", "bitfit", "--sizes", "16"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    seen = []
    steps = ("plan", "run", "report", "submit")  # in this order, whichever page has them
    for command in [line for step in steps for line in plain(f"python scripts/paper.py {step} ")]:
        words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)))[2:]
        words = ["2" if word == "8" else word for word in words]  # ranks
        more = {"plan": small, "run": ["--gpus", "cpu"]}.get(words[0], [])
        status = paper.main([*words, *more])
        # The cell has a single epoch and learning rate, and other tasks are missing.
        is_refused = words[0] == "submit" or "--halving" in words
        assert status == (2 if is_refused else 0), command
        seen.append(words[0])
    assert set(seen) == set(steps)
    error = capsys.readouterr().err
    assert "no predictions for CoLA.tsv" in error
    assert "--halving 2 4: no finished cell" in error
    assert (tmp_path / "out/small/report.html").exists()


@pytest.mark.pictures
def test_the_deltas_commands(small, tmp_path, monkeypatch):
    """One after the other, on the evaluators of a small sweep."""
    monkeypatch.chdir(tmp_path)
    argv = ["-o", "out/sst2", "-t", "sst2", "-f", "bitfit", "-m", str(TINY_BERT)]
    argv += ["-l", "1e-3", "--seed", "0", "1", "--save-evaluator"]
    assert run_glue.main([*argv, *small]) == 0
    for command in plain("python scripts/deltas.py "):
        globs = (sorted(glob.glob(word)) or [word] for word in shlex.split(command)[2:])
        assert deltas.main([word for words in globs for word in words]) == 0, command
    assert (tmp_path / "out/deltas.png").stat().st_size > 10_000
    assert (tmp_path / "out/soup-model/config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere has no scores: give the folder of a scored run or sweep"),
        (["sweep"], "sweep has no scores: give the folder of a scored run or sweep"),
        (["empty"], "empty cannot be read: 'main_metric'"),
        (["nowhere", "--plot", "x.pdf"], "nowhere has no scores"),
    ],
)
def test_compare_says_what_is_wrong(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name, file in (("sweep", "results.csv"), ("empty", "metrics.csv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("epoch,split,metric,value\n")
    (tmp_path / "empty/metrics.json").write_text("{}")
    assert compare.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"compare.py: error: {message}")
    assert captured.err.count("\n") == 1


def test_compare_reads_the_runs_of_a_sweep_that_was_interrupted(tmp_path):
    """It has no results.csv yet."""
    for name in ("lr0.001_seed0", "lr0.001_seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text("{}")
    (tmp_path / "lr0.001_seed2").mkdir()
    names = [folder.name for folder in compare.run_folders(str(tmp_path))]
    assert names == ["lr0.001_seed0", "lr0.001_seed1"]


def test_compare_shows_runs_without_scores(tmp_path):
    metrics = {
        "task": "cola", "model": "m", "fine_tune_type": "bitfit", "bias_terms": ["all"], "seed": 0,
        "learning_rate": 9.0, "trained_parameters": 1, "all_parameters": 2, "seconds": {},
        "random_encoder": False, "main_metric": "MCC", "diverged": "at epoch 1, step 2",
    }  # fmt: skip
    run = compare.make_run(metrics, scores_frame([]), finished=True)
    shown = [run.row[name] for name in ("method", "validation", "best")]
    assert shown == ["bitfit (diverged)", "-", "-"]
    with pytest.raises(UserError, match="--plot needs a run with scores"):
        compare.plot_runs([run], tmp_path / "x.png")


def test_methods_have_their_style_beside_others():
    """Methods of the paper keep their style; the others have other colors, and all differ."""
    styles = compare.line_styles(["full_ft", "bitfit", "", "", "frozen"])
    expected = [METHOD_STYLES[name] for name in ("full_ft", "bitfit", "frozen")]
    assert [styles[0], styles[1], styles[4]] == expected
    assert not {styles[2].color, styles[3].color} & {style.color for style in expected}
    assert len(set(styles)) == 5
    assert len(set(compare.line_styles(["bitfit"] * 24))) == 24  # a sweep


@pytest.mark.pictures
def test_a_picture_of_many_runs_is_not_cut_off(tmp_path, monkeypatch):
    """Long names and 24 curves of two seeds: nothing is cut off (a warning would be an error)."""
    metadata = {
        "task": "rte", "model": "bert", "main_metric": "Accuracy", "fine_tune_type": "bitfit",
        "bias_terms": [*TERMS], "random_encoder": False, "learning_rate": 1e-3, "seconds": {},
        "trained_parameters": 1, "all_parameters": 2,
    }  # fmt: skip
    rows = [(e, s, "Accuracy", e / 9) for e in (1, 2) for s in ("train", "validation")]
    scores = pd.DataFrame(rows, columns=["epoch", "split", "metric", "value"])
    figures = []
    monkeypatch.setattr(compare.plots, "save_figure", lambda figure, path: figures.append(figure))
    varied = [metadata | {"seed": k % 2, "learning_rate": k // 2} for k in range(48)]
    runs = [compare.make_run(metrics, scores, finished=True) for metrics in varied]
    compare.plot_runs(runs, tmp_path / "x.png")
    figures[0].canvas.draw()
    drawn, canvas = figures[0].get_tightbbox(), figures[0].get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= canvas[0]
    assert drawn.y1 <= canvas[1]
