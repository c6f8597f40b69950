"""The state of a cell, derived from the files in the cell's folder and nothing else.

missing      the folder has no run
running      a process holds the lock
interrupted  started, not finished, not locked; the next worker resumes the cell
waiting      not finished, and the cell that it starts from is not done
failed       the last attempt ended with an error or by SIGKILL; <cell>.failed.json has the reason
foreign      the folder belongs to another command
done         args.json says finished, and has the settings of the cell
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bitfit.files import write_text
from bitfit.output_paths import is_locked
from bitfit.study.cells import Cell, Study, has_settings_of
from utils import UserError

STATES = ("missing", "running", "interrupted", "waiting", "failed", "foreign", "done")


def cell_folder(study: Study, cell: Cell) -> Path:
    return study.output / cell.name


def sibling_file(study: Study, cell: Cell, suffix: str) -> Path:
    """Return the path of a cell's log, lock or failure, which lies beside its folder."""
    folder = cell_folder(study, cell)
    return folder.with_name(folder.name + suffix)


def read_cell_args(study: Study, cell: Cell) -> dict[str, Any] | None:
    """Return the content of a cell's args.json, or None if it is absent or cannot be read."""
    return read_object(cell_folder(study, cell) / "args.json")


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is absent or has no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def cell_state(study: Study, cell: Cell) -> str:
    """Return the cell's state, one of `STATES`."""
    locked = is_locked(sibling_file(study, cell, ".lock"))
    state = locked_cell_state(study, cell)
    if locked and state not in ("foreign", "done"):
        return "running"
    source = source_cell(study, cell)
    if source is None or state not in ("missing", "interrupted", "failed"):
        return state
    return state if cell_state(study, source) == "done" else "waiting"


def source_cell(study: Study, cell: Cell) -> Cell | None:
    """Return the cell that a cell starts from, or None if it starts from the base model."""
    key = cell.model, cell.row, cell.start, None
    return next((c for c in study.cells if (c.model, c.row, c.task, c.size) == key), None)


def locked_cell_state(study: Study, cell: Cell) -> str:
    """Return the state for the process that has locked the cell.

    A command may outlive its killed worker, so the lock of the run's folder is tested too.
    """
    metadata = read_cell_args(study, cell)
    if metadata is not None and not has_settings_of(metadata, cell):
        return "foreign"
    if metadata is not None and metadata.get("finished") is True:
        return "done"
    if is_locked(cell_folder(study, cell) / ".lock"):
        return "running"
    if read_failure(study, cell):
        return "failed"
    return "missing" if metadata is None else "interrupted"


@contextmanager
def lock_cell(study: Study, cell: Cell, shared: bool = True) -> Iterator[int | None]:
    """Lock a cell. Yield the file descriptor of the lock, or None if another process has it.

    A child process that inherits the descriptor holds the lock too. So when a worker is killed, its
    command keeps the cell locked until it ends.

    Args:
        shared: whether other processes may work on the cell.

    Raises:
        UserError: the cell is shared, and the file system has no locks.
    """
    path = sibling_file(study, cell, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            locked = try_lock(file)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            if shared:
                problem = f"{study.output} cannot be shared, its file system has no locks"
                raise UserError(f"{problem}: divide the cells with --shard I/N") from None
            locked = True
        yield file if locked else None
    finally:
        os.close(file)


@contextmanager
def lock_cells(
    study: Study, cells: Sequence[Cell], states: set[str], shared: bool
) -> Iterator[dict[str, int]]:
    """Lock the cells that are in some states, and yield {cell name: file descriptor} of these."""
    with ExitStack() as held:
        files = {
            cell.name: held.enter_context(lock_cell(study, cell, shared))
            for cell in cells
            if cell_state(study, cell) in states
        }
        # A state may have changed before the cell was locked.
        free = {cell.name for cell in cells if locked_cell_state(study, cell) in states}
        yield {name: file for name, file in files.items() if file is not None and name in free}


def try_lock(file: int) -> bool:
    """Lock an open file and return whether that succeeded."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)  # Another process may only be testing the lock.
    return False


def read_failure(study: Study, cell: Cell) -> dict[str, Any] | None:
    """Return {"status", "line"} of the last attempt if it failed with these flags, else None."""
    failure = read_object(sibling_file(study, cell, ".failed.json"))
    return failure if failure and failure.get("hash") == cell.hash else None


def write_failure(study: Study, cell: Cell, status: int, line: str) -> None:
    content = {"hash": cell.hash, "status": status, "line": line}
    write_text(sibling_file(study, cell, ".failed.json"), json.dumps(content, indent=2) + "\n")
