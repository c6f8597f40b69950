"""A small study of two cells for the tests, planned by `paper.py plan`."""

import sys

import paper
import pytest
from conftest import GLUE, TINY_BERT

from bitfit.study import cell_states, cells

TOY = [
    "--models", str(TINY_BERT), "--data-dir", str(GLUE), "--tasks", "rte", "--train-size", "24",
    "--epochs", "2", "--learning-rates", "1e-3", "full_ft=1e-4", "--seeds", "0", "1",
]  # fmt: skip


def plan(output, *more, tables=("--tables", "3")):
    return paper.main(["plan", "--output-path", str(output), *tables, *TOY, *more])


@pytest.fixture
def study(tmp_path, capsys):
    """Two cells, planned."""
    assert plan(tmp_path / "study", "--rows", "bitfit", "rand_row_col") == 0
    capsys.readouterr()
    return cells.read_study(tmp_path / "study")


def states(study):
    return [cell_states.cell_state(study, cell) for cell in study.cells]


def replace_python(monkeypatch, folder, body, interpreter="/bin/bash"):
    """Let commands run a script in place of Python."""
    path = folder / "python"
    path.write_text(f"#!{interpreter}\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
