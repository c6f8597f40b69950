"""A trained evaluator on disk: evaluator.json, and the trained values in delta.safetensors.

delta.safetensors has only the trained values (about 0.4 MB for BitFit on bert-base). The hash of
the base model's encoder ensures that they are never applied to another model. If everything
trained, the whole model is saved in `model/` instead.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bitfit.artifacts.run_folder import EVALUATOR, find_evaluator
from bitfit.data import task_files
from bitfit.data.tasks import Task
from bitfit.model import fingerprints as models
from bitfit.model import hub, trainable
from bitfit.model.fingerprints import base_error, describe_change
from bitfit.model.loading import load_model, write_model
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.warm_start import WarmStart, make_warm_start
from bitfit.results.scores import scores_frame
from bitfit.training import store
from bitfit.training.prepare import PreparedModel, Trainable, assemble
from bitfit.training.result import TrainingResult
from bitfit.training.setup import LoadedData, Method, Setup, load_base, load_data
from bitfit.training.state import Record
from utils import LOGGER, CorruptFile, UserError

Tensors = dict[str, torch.Tensor]

POSITIONS = ":positions"  # suffix of tensors with the flat positions of a random mask
BUILT_FROM = ("task_name", "model_name", "seed", "data_seed", "data_dir", "precision",
              "random_encoder", "add_biases")  # fmt: skip
DATA = ("max_sequence_len", "batch_size", "train_size")
READ = (".json", ".txt", ".model", ".jinja")  # suffixes of files that transformers reads


def write_evaluator(
    result: TrainingResult, prepared: PreparedModel, loaded: LoadedData, setup: Setup, folder: Path
) -> None:
    """Write the selected run; evaluator.json is written last and makes the folder complete."""
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepared.for_run(run := result.record.run)
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
    metadata |= {"add_biases": True} if setup.add_biases else {}
    metadata |= {"task": setup.task.record} if setup.task.record else {}
    metadata |= run.fields | {"train_loss": result.record.train_loss}
    scores = result.scores_of(run).assign(run=run._replace(terms=None).name)
    metadata |= {"scores": scores.to_numpy().tolist(), "model_sha256": None}
    metadata |= {"averaged": result.averaged} if result.averaged else {}
    metadata |= {"zero_gradient": prepared.zero_gradient} if prepared.zero_gradient else {}
    metadata |= prepared.method.start_record
    tensors = {}
    if trainable.trains_all(prepared.model, prepared.trainable):
        write_model(prepared.model, loaded.tokenizer, folder / "model")
        metadata["model_sha256"] = models.fingerprint(prepared.model, head=True)
        metadata["model_files"] = file_hashes(folder / "model")
    else:
        metadata |= loaded.base_fingerprints
        tensors = changed_values(prepared, run)
    store.write_entry(folder / EVALUATOR, metadata, tensors, tensors_name="delta.safetensors")


def changed_values(prepared: PreparedModel, run: Run) -> Tensors:
    """Return the values in the model that differ from the base model, and their positions."""
    stack = RunStack(prepared.model, prepared.changed, [run])
    tensors = {name: value.cpu().contiguous() for name, value in stack.named_params().items()}
    return tensors | {name + POSITIONS: p.cpu() for name, p in stack.positions.items()}


def resolved_folder(path: str | Path | None) -> str | Path | None:
    """Return the absolute path of a folder; other values, such as names on the Hub, unchanged."""
    return str(Path(path).resolve()) if path is not None and Path(path).is_dir() else path


def read_files(
    folder: Path, model_name: str | Path | None = None
) -> tuple[dict[str, Any], Tensors]:
    """Return (metadata, tensors) of a saved evaluator; UserError if it is missing or damaged.

    The metadata have the current name of the base model.
    """
    if not (folder / EVALUATOR).exists():
        raise UserError(f"there is no saved evaluator in {folder}: {EVALUATOR} is missing")
    try:
        metadata, tensors = store.read_entry(folder / EVALUATOR)
    except CorruptFile as error:
        raise UserError(f"{error}; train and save it again") from None
    metadata.setdefault("data_seed", None)
    commit = metadata.setdefault("model_commit", None)  # Early versions did not write it.
    # The config of a whole model has the added biases already.
    metadata["add_biases"] = bool(metadata.get("add_biases") and not metadata["model_sha256"])
    metadata["model_name"] = str(model_name or metadata["model_name"])
    if metadata["model_sha256"]:
        metadata["model_name"] = str(folder / "model")
    if ("model_files" if metadata["model_sha256"] else "model_config") not in metadata:
        warn_unverified(folder)
    elif metadata["model_sha256"]:
        check_files(folder, metadata)
    moved = model_name or hub.is_local(metadata["model_name"])
    metadata["model_revision"] = None if moved else commit
    return metadata, tensors


def file_hashes(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of the files in a model's folder, without the weights."""
    found = [path for path in sorted(folder.glob("*")) if path.suffix in READ and path.is_file()]
    return {path.name: store.file_sha256(path) for path in found}


def check_files(folder: Path, metadata: dict[str, Any]) -> None:
    """Raise UserError if a file beside the weights of a whole model changed, came or went."""
    written, found = metadata["model_files"], file_hashes(folder / "model")
    changed = [name for name in written | found if written.get(name) != found.get(name)]
    if changed:
        names = ", ".join(sorted(changed))
        problem = f"{folder / 'model'}: {names} is not as it was written"
        raise UserError(f"{problem}: train and save it again")


