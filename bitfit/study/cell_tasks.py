"""The task of a cell: a task of GLUE, or a task that a file describes."""

import argparse
import os
from functools import cache
from typing import Any

from bitfit.data import task_files
from bitfit.data.tasks import TASKS, Task
from utils import UserError


def task_argument(word: str) -> str:
    """Return a value of --tasks: the name of a GLUE task, or the absolute path of a task file."""
    if word not in TASKS and not word.endswith(".json"):
        known = ", ".join(map(repr, TASKS))
        message = f"invalid choice: {word!r} (choose from {known}, or give a task file, *.json)"
        raise argparse.ArgumentTypeError(message)
    return word if word in TASKS else os.path.abspath(word)


def task_of(flags: dict[str, Any]) -> Task:
    """Return the task of a command's flags; UserError if its task file is missing or invalid."""
    file = flags["task_file"]
    return read_task(file, flags["data_dir"]) if file else TASKS[flags["task_name"]]


@cache
def read_task(file: str, data_dir: str | None) -> Task:
    return task_files.task_of(task_files.read_task_file(file, data_dir))


def data_dir_of(flags: dict[str, Any]) -> str | None:
    """Return the folder of a command's data; None: it is on the Hub."""
    file, task = flags["task_file"], task_of(flags)
    if flags["data_dir"] or not file or "files" not in (task.record or {}):
        return flags["data_dir"]
    return str(task_files.default_data_dir(file))


def check_metric(task: Task) -> None:
    """Raise UserError if the statistics of a study do not support the main metric of a task."""
    main = task.metrics[0]
    if main not in ("Accuracy", "F1", "MCC", "Spearman") or (main == "MCC" and task.num_labels > 2):
        problem = f"a study cannot compare methods by {main}, the first metric of {task.name}"
        raise UserError(f"{problem}: give another first metric in its task file, such as Accuracy")
