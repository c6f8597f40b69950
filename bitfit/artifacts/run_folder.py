"""An output folder: new, held by one process, resumed, finished; args.json says which.

`finished` is false from the first moment, so that what was interrupted is known.
"""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from bitfit.model.fingerprints import describe_change
from utils import (
    FORMAT,
    UserError,
    as_list,
    is_temporary,
    print_result,
    remove_temporaries,
    temporary_name,
    write_text,
)  # fmt: skip

LOGGER = logging.getLogger("bitfit")
CHECKPOINTS = "checkpoints"
# What may differ between a command and the one that resumes it, and what is worth a warning.
HARMLESS = {
    "output_path", "resume", "verbose", "checkpoint_every", "checkpoint_minutes", "gpu_device",
    "max_tokens", "data_dir", "model_name", "model_revision", "finished", "ranks", "task_file",
    "report_to", "push_to_hub", "quiet",
}  # fmt: skip
BY_NAME = {"data_dir", "model_name", "model_revision"}  # harmless while hashes can be compared
WARNED = {
    "torch", "transformers", "datasets", "python", "device", "commit", "threads", "model_commit",
    "rows",
}  # fmt: skip
# Of what is computed with, beside `finished`; flags are only compared.
TYPES = {"precision": str, "format": int, "ranks": int, "threads": int, "task": dict, "commit": str,
         "device": str, "torch": str, "transformers": str, "python": str, "model_config": dict,
         "tokenizer": dict}  # fmt: skip
FINGERPRINTS = {"model_config", "tokenizer"}  # compared key by key
TOKENS = {"data_sha256", "test_sha256"}  # hashes of tokens, so another tokenizer changes them
NEW = FINGERPRINTS | {"test_sha256"}  # earlier versions of this format did not write them
NAMES = {
    "data": "the data",
    "test": "the test data",
    "encoder": "the base model",
    "chosen": "what trains",
}


def folders_of(output, runs):
    """{run: where its files go}: one run needs no folder of its own; or what the caller says."""
    if output is None or isinstance(output, dict):
        return output or {}
    return {run: Path(output) / run.name if len(runs) > 1 else Path(output) for run in runs}


def is_finished(output, facts, resume):
    """Whether nothing is left to do in a folder; it must be new, or that of the command to resume.

    Args:
        facts: the command's, as far as they are known.

    Raises:
        UserError: the folder is in use, cannot be made, or is of another command.
    """
    if is_used(output):
        if not resume:
            what = "give a new folder, nothing is replaced; or --resume to go on with what was"
            raise UserError(f"--output-path {output} is not empty: {what} interrupted there")
        old = read_args(output)
        if not old["finished"] and old.get("format") != FORMAT:
            what = "was begun by another version of this program: give a new folder"
            raise UserError(f"--resume: {output} {what}")
        check_same(old, facts | {"precision": facts["precision"] or old["precision"]})
        if not old["finished"] and "ranks" in facts:
            check_ranks(old.get("ranks") or 1, facts["ranks"])
        if old["finished"]:
            drop_checkpoints(output)
            drop_lock(output)
            print_result(f"{output} is finished: there is nothing to resume")
        return old["finished"]
    check_place(output)
    return False


def check_new(output):
    """UserError unless a folder is new or empty, and can be made."""
    if is_used(output):
        what = "is not empty: give a new folder, nothing is replaced"
        raise UserError(f"--output-path {output} {what}")
    check_place(output)
    check_place(temporary_name(output))  # it is written under this name


def is_used(output):
    """Whether there is anything in a folder; UserError where it is a file."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"--output-path {output} is a file: give a folder")
    if not os.path.isdir(output):
        return False
    try:
        return any(not is_leftover(name) for name in os.listdir(output))
    except OSError as error:
        what = f"cannot be read: {error.strerror}: give another place"
        raise UserError(f"--output-path {output} {what}") from None


def check_place(output):
    """UserError where a folder cannot be made or written."""
    path = Path(output).absolute()
    places = [path, *path.parents]
    nearest = next(place for place in places if os.path.lexists(place))  # a link to nowhere too
    missing = places[: places.index(nearest)]
    try:
        for name in (path, *(nearest / place.name for place in missing)):
            is_there(name)  # OSError for what is too long to be a name
        probe = temporary_name(nearest / "probe")  # the one true answer is to try
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as error:
        what = f"cannot be made in {nearest} ({error.strerror}): give another place"
        raise UserError(f"--output-path {output} {what}") from None


def is_there(path):
    """Whether a name is taken; OSError where the operating system refuses it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def wrong_file(path, suffix):
    """Return why a file cannot be written to a path, or None."""
    if not path.endswith(suffix) or not os.path.isdir(os.path.dirname(path) or "."):
        return f"is not a {suffix} file in a folder that is there"
    if os.path.isdir(path):
        return "is a folder: give another name"
    try:
        temporary_name(path).touch()  # as it will be written
        temporary_name(path).unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror}): give another place"
    return None


