"""args.json of an output folder, which says whether the run there is finished.

`finished` is false from the first moment, so that an interrupted command is recognized.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfit.files import write_text
from bitfit.model.fingerprints import describe_change
from bitfit.model.trainable import components_to_terms
from bitfit.options import flag_words
from utils import FORMAT, UserError, as_list, convert_errors, first_line

if TYPE_CHECKING:
    from bitfit.model.run import Run

CHECKPOINTS = "checkpoints"
EVALUATOR = "evaluator.json"
# Values that may differ between a command and the command that resumes it, without a message.
HARMLESS = {
    "output_path", "resume", "verbose", "checkpoint_every", "checkpoint_minutes", "gpu_device",
    "max_tokens", "data_dir", "model_name", "model_revision", "finished", "ranks", "task_file",
    "report_to", "push_to_hub", "quiet", "start_from", "splits",
}  # fmt: skip
# Harmless while hashes can be compared.
BY_NAME = {"data_dir", "model_name", "model_revision", "start_from"}
WARNED = {  # values that may differ, with a warning
    "torch", "transformers", "datasets", "python", "device", "commit", "threads", "model_commit",
    "rows", "uncommitted_changes",
}  # fmt: skip
FINGERPRINTS = {"model_config", "tokenizer"}  # compared key by key
TOKENS = {"data_sha256", "test_sha256"}  # hashes of tokens, so another tokenizer changes them
# Values that earlier versions of this format did not write, as their commands ran.
NEW_FLAGS = {
    "start_from": None, "start_sha256": None, "evaluate_only": False, "add_biases": False,
    "train_score_rows": None, "init_seed": None, "data_seed": None, "halving": None,
}  # fmt: skip
NAMES = {
    "data": "the data",
    "test": "the test data",
    "encoder": "the base model",
    "chosen": "the set of trained parameters",
    "start": "the evaluator of --start-from",
}


def check_resumable(output: Path, metadata: dict[str, Any]) -> tuple[bool, list[str]]:
    """Return whether the run in a folder is finished, and warnings about harmless differences.

    Args:
        metadata: the command's values in args.json, as far as they are known.

    Raises:
        UserError: the folder holds no run, or the run of another command.
    """
    try:
        old = read_args(output)
        metadata = metadata | {"precision": metadata["precision"] or old["precision"]}
        check_same_run(output, old, metadata)
        return old["finished"], list(harmless_differences(old, metadata))
    except (AttributeError, TypeError) as error:
        raise not_resumable(output, error) from None


def find_evaluator(folder: Path) -> Path:
    """Return the folder of the only saved evaluator of a run, of a sweep, or the folder itself."""
    for pattern in (EVALUATOR, f"evaluator/{EVALUATOR}", f"lr*/evaluator/{EVALUATOR}"):
        found = sorted(str(path.parent) for path in folder.glob(pattern))
        if len(found) > 1:
            more = f" and {len(found) - 3} more" * (len(found) > 3)
            names = f"{', '.join(found[:3])}{more}"
            raise UserError(f"{folder} has {len(found)} saved evaluators: give one of {names}")
        if found:
            return Path(found[0])
    advice = "train with --save-evaluator (a stopped run, or one beaten with --keep best, has none)"
    raise UserError(f"there is no saved evaluator in {folder}: {advice}")


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the values of the flags with which the saved evaluator in a folder was trained."""
    path = find_evaluator(folder) / EVALUATOR
    with convert_errors(lambda error: UserError(f"{path} cannot be read: {first_line(error)}")):
        metadata = json.loads(path.read_text(encoding="utf-8"))
        settings = {name: metadata[name] for name in ("fine_tune_type", "random_encoder")}
        settings |= {name: [metadata[name]] for name in ("learning_rate", "seed")}
        settings |= {"data_seed": [metadata["data_seed"]]} if "data_seed" in metadata else {}
        settings |= {"add_biases": metadata.get("add_biases", False)}
        return settings | {"bias_terms": components_to_terms(metadata["components"]) or None}


