"""StopSignals at any time: while a program is imported, and after the end of its work.

A module that a program imports is replaced by a file, first on the path, that sends the signal; no
clock decides what is tested.
"""

import os
import signal
import subprocess
import sys

import pytest
from conftest import GLUE, ROOT, TINY_BERT
from moments import at_file, send
from quick_python import run_script

import run_glue

PROGRAMS = {
    "run_glue.py": ["-o", "out", "-t", "rte", "-f", "bitfit", "-m", str(TINY_BERT),
                    "--data-dir", str(GLUE), "-d", "cpu", "-e", "1", "--train-size", "8"],
    "scripts/predict.py": ["nowhere"],
    "scripts/compare.py": ["nowhere"],
    "scripts/deltas.py": ["show", "nowhere"],
    "scripts/paper.py": ["run", "-o", "nowhere"],
}  # fmt: skip


def run(program, folder, script=None, **environment):
    """The ended process of a program that finds the modules in `folder` first."""
    start = ["-c", script, str(ROOT / program)] if script else [str(ROOT / program)]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *start, *PROGRAMS[program]], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def assert_one_line(result, program, number):
    ends = {128 + number} if number != signal.SIGINT else {130, -number}
    assert result.returncode in ends, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    name = program.rpartition("/")[2]
    assert result.stderr.startswith(f"{name}: stopped: {signal.Signals(number).name}")
    assert result.stdout == ""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("module", ["logging", "argparse", "numpy", "torch"])
def test_a_signal_during_imports_is_one_line(tmp_path, program, module):
    if (program, module) == ("scripts/compare.py", "torch"):
        module = "pandas"  # the last that it imports
    number = signal.SIGTERM if module == "argparse" else signal.SIGINT
    # Sent once: torch's C code drops the exception of its first `import numpy`, and tries again.
    (tmp_path / f"{module}.py").write_text(
        "import os\n"
        'if "SIGNAL_SENT" not in os.environ:\n'
        '    os.environ["SIGNAL_SENT"] = "1"\n'
        f"    os.kill(os.getpid(), {int(number)})\n"
    )
    assert_one_line(run(program, tmp_path), program, number)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["finally: raise ImportError('C code')", "except: pass"])
def test_a_signal_that_an_import_makes_an_error_of(tmp_path, end):
    """C code raises its own exception, and some Python code goes on with half a module."""
    (tmp_path / "torch.py").write_text(
        f"import os\ntry: os.kill(os.getpid(), {int(signal.SIGTERM)})\n{end}\n"
    )
    assert_one_line(run("run_glue.py", tmp_path), "run_glue.py", signal.SIGTERM)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_the_ranks_of_torchrun_one_says_it(tmp_path, rank):
    (tmp_path / "numpy.py").write_text("import os; os.kill(os.getpid(), 15)\n")
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    ranks |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    result = run("run_glue.py", tmp_path, **ranks)
    assert result.returncode == 143
    assert result.stderr == "run_glue.py: stopped: SIGTERM\n" * (rank == 0)


AT_EXIT = """
import atexit, builtins, os, runpy, sys
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
kill = lambda: os.kill(os.getpid(), {number})
if {last}:
    atexit.register(kill)
plain = print
def shown(text, **options):
    plain(text, **options)
    if not {last}:
        atexit.register(kill)
builtins.print = shown
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("last", [False, True])
def test_after_the_end_a_signal_changes_nothing(tmp_path, last):
    """While the interpreter cleans up, before and after all else that does."""
    script = AT_EXIT.format(number=int(signal.SIGINT), last=last)
    result = run("run_glue.py", tmp_path, script)
    assert result.returncode == 0, result.stderr
    assert "stopped" not in result.stderr
    assert "Traceback" not in result.stderr
    assert "validation" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("more", [[], ["-s", "0", "1"]], ids=["one run", "sweep"])
def test_a_finished_run_stays_finished(tmp_path, monkeypatch, number, more, capsys):
    """A signal right after the final table."""
    plain = print

    def shown(text, **options):
        plain(text, **options)
        send(number)()

    monkeypatch.setattr("builtins.print", shown)
    monkeypatch.chdir(tmp_path)
    assert run_glue.main([*PROGRAMS["run_glue.py"], *more]) == 0
    captured = capsys.readouterr()
    assert "validation" in captured.out
    assert captured.err.splitlines()[-1] == f"run_glue.py: finished before {number.name}"


def test_what_is_not_finished_is_stopped_before_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with at_file("bias_term_changes.csv", 1, send(signal.SIGTERM)):
        assert run_glue.main(PROGRAMS["run_glue.py"]) == 143
    assert "stopped: SIGTERM; to go on: " in capsys.readouterr().err


def notes(folder):
    """What scripts/compare.py says of a run."""
    result = run_script("scripts/compare.py", str(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("more", [[], ["-s", "0", "1"]], ids=["one run", "sweep"])
def test_compare_tells_what_is_not_finished(quick_python, tmp_path, monkeypatch, capsys, more):
    """No checkpoint lies beside the scores: of a run there is none yet, a sweep has its own."""
    monkeypatch.chdir(tmp_path)
    command = [*PROGRAMS["run_glue.py"], *more, "--checkpoint-every", "0"]
    with at_file("learning_curves*.png", 1, send(signal.SIGTERM)):
        assert run_glue.main(command) == 143
    folder = next(tmp_path.rglob("metrics.json")).parent
    assert not (folder / "checkpoints").exists()
    assert "(not finished)" in notes(folder)
    assert run_glue.main([*command, "--resume"]) == 0
    assert "(not finished)" not in notes(folder)


def test_pictures_are_drawn_whatever_a_notebook_chose(tmp_path):
    """A notebook's shell passes the name of its kernel's backend on."""
    (tmp_path / "plots.py").write_text(
        "from bitfit.signals import catch_signals; catch_signals('plots.py')\n"
        "from bitfit.results.plots import new_figure\n"
        "new_figure(2, 2, 'caption').savefig('figure.png')\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "absent"}
    subprocess.run([sys.executable, "plots.py"], cwd=tmp_path, env=os.environ | environment,
                   check=True)  # fmt: skip
    assert (tmp_path / "figure.png").exists()
