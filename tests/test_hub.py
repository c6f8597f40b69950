"""Pinned models, from a Hub cache on disk; and pushes, to a client that takes what it is given."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from conftest import COMMITS, GLUE, ROOT, TINY_BERT, forbid_loading
from processes import exit_status

import run_glue
from bitfit import versions
from bitfit.data.tasks import TASKS
from bitfit.model import hub
from bitfit.model.fingerprints import fingerprint
from bitfit.model.hub import resolve_revision
from bitfit.model.loading import load_model, load_tokenizer
from bitfit.training import store
from glue_evaluator import GLUEvaluator
from utils import UserError

RTE = TASKS["rte"]
SMALL = ["--data-dir", str(GLUE), "--epochs", "1", "--train-size", "16", "--gpu-device", "cpu"]
SMALL += ["--max-seq-length", "12"]


def flags(output, *more, model="org/tiny"):
    return ["-o", str(output), "-t", "rte", "-f", "bitfit", "-m", str(model), *SMALL, *more]


def read(path):
    return json.loads(path.read_text())


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def facts_of(model, tokenizer):
    """What tells the two states of org/tiny apart: weights, config, tokenizer."""
    return fingerprint(model), model.config.initializer_range, tokenizer.model_max_length


def plain(hub, commit):
    """The same of transformers' own classes on the snapshot's folder."""
    folder = hub / "models--org--tiny" / "snapshots" / commit
    return facts_of(
        transformers.BertForSequenceClassification.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("given", [None, "main", "v1", COMMITS["main"], COMMITS["v1"]])
def test_a_revision_is_one_commit_for_all_files(hub, given):
    revision, commit = resolve_revision("org/tiny", given)
    assert commit == COMMITS.get(given or "main", given)
    loaded = load_model("org/tiny", RTE, revision=revision)[0]
    assert facts_of(loaded, load_tokenizer("org/tiny", revision)) == plain(hub, commit)
    assert plain(hub, COMMITS["main"]) != plain(hub, COMMITS["v1"])


def test_local_files_need_neither_datasets_nor_a_new_transformers(hub, tmp_path, monkeypatch):
    """transformers 5.17 does not resolve revisions; `datasets` is for data on the Hub alone."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import fails, as if it were not there
    monkeypatch.delattr("transformers.utils.resolve_revision", raising=False)
    assert run_glue.main(flags(tmp_path / "out", "--model-revision", "v1")) == 0
    args = read(tmp_path / "out/args.json")
    assert args["model_commit"] == COMMITS["v1"]
    for package in ("torch", "transformers"):
        assert args[package] == sys.modules[package].__version__
    assert versions.installed_version("no-such-package") is None