def run_folders(
    output: Path | str | dict["Run", Path] | None, runs: list["Run"]
) -> dict["Run", Path]:
    """Return {run: folder}. A single run uses `output` itself; a dictionary is returned."""
    if output is None or isinstance(output, dict):
        return output or {}
    return {run: Path(output) / run.name if len(runs) > 1 else Path(output) for run in runs}


def read_args(folder: Path) -> dict[str, Any]:
    """Return the content of args.json; raise a UserError where it is missing or not ours."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if not (isinstance(args["finished"], bool) and isinstance(args["precision"], str)):
            raise ValueError("it is not of run_glue.py")
        return NEW_FLAGS | args
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise not_resumable(folder, error) from None


def not_resumable(folder: Path, error: Exception) -> UserError:
    """Return the error for a folder whose args.json is missing, edited or of another program."""
    message = f"{folder} holds no run that could go on (args.json: {first_line(error)})"
    return UserError(f"--resume: {message}; give a new folder")


def differing_names(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the sorted names of values that differ from the interrupted command.

    Data and model may have moved, as long as their hashes are equal. A finished run is not loaded
    to compute hashes, so there the paths are compared.
    """
    harmless = HARMLESS - (BY_NAME if old["finished"] else set())
    names = new.keys() & old.keys() - harmless - FINGERPRINTS
    if "tokenizer" in (describe_change(old, new) or ""):
        names -= TOKENS
    return sorted(name for name in names if as_list(new[name]) != as_list(old[name]))


def check_same_run(output: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise a UserError unless a command can continue the run with args.json `old`.

    Only values on which results depend count.
    """
    if not old["finished"] and old.get("format") != FORMAT:
        reason = "was begun by another version of this program: give a new folder"
        raise UserError(f"--resume: {output} {reason}")
    if missing := sorted(new.keys() - HARMLESS - WARNED - old.keys()):
        raise UserError(f"--resume: args.json there does not say {missing[0]}: give a new folder")
    names = [name for name in differing_names(old, new) if name not in WARNED]
    differences = [describe_difference(name, old[name], new[name]) for name in names]
    if base := describe_change(old, new):
        differences.append(f"the base model's {base}")
    if differences:
        problem = f"--resume: this is not the interrupted run: {'; '.join(differences)}"
        raise UserError(f"{problem}: give that again, or a new folder")
    ranks = old.get("ranks") or 1
    if not old["finished"] and new.get("ranks", ranks) != ranks:
        problem = f"that run has {ranks} rank{'s' * (ranks > 1)}, this command {new['ranks']}"
        start = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python, without torchrun"
        raise UserError(f"--resume: {problem}: start it with {start}, or give a new folder")


def harmless_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    """Yield a warning for each difference that may change numbers slightly."""
    for name in differing_names(old, new):
        if name in WARNED:
            yield f"resuming with another {name}: {new[name]}, was {old[name]}"


def describe_difference(name: str, old: Any, new: Any) -> str:  # noqa: ANN401 (JSON values)
    """Return one difference between two commands as text."""
    if name.endswith("_sha256"):
        return f"{NAMES[name.removesuffix('_sha256')]} changed"
    if name == "zero_gradient":
        return "other biases have a zero gradient here"
    if name == "task":
        old = old or {}
        keys = [key for key in old | new if old.get(key) != new.get(key)]
        return f"the task of --task-file has another {' and '.join(keys)}"
    old, new = (" ".join(flag_words({name: value})[1:]) or value for value in (old, new))
    old, new = ("left out" if value is None else value for value in (old, new))
    return f"--{name.replace('_', '-')} was {old} and is now {new}"


def is_run_finished(folder: Path) -> bool:
    """Return whether all files of a run in a sweep are written."""
    return (folder / "args.json").exists() and read_args(folder)["finished"]


def write_args(folder: Path, metadata: dict[str, Any], finished: bool) -> None:
    """Write args.json: the command's metadata, and whether nothing is left to do."""
    text = json.dumps(metadata | {"finished": finished}, indent=2)
    write_text(folder / "args.json", text + "\n")


def remove_checkpoints(folder: Path) -> None:
    """Remove checkpoints that are no longer needed."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
