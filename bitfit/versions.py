"""Versions of this program and of installed packages, found without importing them."""

import subprocess
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
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
