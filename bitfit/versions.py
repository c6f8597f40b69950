"""Versions of this program and of installed packages, found without importing them."""

import argparse
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name has no origin."""
    found = find_spec(package)
    return bool(found and found.origin)


def git_commit() -> str | None:
    """Return the checkout's commit, or None where there is no git."""
    return git("rev-parse", "HEAD") or None


def has_uncommitted_changes() -> bool | None:
    """Return whether files of the checkout differ from its commit, or None where there is no git.

    Files that git does not know, such as output folders, do not count.
    """
    changes = git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def git(*arguments: str) -> str | None:
    """Return the output of git in the program's folder, or None if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if result.returncode else result.stdout.strip()


class ShowVersions(argparse.Action):
    """Print the versions that results may depend on, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        versions = [f"commit {git_commit() or 'unknown'}"]
        for name in ("torch", "transformers", "datasets", "numpy"):
            found = installed_version(name)
            versions.append(f"{name} {found}" if found else f"no {name}")
        parser._print_message(f"{parser.prog}: {', '.join(versions)}\n", sys.stdout)
        parser.exit()
