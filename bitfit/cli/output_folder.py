"""Decide whether a command starts, resumes or has nothing to do; the content of args.json."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfit import output_paths
from bitfit.artifacts.run_folder import check_resumable, remove_checkpoints
from bitfit.options import RunOptions
from bitfit.versions import git_commit, has_uncommitted_changes, installed_version
from utils import FORMAT, LOGGER, UserError, print_result

if TYPE_CHECKING:
    from glue_evaluator import GLUEvaluator


def is_finished(
    output: Path, metadata: dict[str, Any], resume: bool, is_mine: bool = False
) -> bool:
    """Return whether a folder, new or with files of the same command, is finished.

    Args:
        is_mine: this process holds the folder's lock.

    Raises:
        UserError: the folder holds another run, is in use or cannot be created.
    """
    if not output_paths.has_files(output):
        output_paths.check_writable(output)
        return False
    if not resume:
        advice = "give a new folder, or --resume to continue the interrupted run there"
        raise UserError(f"--output-path {output} is not empty: {advice}")
    if not is_mine and output_paths.is_locked(output / output_paths.LOCK):
        raise UserError(output_paths.in_use_message(output))
    finished, warnings = check_resumable(output, metadata)
    for warning in warnings:
        LOGGER.warning(warning)
    if finished:
        remove_checkpoints(output)
        output_paths.remove_lock(output)
        print_result(f"{output} is finished: there is nothing to resume")
    return finished


def flag_values(options: RunOptions, task: dict[str, Any] | None) -> dict[str, Any]:
    """Return the flags as args.json has them; `task` is the content of --task-file, if given."""
    return asdict(options) | ({"task": task} if task else {})


def run_metadata(evaluator: "GLUEvaluator") -> dict[str, Any]:
    """Return the values of program, model and machine in args.json."""
    import torch

    on_gpu = evaluator.setup.device.type == "cuda"
    packages = ("torch", "transformers", "datasets")
    return {
        "format": FORMAT,
        "model_commit": evaluator.setup.model_commit,
        "precision": evaluator.setup.precision,
        "max_tokens": evaluator.need_prepared().token_budget.max_tokens,
        "rows": evaluator.need_prepared().forward.batching_kind,
        "device": torch.cuda.get_device_name(evaluator.setup.device) if on_gpu else "cpu",
        **{package: installed_version(package) for package in packages},
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "uncommitted_changes": has_uncommitted_changes(),
        "splits": evaluator.need_loaded().describe_splits(),
    }
