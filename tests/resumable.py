"""Commands that the tests interrupt and resume, and their files without an interruption."""

import signal

import pytest
from conftest import GLUE, TINY_BERT
from interruption import differences, output_contents
from moments import at_step, send

import run_glue

BASE = [
    "-t", "cola", "-m", str(TINY_BERT), "--data-dir", str(GLUE), "--gpu-device", "cpu", "-e", "3",
    "--train-size", "44", "-b", "16", "--save-evaluator", "--predict-test",
]  # fmt: skip

RUNS = {
    "bitfit": ["-f", "bitfit", "--keep", "best", "--lr-schedule", "linear"],
    "frozen": ["-f", "frozen"],
    "full_ft": ["-f", "full_ft", "-l", "1e-4", "--optimizer", "adam"],
    "rand_uniform": ["-f", "rand_uniform", "--precision", "bf16"],
    "rand_row_col": ["-f", "rand_row_col"],
    "stacked": ["-f", "bitfit", "-l", "1e-3", "4e-3"],
    "one by one": ["-f", "rand_row_col", "-s", "0", "1", "--keep", "best"],
}


def flags(output, kind="stacked"):
    return [*BASE, *RUNS[kind], "-o", str(output)]


@pytest.fixture(scope="session")
def quiet(tmp_path_factory):
    """What each command leaves when nothing disturbs it, by kind."""
    remembered = {}

    def of(kind):
        if kind not in remembered:
            folder = tmp_path_factory.mktemp("quiet") / "out"
            assert run_glue.main(flags(folder, kind)) == 0
            remembered[kind] = output_contents(folder)
        return remembered[kind]

    return of


def assert_as_if_never_stopped(folder, quiet, kind):
    assert run_glue.main([*flags(folder, kind), "--resume"]) == 0
    assert differences(quiet(kind), output_contents(folder)) == []


def at_call(monkeypatch, target, name, number, action):
    """Do `action` right before call `number` (from 1) of a function."""
    plain, calls = getattr(target, name), iter(range(1, 1_000_000))

    def watched(*args, **options):
        if next(calls) == number:
            action()
        return plain(*args, **options)

    monkeypatch.setattr(target, name, watched)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    with at_step(5, send(signal.SIGTERM)):
        run_glue.main(flags(tmp_path / "out"))
    return tmp_path / "out"
