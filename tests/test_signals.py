"""Signals and kills at any moment of a command lose nothing."""

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import transformers
from conftest import ROOT, wait_for
from interruption import differences, kill_repeatedly, output_contents
from moments import at_evaluation, at_file, at_step, send
from processes import in_ranks, run_program
from resumable import BASE, RUNS, assert_as_if_never_stopped, at_call, flags

import run_glue
from bitfit.signals import Stopped, StopSignals


@pytest.mark.parametrize("kind", RUNS)
def test_a_signal_in_mid_epoch_changes_nothing(tmp_path, monkeypatch, quiet, kind, capsys):
    """Dropout is on. The step is finished, a checkpoint written, the way on printed."""
    with at_step(5, send(signal.SIGTERM)):
        assert run_glue.main(flags(tmp_path / "out", kind)) == 128 + signal.SIGTERM
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_glue.py: stopped: SIGTERM; to go on: python run_glue.py ")
    assert last.endswith(" --resume")
    folder = tmp_path / "out"
    (newest,) = sorted(folder.rglob("checkpoints/*.json"))[-1:]
    metadata = json.loads(newest.read_text())
    assert (metadata["epoch"], metadata["step"]) == (1, 2)
    assert_as_if_never_stopped(folder, quiet, kind)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, partial(at_step, 2)),
        (signal.SIGINT, partial(at_step, 2)),
        (signal.SIGUSR1, partial(at_step, 2)),
        (signal.SIGINT, partial(at_evaluation, 2)),
        (signal.SIGTERM, partial(at_file, "checkpoints/*.json", 1)),
        (signal.SIGUSR1, partial(at_file, "evaluator/evaluator.json", 2)),
        (signal.SIGTERM, partial(at_file, "args.json", 1)),  # nothing else is written
    ],
)
def test_every_signal_at_every_stage(tmp_path, quiet, number, moment):
    with moment(send(number)):
        assert run_glue.main(flags(tmp_path / "out")) == 128 + number
    assert not list(tmp_path.rglob(".*"))  # no lock, nothing temporary
    assert_as_if_never_stopped(tmp_path / "out", quiet, "stacked")


def test_a_second_sigint_stops_at_once(tmp_path, monkeypatch, quiet, capsys):
    with at_step(5, send(signal.SIGINT, signal.SIGINT)):
        assert run_glue.main(flags(tmp_path / "out")) == 130
    assert "stopped: at once; to go on: " in capsys.readouterr().err
    assert_as_if_never_stopped(tmp_path / "out", quiet, "stacked")


class Sends:
    """Gets a signal in its destructor, where Python swallows what a handler raises."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_a_destructor_is_not_lost(capfd):
    after = []
    with pytest.raises(Stopped), StopSignals():
        sends = Sends()
        del sends
        after.append("nobody asks")
    assert after
    assert "Exception ignored" not in capfd.readouterr().err


def test_the_callers_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.long
def test_killed_at_random_moments_and_resumed(tmp_path):
    """14 SIGKILLs over a single run and a stack: the end is that of one never killed."""

    def abuse(case):
        folder = tmp_path / case
        folder.mkdir()
        return kill_repeatedly(case, 7, [signal.SIGKILL], folder, random.Random(0))

    with ThreadPoolExecutor() as pool:
        for result in pool.map(abuse, ("single", "stacked")):
            assert result["kills"] == 7
            assert result["differences"] == []


def die_at_second(name, flags, log):
    """Run the command, and end it without a word when a second file of that name is complete."""
    plain, seen = os.replace, []

    def replace(source, target):
        seen.extend([target] * (os.path.basename(target) == name))
        if len(seen) > 1:
            os._exit(9)
        plain(source, target)

    with mock.patch.object(os, "replace", replace):
        run_program(flags, log)


@pytest.mark.parametrize(
    ("ranks", "seeds", "name", "more"),
    [
        (1, "01", "CoLA.tsv", ["-f", "bitfit", "--export-model"]),
        (1, "012", "bias_term_changes.csv", ["-f", "bitfit", "--keep", "best"]),
        (1, "01", "evaluator.json", ["-f", "rand_row_col"]),
        (2, "0123", "CoLA.tsv", ["-f", "bitfit"]),
    ],
    ids=["one pass", "keep best", "one by one", "ranks"],
)
def test_each_start_completes_one_run_more(tmp_path, ranks, seeds, name, more):
    """Each process of a sweep is killed while it writes the files of a second run."""
    flags = [*BASE, *more, "-s", *seeds, "-e", "1", "--train-size", "20", "--resume", "-o"]
    killed, quiet, log = tmp_path / "killed", tmp_path / "quiet", tmp_path / "log"
    starts = len(seeds) // ranks

    def start(work, *args):
        (status,) = {*in_ranks(ranks, work, *args)}
        return status

    statuses = [start(die_at_second, name, [*flags, str(killed)], log) for _ in range(starts)]
    assert statuses == [9] * (starts - 1) + [0], log.read_text()
    assert start(run_program, [*flags, str(quiet)], log) == 0
    assert differences(without_places(quiet), without_places(killed)) == []


def without_places(folder):
    """What a command left; model cards quote the command and so its output folder."""
    return {
        name: content.replace(folder.name.encode(), b"") if name.endswith(".md") else content
        for name, content in output_contents(folder).items()
    }


@pytest.mark.parametrize(
    ("name", "module"), [("AutoTokenizer", "transformers"), ("AutoConfig", "transformers")]
)
def test_a_signal_while_loading_is_no_bad_input(tmp_path, monkeypatch, name, module):
    at_call(monkeypatch, getattr(transformers, name), "from_pretrained", 1, send(signal.SIGUSR1))
    assert run_glue.main(flags(tmp_path / "out")) == 128 + signal.SIGUSR1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_shell_loop_too(quick_python, tmp_path):
    """The process dies of the signal, as shells want it, after its message."""
    command = [sys.executable, str(ROOT / "run_glue.py"), *flags(tmp_path / "out"), "-e", "300"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "out/args.json").exists)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGINT
    assert "stopped: SIGINT; to go on: " in error
    assert "Traceback" not in error
