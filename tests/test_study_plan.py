"""`paper.py plan`: the cells of tables and figures, their hashes, and refused input."""

import os
import shutil

import paper
import pytest
from conftest import GLUE, ROOT, TINY_BERT
from processes import exit_status
from toy_study import plan

from bitfit.study import cells, protocol

TABLE = ["--tables", "3", "--tasks", "rte", "--data-dir", str(GLUE)]


def names(output):
    return [cell.name for cell in cells.read_study(output).cells]


def test_tables_and_figures_are_the_papers(tmp_path):
    keys = protocol.requested_cells([2, 3], [1, 2], None, None, protocol.ROWS, protocol.SIZES)
    assert len(keys) == len(set(keys)) == 3 * 8 * 2 + 8 * 7 + 6 * 2
    rows = {key[1] for key in protocol.requested_cells([3], [], None, None, protocol.ROWS, ())}
    assert rows == set(protocol.ROWS)
    args = paper.parse_args(["plan", "-o", str(tmp_path), "--tables", "2"])
    study = cells.plan_study(tmp_path, args)
    by_name = {cell.name: cell for cell in study.cells}
    assert by_name["bert-base-cased/bitfit/rte"].rates == [1e-4, 4e-4, 7e-4, 1e-3]
    assert by_name["bert-large-cased/full_ft/mnli"].rates == [1e-5, 2e-5, 3e-5, 5e-5]
    assert by_name["roberta-base/bitfit/cola"].rates == [1e-4]  # no search
    assert all(cell.seeds == [0, 1, 2, 3, 4] for cell in study.cells)
    assert all(cell.args["batch_size"] == 16 for cell in study.cells)
    assert {cell.args["epochs"] for cell in study.cells if cell.task == "rte"} == {20}


def test_a_plan_can_be_overridden_by_row_and_task(tmp_path):
    more = ["--tables", "3", "--tasks", "rte", "cola", "--epochs", "3", "rte=7", "--seeds", "4",
            "frozen=1,2", "--learning-rates", "2e-3", "b_q=1e-3,5e-3"]  # fmt: skip
    study = cells.plan_study(tmp_path, paper.parse_args(["plan", "-o", str(tmp_path), *more]))
    by_name = {cell.name.removeprefix("bert-base-cased/"): cell for cell in study.cells}
    assert by_name["b_q/rte"].rates == [1e-3, 5e-3]
    assert by_name["full_ft/rte"].rates == [2e-3]
    assert by_name["frozen/cola"].seeds == [1, 2]
    assert by_name["bitfit/cola"].seeds == [4]
    assert by_name["bitfit/cola"].args["epochs"] == 3
    assert by_name["bitfit/rte"].args["epochs"] == 7


