"""Joint passes: one command trains the runs of several cells with different trained parameters.

The command has a separate folder. From this folder each cell gets its runs, and the files that
a command for this cell alone would write. After a kill, the next worker finds the folder.
"""

import json
import shutil
from collections.abc import Sequence

from bitfit import options
from bitfit.artifacts import run_folder
from bitfit.results.scores import read_metrics, training_caption
from bitfit.results.sweeps import write_report
from bitfit.study import cell_states
from bitfit.study.cell_states import cell_folder
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


def can_share(a: Cell, b: Cell) -> bool:
    """Return whether one command can train two cells, because only their parameters differ.

    Each cell has at least two runs, because a single run would get other numbers in a pass.
    """
    ignored = {"fine_tune_type": None, "bias_terms": None}
    stacks = ROWS[a.row].stacks and ROWS[b.row].stacks and a.runs > 1 and not a.start
    return stacks and a.args | ignored == b.args | ignored


def free_cells(study: Study, cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells without files that can share a command with a cell; else the cell alone."""
    free = [c for c in cells if can_share(cell, c) and not cell_folder(study, c).exists()]
    return free if cell in free else [cell]


def begun_pass(study: Study, cell: Cell) -> list[Cell]:
    """Return the cells of the joint pass that was begun for a cell, [] if there is none."""
    for path in (study.output / slug(cell.model)).glob(f"{PREFIX}*/*/args.json"):
        sets = (cell_states.read_object(path) or {}).get("bias_terms") or []
        cells = [c for c in study.cells if can_share(cell, c) and bias_terms(c) in sets]
        if cell in cells and cell_folder(study, joint_cell(cells)) == path.parent:
            return cells
    return []


def choose_command(study: Study, cell: Cell, locked: Sequence[Cell]) -> tuple[Cell, list[Cell]]:
    """Return the command that trains a cell, and the cells that get their files from it.

    It is a begun joint pass, else a new one of cells that did not fail, else the command of
    the cell. So after a failure before the training, each cell is tried alone.

    Args:
        locked: the cells of `free_cells` that this worker has locked.
    """
    begun = begun_pass(study, cell)
    left = [c for c in begun if not cell_folder(study, c).exists()]
    if cell in left and all(c in locked for c in left):
        return joint_cell(begun), left
    new = [c for c in locked if not cell_states.read_failure(study, c)]
    if cell in new and len(new) > 1 and not begun:
        return joint_cell(new), new
    return cell, [cell]


def divide(study: Study, joint: Cell, cells: Sequence[Cell]) -> None:
    """Move the runs of a finished joint pass to the folders of their cells."""
    for cell in cells:
        if not cell_folder(study, cell).exists():  # else its command was run meanwhile
            write_cell(study, joint, cell)
    home = cell_folder(study, joint)
    (home / "args.json").unlink()  # first, so that the rest is not taken for a pass
    shutil.rmtree(home)


def write_cell(study: Study, joint: Cell, cell: Cell) -> None:
    """Write a cell's folder from its runs in a joint pass. It appears at its place when complete.

    This may be repeated after a kill at any time.
    """
    home, target = cell_folder(study, joint), cell_folder(study, cell)
    part, folders, terms = home / cell.name, cell.folders(home), " ".join(bias_terms(cell))
    part.mkdir(parents=True, exist_ok=True)
    values = {name: cell.args[name] for name in ("fine_tune_type", "bias_terms")}
    values["output_path"] = str(target)
    for run, folder in folders.items():
        trained = home / run._replace(terms=terms).name
        if trained.exists():
            trained.rename(folder)
        args = json.loads((folder / "args.json").read_text(encoding="utf-8")) | values
        run_folder.write_args(folder, args, finished=True)
    args |= {name: cell.args[name] for name in options.RUN_AXES}
    del args["trained_by"]
    task, finished = task_of(cell.args), True
    try:
        caption = training_caption(task, read_metrics(folder)[0])
        write_report(part, task, folders, caption=caption)
    except Diverged as error:
        finished = False
        cell_states.write_failure(study, cell, 1, line=f"run_glue.py: stopped: {error}")
    run_folder.write_args(part, args, finished=finished)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.rename(target)