def check_base(folder: Path, metadata: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    """Raise UserError unless the fingerprints are those of the evaluator's base model.

    For a whole model, `check_files` verifies the files of config and tokenizer.
    """
    change = describe_change(metadata, fingerprints)
    if change:
        raise base_error(folder, metadata["model_name"], f": its {change}")


@cache
def warn_unverified(folder: Path) -> None:
    """Log, once per folder, that config and tokenizer cannot be verified."""
    LOGGER.warning("%s was saved by an earlier version of this program: the config and the "
                   "tokenizer of its model cannot be verified", folder)  # fmt: skip


def task_of(metadata: dict[str, Any]) -> Task:
    """Return the task of a saved evaluator; UserError if it is unknown."""
    return task_files.resolve_task(metadata.get("task", metadata["task_name"]))[0]


def read_evaluator(
    folder: Path, model_name: str | None = None, data_dir: str | Path | None = None
) -> tuple[dict[str, Any], tuple[dict[str, Any], Tensors]]:
    """Return `GLUEvaluator`'s arguments and (metadata, tensors); UserError if files are damaged."""
    metadata, tensors = read_files(folder, model_name)
    metadata["data_dir"] = data_dir or metadata["data_dir"]
    arguments = {name: metadata[name] for name in BUILT_FROM}
    arguments["task_name"] = metadata.get("task", metadata["task_name"])  # a record or a name
    return arguments | {"model_revision": metadata["model_revision"]}, (metadata, tensors)


def restore_evaluator(
    setup: Setup, folder: Path, metadata: dict[str, Any], tensors: Tensors
) -> tuple[Setup, LoadedData, PreparedModel, TrainingResult]:
    """Return setup, data, prepared model and result; UserError for another base model."""
    setup = replace(setup, base_name=metadata["base_name"], model_commit=metadata["model_commit"])
    loaded = load_data(setup, *(metadata[name] for name in DATA))
    check_base(folder, metadata, loaded.base_fingerprints)
    run = Run(metadata["learning_rate"], metadata["seed"], metadata["data_seed"])
    random_encoder = metadata["random_encoder"] and not metadata["model_sha256"]
    model, fields = load_base(replace(setup, random_encoder=random_encoder))
    start = WarmStart(metadata["started_from"]) if "started_from" in metadata else None
    prepared = assemble(
        model,
        setup.model_name,
        read_trainable(model, fields["encoder_sha256"], metadata, tensors=tensors, folder=folder),
        runs=[run],
        dtype=setup.dtype,
        max_tokens=setup.max_tokens,
    )
    prepared = replace(
        prepared,
        method=Method(metadata["fine_tune_type"], tuple(metadata["components"]), start=start),
        zero_gradient=metadata.get("zero_gradient", {}),
        encoder_sha256=fields["encoder_sha256"],
    )
    stack = RunStack(model, prepared.trainable, [run])
    for name, (a, b) in stack.slices.items() if tensors else ():
        stack.params[0, a:b] = tensors[name].flatten()
    stack.load_run(0)
    result = TrainingResult(
        stack=stack,
        records=[Record(run, metadata["train_loss"])],
        scores=scores_frame(metadata["scores"]),
        averaged=metadata.get("averaged", []),
    )
    return setup, loaded, prepared, result


def read_warm_start(
    folder: str | Path | None, setup: Setup, loaded: LoadedData, fine_tune_type: str
) -> WarmStart | None:
    """Return the warm start from the only saved evaluator in a folder; None: there is no folder.

    Raise a UserError if there is none or more than one, it has another base model, or everything
    trained and `fine_tune_type` would not save everything.
    """
    if folder is None:
        return None
    folder = find_evaluator(Path(folder))
    metadata, values = read_files(folder, setup.model_name)
    source = task_of(metadata)
    if metadata["model_sha256"]:
        whole = folder / "model"
        if fine_tune_type != "full_ft":
            raise UserError(f"{folder} changed all parameters (full_ft), so only full_ft can start "
                            f"from it: give --model-name {whole} instead")  # fmt: skip
        model, _ = load_model(whole, source)
        read_trainable(model, "", metadata, tensors={}, folder=folder)
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    else:
        check_base(folder, metadata, loaded.base_fingerprints)
    positions = {
        name: values[name + POSITIONS].numpy() if name + POSITIONS in values else None
        for name in values
        if not name.endswith(POSITIONS)
    }
    values = {name: values[name] for name in positions}
    return make_warm_start(
        metadata, values, positions, folder=str(folder), source=source, task=setup.task
    )


def read_trainable(
    model: torch.nn.Module,
    encoder_sha256: str,
    metadata: dict[str, Any],
    tensors: Tensors,
    folder: Path,
) -> Trainable:
    """Return the trained parameters, as for `RunStack`; UserError for another base model."""
    if metadata["model_sha256"]:
        if models.fingerprint(model, head=True) != metadata["model_sha256"]:
            raise UserError(f"{folder / 'model'} is not as it was written: train and save it again")
    elif encoder_sha256 != metadata["encoder_sha256"]:
        raise base_error(folder, metadata["model_name"])
    positions = {n: tensors.get(n + POSITIONS) for n, _ in model.named_parameters()}
    return {
        name: None if flat_positions is None else flat_positions.numpy()
        for name, flat_positions in positions.items()
        if name in tensors or not tensors
    }