def test_data_on_the_hub_need_datasets(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    argv = flags(tmp_path / "out", model=TINY_BERT)
    at = argv.index("--data-dir")
    assert run_glue.main(argv[:at] + argv[at + 2 :]) == 2
    assert "cannot load nyu-mll/glue (rte) from the Hub or its cache: " in last_line(capsys)


def test_the_files_are_of_one_commit_though_the_name_moves(hub, tmp_path, monkeypatch):
    """The tag is set to another commit once the evaluator is made."""
    moving = shutil.copytree(hub, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(moving))
    evaluator = GLUEvaluator("rte", "org/tiny", None, 0, GLUE, model_revision="v1")
    (moving / "models--org--tiny/refs/v1").write_text(COMMITS["main"])
    evaluator.preprocess_dataset("longest", 12, 8, train_size=16)
    evaluator.training_preparation(1e-3, "adamw", False, verbose=False)
    assert facts_of(evaluator.model, evaluator.loaded.tokenizer) == plain(hub, COMMITS["v1"])
    assert evaluator.setup.model_commit == COMMITS["v1"]
    assert resolve_revision("org/tiny", "v1")[1] == COMMITS["main"]


def test_the_commit_is_kept_and_a_saved_evaluator_goes_back_to_it(hub, tmp_path):
    for name, more in {"pinned": ["--model-revision", "v1"], "plain": []}.items():
        assert run_glue.main(flags(tmp_path / name, "--save-evaluator", *more)) == 0
        commit = COMMITS["v1" if more else "main"]
        args, metrics = (read(tmp_path / name / f"{f}.json") for f in ("args", "metrics"))
        assert args["model_revision"] == ("v1" if more else None)
        assert args["model_commit"] == commit
        assert metrics["model_commit"] == commit
        again = GLUEvaluator.load(tmp_path / name / "evaluator", None)
        assert again.setup.model_commit == commit
        assert again.evaluate("validation") == pytest.approx(metrics["last"]["validation"])
    pinned = tmp_path / "pinned/evaluator"
    folder = hub / "models--org--tiny/snapshots" / COMMITS["v1"]
    assert GLUEvaluator.load(pinned, None, model_name=folder).setup.model_commit == COMMITS["v1"]
    with pytest.raises(UserError, match="was trained on another base model than org/tiny"):
        GLUEvaluator.load(pinned, None, model_name="org/tiny")  # its main branch
    GLUEvaluator.load(pinned, None, model_name=folder).save(tmp_path / "moved")
    assert GLUEvaluator.load(tmp_path / "moved", None).setup.model_name == str(folder)
    metadata, tensors = store.read_entry(pinned / "evaluator.json")
    del metadata["model_commit"]  # as it was saved before commits were kept
    store.write_entry(pinned / "evaluator.json", metadata, tensors, "delta.safetensors")
    assert GLUEvaluator.load(pinned, None, model_name=folder).setup.model_commit is None


def test_full_fine_tuning_keeps_its_own_model(hub, tmp_path):
    argv = flags(tmp_path / "out", "--save-evaluator", "--model-revision", "v1")
    argv[argv.index("bitfit")] = "full_ft"
    assert run_glue.main(argv) == 0
    assert read(tmp_path / "out/evaluator/evaluator.json")["model_commit"] == COMMITS["v1"]
    GLUEvaluator.load(tmp_path / "out/evaluator", None)


def test_resume_compares_the_models_not_their_names(hub, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    more = ["--model-revision", "v1"]
    assert run_glue.main(flags(output, *more)) == 0
    assert run_glue.main(flags(output, "--resume", *more)) == 0
    assert "is finished" in capsys.readouterr().out
    assert run_glue.main(flags(output, "--resume")) == 2
    assert "--model-revision was v1 and is now left out" in last_line(capsys)
    args = read(output / "args.json") | {"finished": False}
    (output / "args.json").write_text(json.dumps(args))
    assert run_glue.main(flags(output, "--resume")) == 2
    assert "the base model changed" in last_line(capsys)
    assert run_glue.main(flags(output, "--resume", "--model-revision", COMMITS["v1"])) == 0
    old = read(output / "args.json")  # as of a program without the flag
    del old["model_revision"], old["model_commit"]
    (output / "args.json").write_text(json.dumps(old))
    assert run_glue.main(flags(output, "--resume")) == 0


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        (TINY_BERT, "v1", "--model-revision v1: "),
        ("org/tiny", "v9", "cannot load the model org/tiny at revision v9: "),
        ("org/tiny", "c" * 40, f"cannot load the model org/tiny at revision {'c' * 40}: "),
        ("org/none", "v1", "cannot load the model org/none at revision v1: "),
        ("./nowhere", "v1", "there is no model folder ./nowhere"),
    ],
)
def test_revisions_that_are_not_there(hub, tmp_path, capsys, model, revision, message):
    argv = flags(tmp_path / "out", "--model-revision", revision, model=model)
    assert run_glue.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"run_glue.py: error: {message}")
    assert len(error) == 1
    assert not (tmp_path / "out").exists()


# Pushes


@pytest.fixture
def online(monkeypatch):
    """As if the Hub were there when the command begins, and knew our token."""
    monkeypatch.setattr(hub, "use_local_copies_when_offline", lambda needs_hub: None)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda api: {"name": "me"})
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


