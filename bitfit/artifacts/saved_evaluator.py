"""A trained evaluator on disk: evaluator.json, and what trained in delta.safetensors.

The delta holds only the values that trained (about 0.4 MB for BitFit on bert-base). The hash of
the base model's encoder guards it: it is never put on another one. Where everything trained, the
whole model is kept instead, in `model/`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bitfit.data import task_files
from bitfit.model import fingerprints as models
from bitfit.model import hub, trainable
from bitfit.model.fingerprints import describe_change
from bitfit.model.run_stack import Run, RunStack
from bitfit.results.scores import scores_frame
from bitfit.training import store
from bitfit.training.prepare import (
    PreparedModel,
    Trainable,
    TrainingResult,
    assemble,
    load_base,
)
from bitfit.training.setup import LoadedData, Method, Setup, load_data
from bitfit.training.state import Record
from utils import LOGGER, CorruptFile, UserError

Tensors = dict[str, torch.Tensor]

FACTS = "evaluator.json"
POSITIONS = ":positions"  # suffix of the tensor that says which entries a random mask chose
BUILT_FROM = ("task_name", "model_name", "seed", "data_dir", "precision", "random_encoder")
DATA = ("max_sequence_len", "batch_size", "train_size")
READ = (".json", ".txt", ".model", ".jinja")  # endings of what transformers reads beside weights


def write(evaluator: Any, folder: Path) -> None:
    """Write the selected run; evaluator.json is written last and makes the folder complete."""
    folder.mkdir(parents=True, exist_ok=True)
    setup, loaded = evaluator.setup, evaluator.loaded
    prepared, result = evaluator.prepared, evaluator.result
    run = result.record.run
    metadata: dict[str, Any] = {"encoder_sha256": prepared.encoder_sha256}
    metadata |= {name: getattr(loaded, name) for name in DATA}
    metadata |= {
        "base_name": setup.base_name,
        "fine_tune_type": prepared.method.fine_tune_type,
        "components": list(prepared.method.components),
        "model_commit": setup.model_commit,
        "task_name": setup.task.name,
        "model_name": resolved_folder(setup.model_name),
        "data_dir": resolved_folder(setup.data_dir),
        "precision": setup.precision,
        "random_encoder": setup.random_encoder,
    }
    metadata |= {"task": setup.task.record} if setup.task.record else {}
    metadata |= run._asdict() | {"train_loss": result.record.train_loss}
    metadata |= {"scores": result.scores_of(run).to_numpy().tolist(), "model_sha256": None}
    metadata |= {"averaged": result.averaged} if result.averaged else {}
    metadata |= {"zero_gradient": prepared.zero_gradient} if prepared.zero_gradient else {}
    tensors = {}
    if trainable.trains_all(prepared.model, prepared.trainable):
        evaluator.export_model(folder / "model")
        metadata["model_sha256"] = models.fingerprint(prepared.model, head=True)
        metadata["model_files"] = file_hashes(folder / "model")
    else:
        metadata |= loaded.base_fingerprints
        params = result.stack.named_params(result.selected)
        tensors = {name: value.cpu().contiguous() for name, value in params.items()}
        tensors |= {n + POSITIONS: p.cpu() for n, p in result.stack.positions.items()}
    store.write_entry(folder / FACTS, metadata, tensors, "delta.safetensors")


def resolved_folder(path: str | Path | None) -> str | Path | None:
    """Return the absolute path of a folder; other values, such as names on the Hub, unchanged."""
    return str(Path(path).resolve()) if path is not None and Path(path).is_dir() else path


def files(folder, model_name=None):
    """(facts, tensors) of a saved evaluator; "model_name" and "model_revision": where its base is.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    if not (folder / FACTS).exists():
        raise UserError(f"there is no saved evaluator in {folder}: {FACTS} is missing")
    try:
        facts, tensors = store.read_entry(folder / FACTS)
    except CorruptFile as error:
        raise UserError(f"{error}; train and save it again") from None
    commit = facts.setdefault("model_commit", None)  # the first of these files did not say it
    facts["model_name"] = str(model_name or facts["model_name"])
    if facts["model_sha256"]:
        facts["model_name"] = str(folder / "model")
    if ("model_files" if facts["model_sha256"] else "model_config") not in facts:
        warn_unverified(folder)
    elif facts["model_sha256"]:
        check_files(folder, facts)
    moved = model_name or hub.is_local(facts["model_name"])
    facts["model_revision"] = None if moved else commit
    return facts, tensors


