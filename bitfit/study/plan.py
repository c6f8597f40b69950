"""Checks of a study's models and data, and the tables that `paper.py plan` and `run` print."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from bitfit.data.splits import find_split
from bitfit.data.tasks import Task
from bitfit.files import write_text
from bitfit.model import bias_terms, hub
from bitfit.model.loading import load_config, load_tokenizer
from bitfit.study import cell_states, cost
from bitfit.study.cell_tasks import data_dir_of, task_of
from bitfit.study.cells import Cell, Study
from bitfit.study.cost import Costs
from utils import UserError

MAX_PRINTED_COMMANDS = 12


def check_study(study: Study) -> None:
    """Raise one UserError for all local models and data that are missing.

    A command checks models and data on the Hub when it starts.
    """
    messages = []
    for model in dict.fromkeys(cell.model for cell in study.cells if is_local(cell.model)):
        of_model = [cell.args for cell in study.cells if cell.model == model]
        messages += error_messages(partial(check_model, model, of_model))
    needed: dict[tuple[str, str], dict[str, int]] = {}  # {(task, folder): {split: examples}}
    tasks = {cell.task: task_of(cell.args) for cell in study.cells}
    for cell in study.cells:
        if folder := data_dir_of(cell.args):
            task, splits = tasks[cell.task], needed.setdefault((cell.task, folder), {"train": 0})
            splits["train"] = max(splits["train"], cell.args["train_size"] or 0)
            tests = task.server_files if cell.args["predict_test"] else ()
            splits |= dict.fromkeys((*task.validation_splits, *tests), 0)
    for (name, folder), splits in needed.items():
        for split, rows in splits.items():
            messages += error_messages(partial(check_split, tasks[name], split, folder, rows))
    if messages:
        raise UserError("; ".join(dict.fromkeys(messages)))


def is_local(model: str) -> bool:
    """Return whether a model name can only be a local folder."""
    marked = model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1
    return marked or hub.is_local(model)


def check_model(model: str, commands: Sequence[dict[str, Any]]) -> None:
    """Raise UserError if a model is missing, or lacks the bias terms of one of its commands."""
    tasks = {task.is_tagging: task for task in map(task_of, commands)}
    for is_tagging, task in tasks.items():
        load_tokenizer(model, for_words=is_tagging)
        load_config(model, task)
    for terms, add_biases, is_tagging in dict.fromkeys(
        (tuple(args["bias_terms"] or ["all"]), args["add_biases"], task_of(args).is_tagging)
        for args in commands if args["fine_tune_type"] == "bitfit" or args["add_biases"]
    ):  # fmt: skip
        empty = bias_terms.model_of_config(model, tasks[is_tagging], added=add_biases)
        bias_terms.select_components(empty, terms)


def check_split(task: Task, split: str, folder: str, rows: int) -> None:
    texts = find_split(task, split, folder)
    if texts is not None and len(texts) < rows:
        problem = f"{task.name} has {len(texts)} training examples in {folder}"
        raise UserError(f"{problem}, fewer than {rows}")


def error_messages(check: Callable[[], None]) -> list[str]:
    """Return the message of the UserError that a check raises, or an empty list."""
    try:
        check()
        return []
    except UserError as error:
        return [str(error)]


def study_table(study: Study, costs: Costs) -> str:
    """Return the states, runs and hours of the cells as text, without empty columns."""
    table = pd.DataFrame({
        "cell": [cell.name for cell in study.cells],
        "state": [cell_states.cell_state(study, cell) for cell in study.cells],
        "runs": [cell.runs for cell in study.cells],
        "epochs": [cell.args["epochs"] for cell in study.cells],
        "hours": [costs.seconds(cell) for cell in study.cells],
        "hours trained": [cost.training_seconds(study, cell) for cell in study.cells],
    })  # fmt: skip
    table[["hours", "hours trained"]] = table[["hours", "hours trained"]].astype(float) / 3600
    shown = table.dropna(axis="columns", how="all")
    left = table[table["state"] != "done"]
    lines = [
        shown.to_string(index=False, na_rep="", float_format="{:.3f}".format),
        f"{len(table)} cells, {table['runs'].sum()} runs{hours_text(table)}, "
        f"left: {len(left)} cells{hours_text(left)}",
    ]
    lines += [f"unknown cost: {reason}" for reason in dict.fromkeys(costs.unknown.values())]
    if table["hours"].isna().any():
        lines.append("hours are unknown until a cell is done; `plan --calibrate` estimates them")
    return "\n".join(lines)


def hours_text(table: pd.DataFrame) -> str:
    """Return the sum of the hours that are known as text, empty if none is known."""
    return f", {table['hours'].sum():.3f} hours" if table["hours"].notna().any() else ""


def commands_text(study: Study) -> str:
    """Write commands.sh and return its commands, or for a large study only its name."""
    path = study.output / "commands.sh"
    commands = [cell.shell(study.output) for cell in study.cells]
    write_text(path, "".join(f"{command}\n" for command in commands))
    if len(commands) > MAX_PRINTED_COMMANDS:
        return f"the commands of all cells: {path}"
    return "\n".join(f"$ {command}" for command in commands)


def cells_within_budget(
    study: Study, cells: Sequence[Cell], budget: float, states: set[str]
) -> tuple[list[Cell], list[Cell]]:
    """Return (the cheapest cells that fit into a budget of hours, the other cells).

    Raises:
        UserError: the cost of a cell is unknown.
    """
    costs, states = cost.Costs(study), states | {"waiting"}
    open_cells = [cell for cell in cells if cell_states.cell_state(study, cell) in states]
    seconds = np.array([costs.seconds(cell) for cell in open_cells], float)  # NaN: unknown
    if np.isnan(seconds).any():
        raise UserError("--budget-hours needs the cost of the cells: run `plan --calibrate` first")
    order = seconds.argsort(kind="stable")
    count = (seconds[order].cumsum() <= 3600 * budget).sum()
    cheapest = [open_cells[i] for i in order]
    return cheapest[:count], cheapest[count:]


def states_summary(study: Study, cells: Sequence[Cell], left: Sequence[Cell]) -> str:
    """Return the number of cells in each state, and the reasons of failures."""
    states = [cell_states.cell_state(study, cell) for cell in cells]
    counts = {state: states.count(state) for state in cell_states.STATES if state in states}
    lines = [", ".join(f"{count} {state}" for state, count in counts.items()) or "no cells"]
    if left:
        lines.append(f"left, beyond --budget-hours: {', '.join(cell.name for cell in left)}")
    for cell, state in zip(cells, states, strict=True):
        failure = cell_states.read_failure(study, cell) or {}
        log = cell_states.sibling_file(study, cell, ".log")
        reasons = {
            "failed": f"{cell.name}, status {failure.get('status')}: {failure.get('line')} ({log})",
            "waiting": f"{cell.name}, until the cell of {cell.args['start_from']} is done",
            "foreign": f"{cell_states.cell_folder(study, cell)} belongs to another command",
        }
        lines += [f"{state}: {reasons[state]}"] if state in reasons else []
    return "\n".join(lines)
