"""Joint passes: one command trains the runs of several cells that differ only in what trains.

The command has a folder of its own. From this folder each cell gets its runs, and the files that
the cell's own command would write. After a kill at any time, the next worker finds the folder.
"""

import json
import shutil
from collections.abc import Callable, Sequence

from bitfit import options
from bitfit.artifacts import run_folder
from bitfit.results.scores import read_metrics, training_caption
from bitfit.results.sweeps import write_report
from bitfit.study.cell_states import (
    cell_folder,
    locked_cell_state,
    read_failure,
    read_object,
    sibling_file,
    write_failure,
)
from bitfit.study.cell_tasks import task_of
from bitfit.study.cells import Cell, Study, flags_hash, slug
from bitfit.study.protocol import ROWS
from utils import Diverged

PREFIX = ".together-"  # of the folder in place of a row


def bias_terms(cell: Cell) -> list[str]:
    """Return the words after --bias-terms that train a cell of bitfit or frozen."""
    row = ROWS[cell.row]
    return [*row.bias_terms] or [options.NO_TERMS if row.fine_tune_type == "frozen" else "all"]


def joint_cell(cells: Sequence[Cell]) -> Cell:
    """Return the command that trains the runs of several cells, as a cell outside of the study."""
    values = {"fine_tune_type": "bitfit", "bias_terms": [bias_terms(cell) for cell in cells]}
    flags = options.flag_words(cells[0].args | values | {"output_path": None})
    digest = flags_hash(flags)
    return cells[0]._replace(row=PREFIX + digest, flags=flags, hash=digest)


def can_share(*cells: Cell) -> bool:
    """Return whether one command can train cells, because only what trains differs.

    A single run would get other numbers in a pass, so each cell has at least two.
    """
    ignored = {"fine_tune_type": None, "bias_terms": None}
    settings = [cell.args | ignored for cell in cells]
    return all(
        ROWS[cell.row].stacks and cell.runs > 1 and not cell.start and values == settings[0]
        for cell, values in zip(cells, settings, strict=True)
    )


def begun_pass(study: Study, cell: Cell) -> list[Cell]:
    """Return the cells of the joint pass that was begun for a cell, [] if there is none."""
    for path in (study.output / slug(cell.model)).glob(f"{PREFIX}*/*/args.json"):
        sets = (read_object(path) or {}).get("bias_terms") or []
        cells = [c for c in study.cells if can_share(cell, c) and bias_terms(c) in sets]
        if cell in cells and cell_folder(study, joint_cell(cells)) == path.parent:
            return cells
    return []


def choose_command(
    study: Study, cell: Cell, cells: Sequence[Cell], lock: Callable[[Cell], bool]
) -> tuple[Cell, list[Cell]]:
    """Return the command that trains a cell, and the cells that get their files from it.

    It is a begun joint pass, else a new one of cells that did not fail, else the cell's own
    command. So after a failure before the training, each cell is tried alone.

    Args:
        cells: the cells that this worker may run.
        lock: returns whether this worker has, or gets, the lock of a cell.
    """
    new = [c for c in cells if can_share(cell, c) and not cell_folder(study, c).exists()]
    if cell in new and (begun := begun_pass(study, cell)):
        left = [c for c in begun if not cell_folder(study, c).exists()]
        if all(c in new and lock(c) for c in left):
            return joint_cell(begun), left
    elif cell in new and not read_failure(study, cell):
        left = [c for c in new if not read_failure(study, c) and lock(c)]
        if len(left) > 1:
            return joint_cell(left), left
    return cell, [cell]


def train(study: Study, joint: Cell, cells: Sequence[Cell], run: Callable[[], None]) -> None:
    """Run a joint pass, and give the locked cells their parts of it, or its failure."""
    home, log = cell_folder(study, joint), sibling_file(study, joint, ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        sibling_file(study, cell, ".failed.json").unlink(missing_ok=True)
        with open(sibling_file(study, cell, ".log"), "ab") as file:
            text = f"trained with {', '.join(c.row for c in cells)}: the log is {log}\n"
            file.write(text.encode(errors="backslashreplace"))
    if locked_cell_state(study, joint) != "done":  # else the worker that ran it was killed
        run()
    if locked_cell_state(study, joint) == "done":
        for cell in cells:
            if not cell_folder(study, cell).exists():  # else its own command was run meanwhile
                write_cell(study, joint, cell)
        (home / "args.json").unlink()  # first, so that the rest is not taken for a pass
        shutil.rmtree(home)
    elif failure := read_failure(study, joint):
        for cell in cells:
            write_failure(study, cell, failure["status"], line=failure["line"])


def write_cell(study: Study, joint: Cell, cell: Cell) -> None:
    """Write a cell's folder from its runs in a joint pass. It appears at its place when complete.

    This may be repeated after a kill at any time.
    """
    home, target = cell_folder(study, joint), cell_folder(study, cell)
    part, folders, terms = home / cell.name, cell.folders(home), " ".join(bias_terms(cell))
    part.mkdir(parents=True, exist_ok=True)
    values = {name: cell.args[name] for name in ("fine_tune_type", "bias_terms")}
    for run, folder in folders.items():
        trained = home / run._replace(terms=terms).name
        if trained.exists():
            trained.rename(folder)
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        args |= values | {"output_path": str(target)}
        run_folder.write_args(folder, args, finished=True)
    args |= {name: cell.args[name] for name in options.RUN_AXES}
    del args["trained_by"]
    task, finished = task_of(cell.args), True
    try:
        caption = training_caption(task, read_metrics(folder)[0])
        write_report(part, task, folders, caption=caption)
    except Diverged as error:
        finished = False
        write_failure(study, cell, 1, line=f"run_glue.py: stopped: {error}")
    run_folder.write_args(part, args, finished=finished)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.rename(target)