def file_hashes(folder):
    """{name: SHA-256} of the files of a model's folder, without its weights."""
    found = [path for path in sorted(folder.glob("*")) if path.suffix in READ and path.is_file()]
    return {path.name: store.file_sha256(path) for path in found}


def check_files(folder, facts):
    """UserError where a file beside the weights of a whole model is not as it was written."""
    written, found = facts["model_files"], file_hashes(folder / "model")
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            what = "is not as it was written" if name in written else "was not written with it"
            what = what if name in found else "is missing"
            raise UserError(f"{folder / 'model' / name} {what}: train and save it again")


def check_base(folder, facts, fingerprints):
    """UserError unless a model's fingerprints are those of the base model that was trained.

    Of a whole model `check_files` verifies the files that config and tokenizer are read from.
    """
    change = describe_change(facts, fingerprints)
    if change:
        raise another_base(folder, facts, f": its {change}")


def another_base(folder, facts, why=""):
    what = f"{folder} was trained on another base model than {facts['model_name']}{why}"
    return UserError(f"{what}: give the one it was trained on as model_name")


@cache
def warn_unverified(folder):
    """Log one line, once for each folder."""
    LOGGER.warning("%s was saved by an earlier version of this program: the config and the "
                   "tokenizer of its model cannot be verified", folder)  # fmt: skip


def task_of(facts):
    """The `Task` of a saved evaluator; UserError where it is none that is known."""
    return task_files.resolve_task(facts.get("task", facts["task_name"]))[0]


def read(
    folder: Path, model_name: str | None = None, data_dir: str | Path | None = None
) -> tuple[dict[str, Any], tuple[dict[str, Any], Tensors]]:
    """Return the arguments of `GLUEvaluator` and what `restore` needs, from a saved evaluator.

    Raises:
        UserError: the files are damaged.
    """
    facts, tensors = files(folder, model_name)
    facts["data_dir"] = data_dir or facts["data_dir"]
    arguments = {name: facts[name] for name in BUILT_FROM}
    arguments["task_name"] = facts.get("task", facts["task_name"])  # or the task file's content
    return arguments | {"model_revision": facts["model_revision"]}, (facts, tensors)


def restore(
    setup: Setup, folder: Path, facts: dict[str, Any], tensors: Tensors
) -> tuple[Setup, LoadedData, PreparedModel, TrainingResult]:
    """Return setup, data, prepared model and result of a saved evaluator.

    Raises:
        UserError: the base model is not the one of the delta.
    """
    setup = replace(setup, base_name=facts["base_name"], model_commit=facts["model_commit"])
    loaded = load_data(setup, *(facts[name] for name in DATA))
    check_base(folder, facts, loaded.base_fingerprints)
    run = Run(facts["learning_rate"], facts["seed"])
    random_encoder = facts["random_encoder"] and not facts["model_sha256"]
    model, fields = load_base(setup, random_encoder)
    prepared = assemble(
        model,
        setup.model_name,
        read_trainable(model, fields["encoder_sha256"], facts, tensors, folder),
        [run],
        dtype=setup.dtype,
        max_tokens=setup.max_tokens,
        method=Method(facts["fine_tune_type"], tuple(facts["components"])),
        zero_gradient=facts.get("zero_gradient", {}),
        encoder_sha256=fields["encoder_sha256"],
    )
    stack = RunStack(model, prepared.trainable, [run])
    for name, (a, b) in stack.slices.items() if tensors else ():
        stack.params[0, a:b] = tensors[name].flatten()
    stack.load_run(0)
    result = TrainingResult(
        stack=stack,
        records=[Record(run, facts["train_loss"])],
        scores=scores_frame(facts["scores"]),
        averaged=facts.get("averaged", []),
    )
    return setup, loaded, prepared, result


def read_trainable(
    model: Any, encoder_sha256: str, facts: dict[str, Any], tensors: Tensors, folder: Path
) -> Trainable:
    """Return what trained, as for `RunStack`; UserError if it trained on another model."""
    if facts["model_sha256"]:
        if models.fingerprint(model, head=True) != facts["model_sha256"]:
            what = f"{folder / 'model'} is not as it was written: train and save it again"
            raise UserError(what)
    elif encoder_sha256 != facts["encoder_sha256"]:
        raise another_base(folder, facts)
    positions = {n: tensors.get(n + POSITIONS) for n, _ in model.named_parameters()}
    return {
        name: None if own is None else own.numpy()
        for name, own in positions.items()
        if name in tensors or not tensors
    }