def take(monkeypatch):
    """Let the Hub take what it is given; returns {name: the names of the files}."""
    taken = {}

    def create_repo(api, name, exist_ok):
        assert exist_ok
        return huggingface_hub.RepoUrl(
            f"https://huggingface.co/{name if '/' in name else f'me/{name}'}"
        )

    def upload_folder(api, repo_id, folder_path, commit_message):
        taken[repo_id] = names(folder_path)
        url = f"https://huggingface.co/{repo_id}/commit/1"
        return huggingface_hub.CommitInfo(
            commit_url=url, commit_message=commit_message, commit_description="", oid="1"
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return taken


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_one_run_is_pushed_at_the_end(online, monkeypatch, tmp_path, capsys):
    output, taken = tmp_path / "out", take(monkeypatch)
    assert run_glue.main(flags(output, "--push-to-hub", "rte-bitfit", model=TINY_BERT)) == 0
    assert read(output / "args.json")["finished"]
    assert taken == {"me/rte-bitfit": names(output / "model")}
    assert {"README.md", "config.json", "model.safetensors"} < taken["me/rte-bitfit"]
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == "pushed to https://huggingface.co/me/rte-bitfit"


def test_of_many_runs_the_best_one_is_pushed(online, monkeypatch, tmp_path):
    taken = take(monkeypatch)
    more = ["-s", "0", "1", "--keep", "best", "--push-to-hub", "me/best"]
    assert run_glue.main(flags(tmp_path / "out", *more, model=TINY_BERT)) == 0
    best = read(tmp_path / "out/results.json")["best"]["run"]
    assert taken == {"me/best": names(tmp_path / "out" / best / "model")}


def test_a_push_that_fails_loses_nothing(online, monkeypatch, tmp_path, capsys):
    """The Hub is gone at the end, as its own client says; later it is back."""
    output = tmp_path / "out"
    argv = flags(output, "--push-to-hub", "me/x", model=TINY_BERT)
    assert run_glue.main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    kept = f"run_glue.py: stopped: the training is finished, all of it is in {output}, but the push"
    assert error.startswith(f"{kept} failed: Cannot reach https://huggingface.co/api/repos/create")
    assert read(output / "args.json")["finished"]
    later = shlex.split(error.split("to push it later: ")[1])
    assert later == ["hf", "upload", "me/x", str(output / "model"), "."]
    program = Path(sys.executable).with_name("hf")
    result = subprocess.run([program, *later[1:]], capture_output=True, text=True)
    assert "offline mode is enabled" in result.stderr + result.stdout  # its words were understood
    taken = take(monkeypatch)
    forbid_loading(monkeypatch)
    argv = [*flags(output, "--push-to-hub", "me/y", model=TINY_BERT), "--resume"]
    assert run_glue.main(argv) == 0
    assert taken == {"me/y": names(output / "model")}
    shutil.rmtree(output / "model")
    assert run_glue.main(argv) == 2
    assert f"{output} holds 0 exported models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--push-to-hub", "me/x", "-s", "0", "1"], "of several runs: give --keep best too"),
        (["--push-to-hub", "me/x/y"], "--push-to-hub me/x/y: Repo id must be in the form"),
        (["--push-to-hub", "me/x"], "me/x: Token is required"),
        (["--push-to-hub", "me/x", "HF_TOKEN"], "me/x: Cannot reach https://huggingface.co"),
        (["--push-to-hub", "me/x", "HF_TOKEN", "online"], "me/x: Invalid user token"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_any_work(
    tmp_path, capsys, monkeypatch, more, message
):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    if "HF_TOKEN" in more:
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    if "online" in more:

        def whoami(api):
            raise huggingface_hub.errors.LocalTokenNotFoundError("Invalid user token.")

        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    argv = flags(tmp_path / "out", model=TINY_BERT)
    argv += [word for word in more if word not in ("HF_TOKEN", "online")]
    forbid_loading(monkeypatch)
    status = exit_status(run_glue.main, argv)
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("run_glue.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_needs_the_hub_only_for_a_push(monkeypatch, tmp_path):
    """With all that it reads on disk a run is offline; one that is to be pushed is not."""
    asked = []
    monkeypatch.setattr(
        hub, "use_local_copies_when_offline", lambda needs_hub: asked.append(bool(needs_hub))
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run_glue.main(flags(tmp_path / "a", "--max-seq-length", "129", model=TINY_BERT))
    run_glue.main(flags(tmp_path / "b", "--push-to-hub", "not/a/name", model=TINY_BERT))
    assert asked == [False, True]


def test_the_clients_own_environment_is_obeyed(hub_home):
    """HF_HOME, in a process of its own: the client reads it once."""
    script = "from bitfit.model import hub; print(hub.resolve_revision('org/tiny', 'v1')[1])"
    environment = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == COMMITS["v1"], result.stderr
