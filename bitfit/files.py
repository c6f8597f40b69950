"""Atomic files and folders: readers see the old content or all of the new, even after a power cut.

Files get the permissions of the umask. They are written under a temporary name beside the final
one; a file that a killed process left is recognized by that name.
"""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` on exit."""
    path, temporary = Path(path), temporary_name(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        set_mode_and_sync(temporary, mode)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to write files to, and move them to the folder `path` on exit.

    A new or empty folder appears with all its files at once. In other folders the files are renamed
    one by one, config.json last, and files that were there before stay.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left_by_killed in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        shutil.rmtree(left_by_killed, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")
        for file in files:
            set_mode_and_sync(file, temporary.stat().st_mode & 0o666)
        try:
            os.rename(temporary, path)
        except OSError:  # The path has files, or is a link or another disk.
            path.mkdir(exist_ok=True)
            for file in files:
                shutil.move(file, path / file.name)
        sync_to_disk(path)
        sync_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; bytes of a path that are not UTF-8 are escaped."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def temporary_name(path: str | Path) -> Path:
    """Return the path beside `path` to which `atomic_file` writes."""
    path = Path(path)
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def is_temporary(name: str) -> bool:
    """Return whether `atomic_file` and `atomic_folder` write to files of this name."""
    return bool(re.fullmatch(r"\..*\.\d+\.tmp(\.\w+)?", name))


def remove_temporaries(folder: str | Path) -> None:
    """Remove the temporary files and folders of killed processes below a folder."""
    for path in list(Path(folder).rglob(".*.tmp*")):
        if is_temporary(path.name):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


def set_mode_and_sync(file: Path, mode: int) -> None:
    """Set a file's mode, because safetensors creates files with 0600, and sync it to disk."""
    file.chmod(mode)
    sync_to_disk(file)


def sync_to_disk(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
