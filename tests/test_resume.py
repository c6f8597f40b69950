"""Resuming a command: it ends as if never stopped, and a folder of another command is refused."""

import json
import shutil
import signal

import pytest
import torch
import transformers
from conftest import GLUE, TINY_BERT, forbid_loading
from interruption import differences, output_contents
from moments import at_step, send
from resumable import assert_as_if_never_stopped, at_call, flags

import run_glue
import utils
from bitfit import files, output_paths
from bitfit import options as flags_of_program
from bitfit.training.checkpoints import list_checkpoints


def test_two_processes_on_one_folder(tmp_path, monkeypatch, capsys):
    """Also if the first was killed."""
    folder = tmp_path / "out"
    with at_step(2, send(signal.SIGTERM)):
        run_glue.main(flags(folder))
    before = output_contents(folder)
    with output_paths.lock_folder(folder):
        assert run_glue.main([*flags(folder), "--resume"]) == 2
        assert "is in use by another process" in capsys.readouterr().err.splitlines()[-1]
        (folder / ".lock").unlink()
        after = output_contents(folder)
    assert differences(before, after) == []
    (folder / ".lock").touch()  # what a killed process leaves
    assert run_glue.main([*flags(folder), "--resume"]) == 0
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-l", "1e-3", "2e-3"], "--learning-rate was 0.001 0.004 and is now 0.001 0.002"),
        (["-s", "0", "2"], "--seed was 0 and is now 0 2"),
        (["-e", "4"], "--epochs was 3 and is now 4"),
        (["-b", "8", "--optimizer", "adam"], "--batch-size was 16 and is now 8; --optimizer was"),
        (["-t", "sst2"], "--task-name was cola and is now sst2"),
        (["-f", "frozen"], "--fine-tune-type was bitfit and is now frozen"),
        (["--bias-terms", "query"], "--bias-terms was left out and is now query"),
        (
            ["--bias-terms", "query", "key", "--bias-terms", "none"],
            "--bias-terms was left out and is now query key --bias-terms none",
        ),
        (["--export-model"], "--export-model was False and is now True"),
        (["--precision", "bf16"], "--precision was fp32 and is now bf16"),
    ],
)
def test_resume_refuses_other_flags(interrupted, more, message, capsys):
    before = output_contents(interrupted)
    assert run_glue.main([*flags(interrupted), "--resume", *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--resume: this is not the interrupted run: " in last
    assert message in last
    assert differences(before, output_contents(interrupted)) == []


def test_resume_refuses_other_data_and_another_base(interrupted, tmp_path, capsys):
    shutil.copytree(GLUE / "CoLA", tmp_path / "glue" / "CoLA")
    dev = tmp_path / "glue" / "CoLA" / "dev.tsv"
    dev.write_text(dev.read_text().replace("\t1\t", "\t0\t", 1))
    other = ["--data-dir", str(tmp_path / "glue")]
    assert run_glue.main([*flags(interrupted), "--resume", *other]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("run: the data changed: give that again, or a new folder")
    )
    model = transformers.AutoModel.from_pretrained(TINY_BERT)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(tmp_path / "model")
    other = ["--model-name", str(tmp_path / "model")]
    assert run_glue.main([*flags(interrupted), "--resume", *other]) == 2
    assert "run: the base model changed" in capsys.readouterr().err.splitlines()[-1]


def test_resume_refuses_other_test_rows(interrupted, tmp_path, capsys):
    """Runs that have their predictions already would be of other rows than the rest."""
    shutil.copytree(GLUE / "CoLA", tmp_path / "glue" / "CoLA")
    path = tmp_path / "glue/CoLA/test.tsv"
    *rows, last = path.read_text().splitlines()
    path.write_text("\n".join([*rows, f"{last} indeed", ""]))
    other = ["--data-dir", str(tmp_path / "glue")]
    assert run_glue.main([*flags(interrupted), "--resume", *other]) == 2
    assert "run: the test data changed: give that" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "layer_norm_eps", 1e-3,
         "the base model's config changed (layer_norm_eps was 1e-12 and is now 0.001)"),
        ("tokenizer_config.json", "do_lower_case", False,
         "the base model's tokenizer changed (normalizer)"),
    ],
)  # fmt: skip
def test_resume_refuses_another_config_or_tokenizer(
    interrupted, tmp_path, file, key, value, message, capsys
):
    model = shutil.copytree(TINY_BERT, tmp_path / "model")
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(content | {key: value}))
    before = output_contents(interrupted)
    assert run_glue.main([*flags(interrupted), "--resume", "--model-name", str(model)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"not the interrupted run: {message}: give that again, or a new folder")
    assert differences(before, output_contents(interrupted)) == []


def test_what_was_begun_without_fingerprints_is_refused(interrupted, capsys):
    """An early version began it; nothing tells whether the base model is the same."""
    args = json.loads((interrupted / "args.json").read_text())
    del args["model_config"]
    (interrupted / "args.json").write_text(json.dumps(args))
    assert run_glue.main([*flags(interrupted), "--resume"]) == 2
    assert "args.json there does not say model_config" in capsys.readouterr().err.splitlines()[-1]


def test_a_moved_folder_and_the_same_data_elsewhere_resume(interrupted, tmp_path, quiet):
    shutil.move(interrupted, tmp_path / "moved")
    shutil.copytree(GLUE / "CoLA", tmp_path / "glue" / "CoLA")
    argv = [*flags(tmp_path / "moved"), "--resume", "--data-dir", str(tmp_path / "glue")]
    assert run_glue.main(argv) == 0
    found, expected = output_contents(tmp_path / "moved"), quiet("stacked")
    differ = differences(expected, found)
    assert all(name.endswith(("args.json", "evaluator.json")) for name in differ)  # they name it


def test_a_finished_run_says_so(tmp_path, capsys, monkeypatch):
    assert run_glue.main([*flags(tmp_path / "out"), "--resume"]) == 0  # nothing there: it starts
    assert not (tmp_path / "out/checkpoints").exists()
    before = output_contents(tmp_path / "out")
    (tmp_path / "out/.lock").touch()  # the process was killed after its last file
    capsys.readouterr()
    forbid_loading(monkeypatch)
    assert run_glue.main([*flags(tmp_path / "out"), "--resume"]) == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert output_contents(tmp_path / "out") == before


@pytest.mark.parametrize("more", [["-m", "roberta-base"], ["--data-dir", "x"], ["--export-model"]])
def test_a_finished_run_is_not_taken_for_another(tmp_path, more, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    args = flags_of_program.parse_args("", flags(folder))
    metadata = vars(args) | {"precision": "fp32", "finished": True}
    (folder / "args.json").write_text(json.dumps(metadata))
    assert run_glue.main([*flags(folder), "--resume"]) == 0
    assert run_glue.main([*flags(folder), "--resume", *more]) == 2
    assert {"-m": "--model-name"}.get(more[0], more[0]) + " was " in (capsys.readouterr().err)


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"finished": false, "precision": "fp32"}')
    (tmp_path / ".notes.tmp").write_text("mine")
    assert run_glue.main([*flags(tmp_path), "--resume"]) == 2
    assert "was begun by another version of this program" in capsys.readouterr().err
    metadata = {"finished": False, "precision": "fp32", "format": utils.FORMAT}
    (tmp_path / "args.json").write_text(json.dumps(metadata))
    assert run_glue.main([*flags(tmp_path), "--resume"]) == 2
    assert "args.json there does not say " in capsys.readouterr().err.splitlines()[-1]
    files.remove_temporaries(tmp_path)
    assert (tmp_path / ".notes.tmp").exists()


def test_what_another_version_began_is_refused(interrupted, capsys):
    args = json.loads((interrupted / "args.json").read_text())
    (interrupted / "args.json").write_text(json.dumps(args | {"format": 1}))
    assert run_glue.main([*flags(interrupted), "--resume"]) == 2
    assert "was begun by another version of this program" in capsys.readouterr().err


def test_another_process_was_faster(tmp_path, monkeypatch, capsys):
    """It begins and ends while this one still loads: what it left counts."""
    command = [*flags(tmp_path / "out"), "--resume"]

    def run_it_first():
        assert run_glue.main(command) == 0

    at_call(monkeypatch, transformers.AutoTokenizer, "from_pretrained", 1, run_it_first)
    assert run_glue.main(command) == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/args.json").read_text())["finished"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"finished": []}', '"finished"'])
def test_a_folder_that_is_not_ours(tmp_path, content, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    if content is not None:
        (tmp_path / "out/args.json").write_text(content)
    status = run_glue.main([*flags(tmp_path / "out"), "--resume"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert last.startswith("run_glue.py: error: --resume: ")
    assert (tmp_path / "out/thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("every", "minutes", "numbers"), [(1, None, [2, 3]), (2, None, [1, 2]), (0, None, []),
                                      (0, 1e-9, [8, 9])]
)  # fmt: skip
def test_when_checkpoints_are_written(tmp_path, monkeypatch, every, minutes, numbers):
    """Every so many epochs and after the last; by minutes within one; two are kept."""
    kept = []
    monkeypatch.setattr(
        "shutil.rmtree", lambda path, **options: kept.append(list_checkpoints(path))
    )
    more = ["--checkpoint-every", str(every)]
    more += ["--checkpoint-minutes", str(minutes or 1e9)]
    assert run_glue.main([*flags(tmp_path / "out", "bitfit"), *more]) == 0
    assert kept == [numbers]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    interrupted, suffix, quiet, caplog, capsys
):
    newest = sorted((interrupted / "checkpoints").glob(f"*{suffix}"))[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    assert_as_if_never_stopped(interrupted, quiet, "stacked")
    assert f"{newest.stem}.json is damaged" in caplog.text
    assert "the one before it is tried" in caplog.text


def test_when_all_are_damaged(interrupted, capsys):
    for path in (interrupted / "checkpoints").glob("*.json"):
        path.write_text("{}")
    before = output_contents(interrupted)
    assert run_glue.main([*flags(interrupted), "--resume"]) == 1
    assert "no checkpoint in " in capsys.readouterr().err.splitlines()[-1]
    assert differences(before, output_contents(interrupted)) == []