def check_ranks(old, new):
    """UserError where as many processes as before are needed: each has its share of what was."""
    if old != new:
        how = f"torchrun --nproc-per-node {old}" if old > 1 else "python, without torchrun"
        what = f"that run has {old} rank{'s' * (old > 1)}, this command {new}: start it with {how}"
        raise UserError(f"--resume: {what}, or give a new folder")


def is_leftover(name):
    """Whether a process killed in its first moments may have left that: nothing to resume."""
    return name == ".lock" or is_temporary(name)


@contextmanager
def lock_folder(output):
    """Hold a folder until the end of this process; UserError where another one holds it."""
    import filelock

    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0.5)  # not at once: another may be looking whether it is held
    except filelock.Timeout:
        what = f"{output} is in use by another process: give another folder"
        raise UserError(f"--output-path {what}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        LOGGER.warning("%s cannot be locked here: start no second process on it", output)
    try:
        remove_temporaries(output)
        yield
    finally:
        (output / ".lock").unlink(missing_ok=True)
        lock.release()


def drop_lock(output):
    """Remove the lock file of a process that was killed after its last file."""
    if (output / ".lock").exists():
        with suppress(UserError, OSError), lock_folder(output):
            pass


def read_args(folder):
    """The args.json in a folder; UserError where it is not there or not ours."""
    try:
        facts = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if not (isinstance(facts["finished"], bool) and isinstance(facts["precision"], str)):
            raise ValueError("it is not of run_glue.py")
        return typed(facts)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        what = f"{folder} holds no run that could go on (args.json: {error}); give a new folder"
        raise UserError(f"--resume: {what}") from None


def typed(facts):
    """The content of an args.json; ValueError where a fact that is used was edited."""
    for name, kinds in TYPES.items():
        value = facts.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"{name} is {json.dumps(value)}")
    if facts.get("ranks") is not None and facts["ranks"] < 1:
        raise ValueError(f"ranks is {facts['ranks']}")
    return facts


def check_same(old, new):
    """Compare a command's facts with those in the args.json of the run that it resumes.

    Data and model may lie elsewhere, as long as their hashes are the same; a finished run is not
    loaded to compute them, so there the names count.

    Raises:
        UserError: they differ in something that results depend on.
    """
    harmless = HARMLESS - (BY_NAME if old["finished"] else set())
    missing = sorted(new.keys() - HARMLESS - WARNED - NEW - old.keys())
    if missing:
        raise UserError(f"--resume: args.json there does not say {missing[0]}: give a new folder")
    if NEW & new.keys() - old.keys():
        LOGGER.warning("an earlier version began this: args.json does not say which config and "
                       "tokenizer the base model had, and which test rows there were: they "
                       "cannot be verified")  # fmt: skip
    names = new.keys() & old.keys() - harmless - FINGERPRINTS
    base = describe_change(old, new)
    if base and "tokenizer" in base:
        names -= TOKENS
    differ = [name for name in names if as_list(new[name]) != as_list(old[name])]
    for name in sorted(WARNED.intersection(differ)):
        LOGGER.warning("resuming with another %s: %s, was %s", name, new[name], old[name])
    said = [difference(name, old[name], new[name]) for name in sorted(set(differ) - WARNED)]
    said += [f"the base model's {base}"] * bool(base)
    if said:
        what = f"{'; '.join(said)}: give that again, or a new folder"
        raise UserError(f"--resume: this is not the interrupted run: {what}")


def difference(name, old, new):
    if name.endswith("_sha256"):
        return f"{NAMES[name.removesuffix('_sha256')]} changed"
    if name == "zero_gradient":
        return "other biases have a zero gradient here"
    if name == "task":
        old = old or {}
        keys = [key for key in old | new if old.get(key) != new.get(key)]
        return f"the task of --task-file has another {' and '.join(keys)}"
    old, new = (" ".join(map(str, as_list(value))) for value in (old, new))
    return f"--{name.replace('_', '-')} was {old} and is now {new}"


def facts_of(args, evaluator):
    """What args.json holds: all flags, and what else the numbers depend on."""
    import torch

    on_gpu = evaluator.torch_device.type == "cuda"
    return vars(args) | {
        "format": FORMAT,
        "model_commit": evaluator.model_commit,
        "precision": evaluator.precision,
        "max_tokens": evaluator.token_budget.max_tokens,
        "rows": evaluator.row_batching,
        "device": torch.cuda.get_device_name(evaluator.torch_device) if on_gpu else "cpu",
        **{package: installed(package) for package in ("torch", "transformers", "datasets")},
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "commit": commit(),
        **evaluator.fingerprints(),
    }


def installed(package):
    """The version of an installed package, or None; it is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit():
    """The checkout's commit, or None where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def is_done(folder):
    """Whether a run of a sweep, in its own folder, needs nothing more."""
    return (folder / "args.json").exists() and read_args(folder)["finished"]


def write_args(folder, facts, finished):
    """Write args.json: what was asked for, and whether nothing is left to do."""
    write_text(folder / "args.json", json.dumps(facts | {"finished": finished}, indent=2) + "\n")


def drop_checkpoints(folder):
    """Remove checkpoints that nobody needs any more."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
