"""Checks of the paths that a command will write to, and the lock of an output folder.

Each check returns or raises a message that says what is wrong with the path.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitfit.files import is_temporary, remove_temporaries, temporary_name
from utils import LOGGER, UserError

LOCK = ".lock"  # held while a process writes to the folder


def check_is_new(output: Path) -> None:
    """Raise a UserError unless a folder is new or empty, and can be created."""
    if has_files(output):
        advice = "is not empty: give a new folder, nothing is replaced"
        raise UserError(f"--output-path {output} {advice}")
    check_writable(output)
    check_writable(temporary_name(output))  # The folder is first written under this name.


def has_files(output: Path) -> bool:
    """Return whether a folder exists and holds files; UserError for a file or unreadable folder."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"--output-path {output} is a file: give a folder")
    if not os.path.isdir(output):
        return False
    try:  # A process that was killed in its first moments may have left a lock or temporary files.
        return any(name != LOCK and not is_temporary(name) for name in os.listdir(output))
    except OSError as error:
        message = f"cannot be read: {error.strerror}: give another place"
        raise UserError(f"--output-path {output} {message}") from None


def check_writable(output: Path) -> None:
    """Raise a UserError where a folder cannot be created or written."""
    path = Path(output).absolute()
    places = [path, *path.parents]
    nearest = next(p for p in places if os.path.lexists(p))  # a broken link counts as existing
    missing = places[: places.index(nearest)]
    try:
        for name in (path, *(nearest / place.name for place in missing)):
            with suppress(FileNotFoundError):
                os.lstat(name)  # The operating system may refuse it, for example as too long.
        probe = temporary_name(nearest / "probe")  # Permissions alone do not tell, so try.
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as error:
        message = f"cannot be made in {nearest} ({error.strerror}): give another place"
        raise UserError(f"--output-path {output} {message}") from None


def file_error(path: str, suffixes: tuple[str, ...]) -> str | None:
    """Return why a file with one of some suffixes cannot be written to a path, or None."""
    if not path.endswith(suffixes) or not os.path.isdir(os.path.dirname(path) or "."):
        *others, last = suffixes
        kinds = f"{', '.join(others)} or {last}" if others else last
        return f"is not a {kinds} file in an existing folder"
    if os.path.isdir(path):
        return "is a folder: give another name"
    try:
        temporary_name(path).touch()  # The file is first written under this name.
        temporary_name(path).unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror}): give another place"
    return None


def is_locked(path: Path) -> bool:
    """Return whether a living process holds a lock file; a killed one may leave the file behind."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(file)


def in_use_message(output: Path) -> str:
    return f"--output-path {output} is in use by another process: give another folder"


@contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Create a folder and hold its lock; raise a UserError where another process holds it."""
    import filelock

    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / LOCK, fallback_to_soft=False)
    try:
        # `is_locked` of another process holds the lock for a moment, hence the timeout.
        lock.acquire(timeout=0.5)
    except filelock.Timeout:
        raise UserError(in_use_message(output)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        LOGGER.warning("%s cannot be locked here: start no second process on it", output)
    try:
        remove_temporaries(output)
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()


def remove_lock(output: Path) -> None:
    """Remove the lock file of a process that was killed after its last file."""
    if (output / LOCK).exists():
        with suppress(UserError, OSError), lock_folder(output):
            pass
