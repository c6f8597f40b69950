"""Where each cell stands, read from its folder: there is no other book that could be wrong.

missing      nothing there
running      a process holds its lock
interrupted  begun, not finished, held by nobody: it goes on where it stopped
failed       the last attempt ended with an error, or SIGKILL ended two that got just as far;
             <cell>.failed.json says which
foreign      its folder is of another command
done         its own args.json says finished, under the cell's configuration hash
"""

import errno
import fcntl
import json
import os
import time
from contextlib import contextmanager

from bitfit.artifacts import run_folder
from bitfit.artifacts.run_folder import CHECKPOINTS
from bitfit.study.cells import is_of
from utils import UserError, write_text

STATES = ("missing", "running", "interrupted", "failed", "foreign", "done")


def folder_of(study, cell):
    return study.output / cell.name


def beside(study, cell, suffix):
    """A file of the cell's that is not in its folder: its log, its lock, its failure."""
    folder = folder_of(study, cell)
    return folder.with_name(folder.name + suffix)


def args_of(study, cell):
    """The args.json in a cell's folder, or None; what cannot be read is none."""
    try:
        facts = json.loads((folder_of(study, cell) / "args.json").read_text(encoding="utf-8"))
        return run_folder.typed(facts) if isinstance(facts, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def state_of(study, cell):
    """One of STATES."""
    held = is_held(beside(study, cell, ".lock"))
    state = state_of_taken(study, cell)
    return "running" if held and state not in ("foreign", "done") else state


def state_of_taken(study, cell):
    """The same for who holds it: one whose worker was killed may still be running by itself."""
    facts = args_of(study, cell)
    if facts is not None and not is_of(facts, cell):
        return "foreign"
    if facts is not None and facts.get("finished") is True:
        return "done"
    if is_held(folder_of(study, cell) / ".lock"):
        return "running"
    if failure_of(study, cell):
        return "failed"
    return "missing" if facts is None else "interrupted"


def is_held(path):
    """Whether a process holds a lock; one that was killed holds none, though its file may stay."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # there are no locks here
        return False
    finally:
        os.close(file)


@contextmanager
def taken(study, cell, shared=True):
    """Hold a cell; gives the lock's file, or None where another process has it.

    Whoever inherits the file holds the lock too: a command goes on when its worker is killed, and
    until it ends nobody else may begin.

    Args:
        shared: whether other processes may want the cell.

    Raises:
        UserError: they may, and the file system has no locks.
    """
    path = beside(study, cell, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            own = lock(file)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            if shared:
                what = "its file system has no locks: divide the cells with --shard I/N"
                raise UserError(f"{study.output} cannot be shared, {what}") from None
            own = True
        yield file if own else None
    finally:
        os.close(file)


def lock(file):
    """Lock an open file; returns whether it could be had."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)  # another process may only be looking whether it is held
    return False


def failure_of(study, cell):
    """{"status", "line"} of the last attempt, if it failed under this configuration."""
    try:
        failure = json.loads(beside(study, cell, ".failed.json").read_text(encoding="utf-8"))
        return failure if failure["hash"] == cell.hash else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def note_failure(study, cell, status, line):
    content = {"hash": cell.hash, "status": status, "line": line}
    write_text(beside(study, cell, ".failed.json"), json.dumps(content, indent=2) + "\n")


def forget_failure(study, cell):
    beside(study, cell, ".failed.json").unlink(missing_ok=True)


def progress_of(study, cell):
    """What grows while a cell's command gets on: its checkpoints, and runs that are complete."""
    folder = folder_of(study, cell)
    complete = [path.parent for path in folder.rglob("args.json") if is_finished(path)]
    paths = [*folder.rglob(f"{CHECKPOINTS}/*.json"), *complete]
    return sorted(str(path.relative_to(folder)) for path in paths)


def is_finished(path):
    """Whether an args.json says so."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["finished"] is True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def note_kill(study, cell):
    """Note that SIGKILL ended a command; returns whether the one before got just as far."""
    path, kill = beside(study, cell, ".killed.json"), {"hash": cell.hash}
    kill["progress"] = progress_of(study, cell)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    write_text(path, json.dumps(kill, indent=2) + "\n")
    return kill == before


def forget_kill(study, cell):
    beside(study, cell, ".killed.json").unlink(missing_ok=True)
