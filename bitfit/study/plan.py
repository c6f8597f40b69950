"""What `paper.py plan` and `run` print, and what is wrong with a plan before anything runs."""

from pathlib import Path

import pandas as pd

from bitfit.data.splits import read_split
from bitfit.data.tasks import TASKS
from bitfit.model.loading import cannot_load, load_config, load_tokenizer
from bitfit.study import cost, ledger
from utils import UserError, blaming


def check(study):
    """Refuse a plan whose local models or data are not there, all that is wrong at once.

    What is on the Hub is looked for when its cell runs.
    """
    wrong = []
    for model in dict.fromkeys(cell.model for cell in study.cells if is_local(cell.model)):
        wrong += said(lambda model=model: check_model(model))
    wanted = {}  # {(task, folder): what of each split is needed}
    for cell in study.cells:
        if cell.args["data_dir"]:
            own = wanted.setdefault((cell.task, cell.args["data_dir"]), {"train": 0})
            own["train"] = max(own["train"], cell.args["train_size"] or 0)
            tests = TASKS[cell.task].server_files if cell.args["predict_test"] else ()
            own |= dict.fromkeys((*TASKS[cell.task].validation_splits, *tests), 0)
    for (task, folder), splits in wanted.items():
        for split, rows in splits.items():
            what = (TASKS[task], split, folder, rows)
            wrong += said(lambda what=what: check_split(*what))
    if wrong:
        raise UserError("; ".join(dict.fromkeys(wrong)))


def is_local(model):
    """Whether a name can only be a folder's."""
    marked = model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1
    return marked or Path(model).is_dir()


def check_model(model):
    load_tokenizer(model)
    with blaming(lambda error: cannot_load(model, error)):
        load_config(model, TASKS["rte"])


def check_split(task, split, folder, rows):
    texts = read_split(task, split, folder)
    if texts is not None and len(texts) < rows:
        raise UserError(f"{task.name} has {len(texts)} training rows in {folder}, not {rows}")


def said(work):
    """[what is wrong with some work], or nothing."""
    try:
        work()
        return []
    except UserError as error:
        return [str(error)]


def table(study, costs):
    """The cells: where each stands, its runs, its hours here, and one run at a time."""
    rows, apart = [], []
    for cell in study.cells:
        seconds, alone, size = costs.seconds(cell), costs.seconds_apart(cell), costs.bytes(cell)
        apart.append(alone)
        spent = cost.seconds_of(study, cell)
        rows.append({
            "cell": cell.name,
            "state": ledger.state_of(study, cell),
            "runs": cell.runs,
            "epochs": cell.args["epochs"],
            "hours": hours(seconds),
            "one by one": hours(alone),
            "took": hours(spent) if spent else "",
            "MB": "?" if size is None else f"{size / 1e6:.1f}",
        })  # fmt: skip
    left = [c for c in study.cells if ledger.state_of(study, c) != "done"]
    lines = [pd.DataFrame(rows).to_string(index=False), totals(study, costs, left)]
    lines += [f"not known: {why}" for why in dict.fromkeys(costs.unknown.values())]
    if any(costs.seconds(cell) is None for cell in study.cells):
        lines.append(
            "hours are not known yet: plan again with --calibrate, or after a cell is done"
        )
    return "\n".join(lines)


def totals(study, costs, left):
    """One line: all cells, and what is left of them."""
    runs = sum(cell.runs for cell in study.cells)
    say = [f"{len(study.cells)} cells, {runs} runs"]
    for name, function in (("hours", costs.seconds), ("hours one by one", costs.seconds_apart)):
        values = [function(cell) for cell in study.cells]
        known = [value for value in values if value is not None]
        if known:
            some = "" if len(known) == len(values) else f" (of {len(known)} cells)"
            say.append(f"{hours(sum(known))} {name}{some}")
    to_do = [value for value in map(costs.seconds, left) if value is not None]
    say.append(f"left: {len(left)} cells" + (f", {hours(sum(to_do))} hours" if to_do else ""))
    sizes = [size for size in map(costs.bytes, study.cells) if size is not None]
    return ", ".join([*say, f"{sum(sizes) / 1e6:.0f} MB on disk"] if sizes else say)


def hours(seconds):
    return "?" if seconds is None else f"{seconds / 3600:.2f}"


def commands(study):
    """Each cell's command, to be pasted and run alone."""
    return "\n".join(f"$ {cell.shell(study.output)}" for cell in study.cells)


def within(study, cells, budget, states):
    """(the cheapest cells in some states that fit into so many hours, those that do not)

    Raises:
        UserError: what they cost is not known.
    """
    costs, spent, fit = cost.Costs(study), 0.0, []
    open_cells = [cell for cell in cells if ledger.state_of(study, cell) in states]
    prices = {cell.name: costs.seconds(cell) for cell in open_cells}
    if None in prices.values():
        raise UserError("--budget-hours needs the cells' cost: plan with --calibrate before")
    for cell in sorted(open_cells, key=lambda cell: prices[cell.name]):
        if spent + prices[cell.name] <= 3600 * budget:
            spent += prices[cell.name]
            fit.append(cell)
    return fit, [cell for cell in open_cells if cell not in fit]


def summary(study, cells, left):
    """What became of some cells, in words; what failed, and why."""
    states = [ledger.state_of(study, cell) for cell in cells]
    counts = {state: states.count(state) for state in ledger.STATES if state in states}
    lines = [", ".join(f"{count} {state}" for state, count in counts.items()) or "no cells"]
    if left:
        lines.append(f"left, beyond --budget-hours: {', '.join(cell.name for cell in left)}")
    for cell, state in zip(cells, states, strict=True):
        failure = ledger.failure_of(study, cell) or {}
        if state == "failed":
            where = ledger.beside(study, cell, ".log")
            what = f"status {failure.get('status')}: {failure.get('line')}"
            lines.append(f"failed: {cell.name}, {what} ({where})")
        if state == "foreign":
            lines.append(f"foreign: {ledger.folder_of(study, cell)} is another command's")
    return "\n".join(lines)