def test_a_study_can_be_run_from_anywhere(tmp_path, monkeypatch, capsys):
    """Folders are kept by their whole path: the cells' names and hashes do not change."""
    monkeypatch.chdir(ROOT)
    relative = ["--models", "examples/tiny_bert", "--data-dir", "examples/glue", "--rows", "bitfit"]
    assert plan(tmp_path / "study", *relative) == 0
    before = cells.read_study(tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    assert cells.read_study("study").cells == before.cells
    assert before.cells[0].args["data_dir"] == str(GLUE)
    assert before.cells[0].name == "tiny_bert/bitfit/rte"


def test_what_a_plan_prints(tmp_path, capsys):
    assert plan(tmp_path / "study", "--calibrate") == 0
    shown = capsys.readouterr().out
    for row in protocol.ROWS:
        assert f"tiny_bert/{row}/rte" in shown
    assert shown.count("missing") == 9
    assert "hours are unknown" not in shown
    assert shown.count("$ python run_glue.py ") == 9


def test_more_can_be_planned_but_not_otherwise(study, capsys):
    output = study.output
    assert plan(output, "--rows", "frozen") == 0
    assert [name.split("/")[1] for name in names(output)] == ["bitfit", "rand_row_col", "frozen"]
    capsys.readouterr()
    assert plan(output, "--rows", "bitfit", "--batch-size", "8") == 2
    error = capsys.readouterr().err
    assert "bitfit/rte: --batch-size was 16 and is now 8: give another --output-path" in error
    assert error.count("\n") == 1
    assert len(names(output)) == 3


def test_the_hash_of_a_command_stays():
    """Studies that were planned before stay readable: a new flag that is left out is no change."""
    words = [
        "--task-name",
        "rte",
        "--model-name",
        "m",
        "--fine-tune-type",
        "bitfit",
        "--seed",
        "0",
        "--epochs",
        "2",
    ]
    assert cells.flags_hash(words) == "54b04273b73fd2f2"


def test_the_hash_is_of_what_results_depend_on(study):
    cell = study.cells[0]
    for harmless in (["--gpu-device", "cpu"], ["--checkpoint-every", "3"], ["--max-tokens", "64"]):
        assert cells.flags_hash([*cell.flags, *harmless]) == cell.hash
    for other in (["--epochs", "3"], ["--seed", "1", "0"], ["--data-dir", "elsewhere"]):
        assert cells.flags_hash([*cell.flags, *other]) != cell.hash


def test_data_without_a_test_split(tmp_path, capsys):
    data = tmp_path / "glue"
    shutil.copytree(GLUE / "RTE", data / "RTE")
    (data / "RTE/test.tsv").unlink()
    more = ["--data-dir", str(data), "--rows", "bitfit"]
    assert plan(tmp_path / "study", *more) == 2
    assert "test" in capsys.readouterr().err
    assert plan(tmp_path / "study", *more, "--no-predict-test", "--calibrate") == 0
    assert "hours are unknown" not in capsys.readouterr().out


def test_an_empty_config_is_one_line(tmp_path, capsys):
    shutil.copytree(TINY_BERT, tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    assert plan(tmp_path / "study", "--models", str(tmp_path / "model")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_study_cannot_be_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert plan(tmp_path / "file") == 2
    assert "give another place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "-o", "x"], "--tables 2 3"),
        (["plan", "-o", "x", "--tables", "4"], "invalid choice: 4"),
        (["plan", "-o", "x", "--tables", "3", "--epochs", "rt=3"], "'rt' is not one of cola"),
        (["plan", "-o", "x", "--tables", "3", "--seeds", "one"], "'one'"),
        (["plan", "-o", "x", "--tables", "3", "--learning-rates", "bitfit=0"], "'0'"),
        (["plan", "-o", "x", "--tables", "3", "--epochs", "2", "rte=3,4"], "--epochs: give one"),
        (["plan", "-o", "x", "--tables", "2", "--rows", "frozen"], "none of these --rows"),
        (
            ["plan", "-o", "x", *TABLE, "--models", "./nomodel"],
            "there is no model folder ./nomodel",
        ),
        (
            [
                "plan",
                "-o",
                "x",
                *TABLE,
                "--models",
                str(TINY_BERT),
                "--calibrate",
                "--gpu-device",
                "9",
            ],
            "there is no GPU 9",
        ),
        (
            [
                "plan",
                "-o",
                "x",
                *TABLE,
                "--models",
                str(TINY_BERT),
                "--figures",
                "2",
                "--sizes",
                "16",
                "100000",
            ],
            "rte has 800 training examples",
        ),
        (["run", "-o", "x"], "x holds no study"),
        (["run", "-o", "x", "--gpus", "zero"], "'zero'"),
        (["run", "-o", "x", "--gpus", "0", "1", "--nproc-per-node", "2"], "needs a single worker"),
        (["report", "-o", "x", "--resamples", "1"], "'1' is not a whole number at least 2"),
        (["run"], "--output-path"),
        ([], "COMMAND"),
    ],
)
def test_wrong_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = exit_status(paper.main, words)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_all_that_is_missing_is_named_at_once(tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    data = tmp_path / "glue"
    shutil.copytree(GLUE / "RTE", data / "RTE")
    more = [
        "--models",
        str(bare),
        "nomodel/",
        "--data-dir",
        str(data),
        "--tasks",
        "rte",
        "cola",
        "sst2",
    ]
    assert plan(tmp_path / "study", *more) == 2
    error = capsys.readouterr().err
    for message in ("Unrecognized model in", "no model folder nomodel/", "CoLA", "SST-2"):
        assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_an_edited_study_is_refused(study, capsys):
    path = study.output / cells.STUDY
    text = path.read_text()
    for damaged in (text.replace('"16"', '"17"'), text[:-40], "[]", '{"cells": [1]}'):
        assert damaged != text
        path.write_text(damaged)
        assert paper.main(["run", "-o", str(study.output)]) == 2
        error = capsys.readouterr().err
        assert "is not a study" in error
        assert error.count("\n") == 1


def test_values_of_what_is_not_planned_are_named(tmp_path, caplog):
    """They may be a mistake, or belong to another command with the same flags."""
    values = ["--seeds", "0", "frozen=1", "--epochs", "1", "cola=2", "mrpc=3"]
    assert plan(tmp_path / "study", "--rows", "bitfit", *values) == 0
    assert [message for message in caplog.messages if "no effect" in message] == [
        "--learning-rates has no effect on full_ft: not planned",
        "--seeds has no effect on frozen: not planned",
        "--epochs has no effect on cola, mrpc: not planned",
    ]
