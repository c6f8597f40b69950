"""The text and the commands of README.md and docs/, and a copy of the project to run them in."""

import os
import re
import shutil
import sys
import sysconfig

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")

PAGES = sorted((ROOT / "docs").glob("*.md"))

TEXT = "\n".join([README, *(path.read_text(encoding="utf-8") for path in PAGES)])


def commands():
    """Each command of the bash blocks as one line, without comments."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line))


def plain(prefix):
    return [command for command in commands() if command.startswith(prefix)]


def active_environment():
    """Return the variables of a shell in which this Python's environment is active."""
    folders = [os.path.dirname(sys.executable), sysconfig.get_path("scripts"), os.environ["PATH"]]
    return os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": os.pathsep.join(folders)}


@pytest.fixture(scope="session")
def small(few_glue):
    """Flags that make a command short."""
    return f"--data-dir {few_glue} --epochs 1 --train-size 16 --gpu-device cpu".split()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the project to run scripts in, so that nobody's out/ is touched."""
    folder = tmp_path_factory.mktemp("checkout") / "bitfit"
    left_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder
