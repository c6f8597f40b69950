"""Interruption, resume and faults: nothing is lost, nothing half-done looks finished."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from conftest import GLUE, ROOT, TINY_BERT
from interruption import differences, kill_repeatedly, output_contents
from moments import at_evaluation, at_file, at_step, send
from processes import in_ranks, run_program

import run_glue
import utils
from bitfit import files, output_paths
from bitfit import options as flags_of_program
from bitfit.cli import experiment
from bitfit.model import forward
from bitfit.signals import Stopped, StopSignals
from bitfit.training.checkpoints import list_checkpoints

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


@pytest.fixture(scope="module")
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


# StopSignals


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
    facts = json.loads(newest.read_text())
    assert (facts["epoch"], facts["step"]) == (1, 2)
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


# Kills


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

    os.replace = replace
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


# Faults


class Writes:
    """Counts the files and folders that are written, and fails at one of them."""

    def __init__(self, patch, failing=None, number=errno.ENOSPC):
        self.count, self.plain = 0, files.sync_to_disk

        def sync_to_disk(path):
            self.count += 1
            if self.count == failing:
                raise OSError(number, os.strerror(number), str(path))
            self.plain(path)

        patch.setattr(files, "sync_to_disk", sync_to_disk)


@pytest.mark.parametrize("kind", ["stacked", "one by one"])
def test_a_full_disk_at_any_file_loses_nothing(tmp_path, monkeypatch, quiet, kind, capsys):
    """The disk is full at one write after the other; each time room is made and it goes on."""
    with monkeypatch.context() as patch:
        counted = Writes(patch)
        assert run_glue.main(flags(tmp_path / "count", kind)) == 0
    assert counted.count > 40
    # Each failure leaves some progress, so a few commands meet all kinds of files.
    folder, failing = tmp_path / "out", 1
    for _ in range(counted.count):
        with monkeypatch.context() as patch:
            Writes(patch, failing)
            status = run_glue.main([*flags(folder, kind), "--resume"])
        if status == 0:
            break
        assert status == 1
        lines = capsys.readouterr().err.splitlines()
        assert "stopped: [Errno 28] No space left on device: " in lines[-1]
        assert lines[-1].endswith("--resume")
        assert not list(folder.rglob(".*"))
        failing += 7
    assert status == 0
    assert failing > 30
    assert differences(quiet(kind), output_contents(folder)) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_other_write_errors(tmp_path, monkeypatch, quiet, number, capsys):
    with monkeypatch.context() as patch:
        Writes(patch, 30, number)
        assert run_glue.main(flags(tmp_path / "out")) == 1
    assert f"[Errno {number}] {os.strerror(number)}: " in capsys.readouterr().err.splitlines()[-1]
    assert_as_if_never_stopped(tmp_path / "out", quiet, "stacked")


def test_a_file_system_that_takes_no_more_in_the_middle_of_a_file(tmp_path):
    """For real: the system refuses to write beyond 60,000 bytes of any file."""
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv.pop(1));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "import run_glue; sys.exit(run_glue.main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), *flags(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("checkpoints/*"))
    assert not list((tmp_path / "out").rglob(".*"))


def test_an_output_folder_that_vanishes(tmp_path, monkeypatch, capsys):
    with at_evaluation(2, lambda: shutil.rmtree(tmp_path / "out")):
        assert run_glue.main(flags(tmp_path / "out")) == 1
    assert "No such file or directory" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("could not create a primitive"),
        MemoryError("no room"),
    ],
    ids=["cuda", "cpu", "cuda library", "oneDNN", "python"],
)
def test_no_memory_at_all(tmp_path, monkeypatch, quiet, error, capsys):
    """Where halving the passes does not help: one line, and the checkpoint before it."""

    def fail():
        def always(*args):
            raise error

        patch.setattr(forward.Forward, "__call__", always)

    with monkeypatch.context() as patch, at_step(5, fail):
        assert run_glue.main(flags(tmp_path / "out")) == 1
    assert "stopped: out of memory (a lower --max-tokens" in capsys.readouterr().err
    assert_as_if_never_stopped(tmp_path / "out", quiet, "stacked")


def test_a_bug_is_not_hidden(tmp_path):
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"), at_step(1, fail):
        run_glue.main(flags(tmp_path / "out"))


def test_two_processes_on_one_folder(tmp_path, monkeypatch, capsys):
    """Also if the first was killed."""
    folder = tmp_path / "out"
    with at_step(2, send(signal.SIGTERM)):
        run_glue.main(flags(folder))
    before = output_contents(folder)
    with output_paths.lock_folder(folder):
        assert run_glue.main([*flags(folder), "--resume"]) == 2
        assert "is in use by another process" in capsys.readouterr().err.splitlines()[-1]
        (folder / ".lock").unlink()
        after = output_contents(folder)
    assert differences(before, after) == []
    (folder / ".lock").touch()  # what a killed process leaves
    assert run_glue.main([*flags(folder), "--resume"]) == 0
    assert not (folder / ".lock").exists()


# Resume: what is refused, and what is not


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    with at_step(5, send(signal.SIGTERM)):
        run_glue.main(flags(tmp_path / "out"))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-l", "1e-3", "2e-3"], "--learning-rate was 0.001 0.004 and is now 0.001 0.002"),
        (["-s", "0", "2"], "--seed was 0 and is now 0 2"),
        (["-e", "4"], "--epochs was 3 and is now 4"),
        (["-b", "8", "--optimizer", "adam"], "--batch-size was 16 and is now 8; --optimizer was"),
        (["-t", "sst2"], "--task-name was cola and is now sst2"),
        (["-f", "frozen"], "--fine-tune-type was bitfit and is now frozen"),
        (["--bias-terms", "query"], "--bias-terms was None and is now query"),
        (["--export-model"], "--export-model was False and is now True"),
        (["--precision", "bf16"], "--precision was fp32 and is now bf16"),
    ],
)
def test_resume_refuses_other_flags(interrupted, more, message, capsys):
    before = output_contents(interrupted)
    assert run_glue.main([*flags(interrupted), "--resume", *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--resume: this is not the interrupted run: " in last
    assert message in last
    assert differences(before, output_contents(interrupted)) == []


def test_resume_refuses_other_data_and_another_base(interrupted, tmp_path, capsys):
    shutil.copytree(GLUE / "CoLA", tmp_path / "glue" / "CoLA")
    dev = tmp_path / "glue" / "CoLA" / "dev.tsv"
    dev.write_text(dev.read_text().replace("\t1\t", "\t0\t", 1))
    other = ["--data-dir", str(tmp_path / "glue")]
    assert run_glue.main([*flags(interrupted), "--resume", *other]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("run: the data changed: give that again, or a new folder")
    )
    model = transformers.AutoModel.from_pretrained(TINY_BERT)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(tmp_path / "model")
    other = ["--model-name", str(tmp_path / "model")]
    assert run_glue.main([*flags(interrupted), "--resume", *other]) == 2
    assert "run: the base model changed" in capsys.readouterr().err.splitlines()[-1]


def test_resume_refuses_other_test_rows(interrupted, tmp_path, capsys):
    """Runs that have their predictions already would be of other rows than the rest."""
    shutil.copytree(GLUE / "CoLA", tmp_path / "glue" / "CoLA")
    path = tmp_path / "glue/CoLA/test.tsv"
    *rows, last = path.read_text().splitlines()
    path.write_text("\n".join([*rows, f"{last} indeed", ""]))
    other = ["--data-dir", str(tmp_path / "glue")]
    assert run_glue.main([*flags(interrupted), "--resume", *other]) == 2
    assert "run: the test data changed: give that" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "layer_norm_eps", 1e-3,
         "the base model's config changed (layer_norm_eps was 1e-12 and is now 0.001)"),
        ("tokenizer_config.json", "do_lower_case", False,
         "the base model's tokenizer changed (normalizer)"),
    ],
)  # fmt: skip
def test_resume_refuses_another_config_or_tokenizer(
    interrupted, tmp_path, file, key, value, message, capsys
):
    model = shutil.copytree(TINY_BERT, tmp_path / "model")
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(content | {key: value}))
    before = output_contents(interrupted)
    assert run_glue.main([*flags(interrupted), "--resume", "--model-name", str(model)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"not the interrupted run: {message}: give that again, or a new folder")
    assert differences(before, output_contents(interrupted)) == []


def test_what_was_begun_without_fingerprints_goes_on_with_a_line(interrupted, quiet, caplog):
    args = json.loads((interrupted / "args.json").read_text())
    del args["model_config"], args["tokenizer"], args["test_sha256"]
    (interrupted / "args.json").write_text(json.dumps(args))
    assert_as_if_never_stopped(interrupted, quiet, "stacked")
    assert caplog.text.count("they cannot be verified") == 1


def test_a_moved_folder_and_the_same_data_elsewhere_resume(interrupted, tmp_path, quiet):
    shutil.move(interrupted, tmp_path / "moved")
    shutil.copytree(GLUE / "CoLA", tmp_path / "glue" / "CoLA")
    argv = [*flags(tmp_path / "moved"), "--resume", "--data-dir", str(tmp_path / "glue")]
    assert run_glue.main(argv) == 0
    found, expected = output_contents(tmp_path / "moved"), quiet("stacked")
    differ = differences(expected, found)
    assert all(name.endswith(("args.json", "evaluator.json")) for name in differ)  # they name it


def test_a_finished_run_says_so(tmp_path, capsys, monkeypatch):
    assert run_glue.main([*flags(tmp_path / "out"), "--resume"]) == 0  # nothing there: it starts
    assert not (tmp_path / "out/checkpoints").exists()
    before = output_contents(tmp_path / "out")
    (tmp_path / "out/.lock").touch()  # the process was killed after its last file
    capsys.readouterr()
    monkeypatch.setattr(experiment, "prepare_evaluator", None)  # not even loaded
    assert run_glue.main([*flags(tmp_path / "out"), "--resume"]) == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert output_contents(tmp_path / "out") == before


@pytest.mark.parametrize("more", [["-m", "roberta-base"], ["--data-dir", "x"], ["--export-model"]])
def test_a_finished_run_is_not_taken_for_another(tmp_path, more, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    args = flags_of_program.parse_args("", flags(folder))
    facts = vars(args) | {"precision": "fp32", "finished": True}
    (folder / "args.json").write_text(json.dumps(facts))
    assert run_glue.main([*flags(folder), "--resume"]) == 0
    assert run_glue.main([*flags(folder), "--resume", *more]) == 2
    assert {"-m": "--model-name"}.get(more[0], more[0]) + " was " in (capsys.readouterr().err)


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"finished": false, "precision": "fp32"}')
    (tmp_path / ".notes.tmp").write_text("mine")
    assert run_glue.main([*flags(tmp_path), "--resume"]) == 2
    assert "was begun by another version of this program" in capsys.readouterr().err
    facts = {"finished": False, "precision": "fp32", "format": utils.FORMAT}
    (tmp_path / "args.json").write_text(json.dumps(facts))
    assert run_glue.main([*flags(tmp_path), "--resume"]) == 2
    assert "args.json there does not say " in capsys.readouterr().err.splitlines()[-1]
    files.remove_temporaries(tmp_path)
    assert (tmp_path / ".notes.tmp").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fails(self, **options):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", fails)
    with output_paths.lock_folder(tmp_path):
        assert "cannot be locked here: start no second process on it" in caplog.text


def test_what_another_version_began_is_refused(interrupted, capsys):
    args = json.loads((interrupted / "args.json").read_text())
    (interrupted / "args.json").write_text(json.dumps(args | {"format": 1}))
    assert run_glue.main([*flags(interrupted), "--resume"]) == 2
    assert "was begun by another version of this program" in capsys.readouterr().err


def test_another_process_was_faster(tmp_path, monkeypatch, capsys):
    """It begins and ends while this one still loads: what it left counts."""
    folder = tmp_path / "out"
    plain = experiment.prepare_evaluator

    def slow(*args):
        evaluator = plain(*args)
        monkeypatch.setattr(experiment, "prepare_evaluator", plain)
        assert run_glue.main([*flags(folder), "--resume"]) == 0
        return evaluator

    monkeypatch.setattr(experiment, "prepare_evaluator", slow)
    assert run_glue.main([*flags(folder), "--resume"]) == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    assert json.loads((folder / "args.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("name", "module"), [("AutoTokenizer", "transformers"), ("AutoConfig", "transformers")]
)
def test_a_signal_while_loading_is_no_bad_input(tmp_path, monkeypatch, name, module):
    at_call(monkeypatch, getattr(transformers, name), "from_pretrained", 1, send(signal.SIGUSR1))
    assert run_glue.main(flags(tmp_path / "out")) == 128 + signal.SIGUSR1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    ],
)
def test_a_machine_without_threads_is_no_bad_model(tmp_path, monkeypatch, capsys, error):
    def fail():
        raise error

    at_call(monkeypatch, transformers.AutoTokenizer, "from_pretrained", 1, fail)
    assert run_glue.main(flags(tmp_path / "out")) == 1
    assert f"run_glue.py: stopped: {utils.first_line(error)}; " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_shell_loop_too(tmp_path):
    """The process dies of the signal, as shells want it, after its message."""
    script = (
        "import os, runpy, signal, sys; sys.argv[0] = sys.argv.pop(1);"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]));"
        "import run_glue as module; import bitfit.options as flags;"
        "plain = flags.parse_args;"
        "flags.parse_args = lambda *a: (plain(*a), signal.setitimer(signal.ITIMER_REAL, 1))[0];"
        "signal.signal(signal.SIGALRM, lambda *a: os.kill(os.getpid(), signal.SIGINT));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "run_glue.py"), *flags(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == -signal.SIGINT
    assert "stopped: SIGINT; to go on: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"finished": []}', '"finished"'])
def test_a_folder_that_is_not_ours(tmp_path, content, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    if content is not None:
        (tmp_path / "out/args.json").write_text(content)
    status = run_glue.main([*flags(tmp_path / "out"), "--resume"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert last.startswith("run_glue.py: error: --resume: ")
    assert (tmp_path / "out/thesis.tex").read_text() == "mine"


# Checkpoints


@pytest.mark.parametrize(
    ("every", "minutes", "numbers"), [(1, None, [2, 3]), (2, None, [1, 2]), (0, None, []),
                                      (0, 1e-9, [8, 9])]
)  # fmt: skip
def test_when_checkpoints_are_written(tmp_path, monkeypatch, every, minutes, numbers):
    """Every so many epochs and after the last; by minutes within one; two are kept."""
    kept = []
    monkeypatch.setattr(
        "shutil.rmtree", lambda path, **options: kept.append(list_checkpoints(path))
    )
    more = ["--checkpoint-every", str(every)]
    more += ["--checkpoint-minutes", str(minutes or 1e9)]
    assert run_glue.main([*flags(tmp_path / "out", "bitfit"), *more]) == 0
    assert kept == [numbers]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    interrupted, suffix, quiet, caplog, capsys
):
    newest = sorted((interrupted / "checkpoints").glob(f"*{suffix}"))[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    assert_as_if_never_stopped(interrupted, quiet, "stacked")
    assert f"{newest.stem}.json is damaged" in caplog.text
    assert "the one before it is tried" in caplog.text


def test_when_all_are_damaged(interrupted, capsys):
    for path in (interrupted / "checkpoints").glob("*.json"):
        path.write_text("{}")
    before = output_contents(interrupted)
    assert run_glue.main([*flags(interrupted), "--resume"]) == 1
    assert "no checkpoint in " in capsys.readouterr().err.splitlines()[-1]
    assert differences(before, output_contents(interrupted)) == []
