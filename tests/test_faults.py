"""Full disks, missing memory, threads or locks: one line, and nothing half-done looks finished."""

import errno
import os
import resource
import shutil

import pytest
import torch
import transformers
from interruption import differences, output_contents
from moments import at_evaluation, at_passes, at_step
from processes import run_program, start_process
from resumable import assert_as_if_never_stopped, at_call, flags

import run_glue
import utils
from bitfit import output_paths


class Writes:
    """Counts the files and folders that are written, and fails at one of them."""

    def __init__(self, patch, failing=None, number=errno.ENOSPC):
        self.count, plain = 0, os.fsync

        def fsync(descriptor):
            self.count += 1
            if self.count == failing:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                raise OSError(number, os.strerror(number), path)
            plain(descriptor)

        patch.setattr(os, "fsync", fsync)


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
        assert "stopped: No space left on device: " in lines[-1]
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
    assert f"{os.strerror(number)}: " in capsys.readouterr().err.splitlines()[-1]
    assert_as_if_never_stopped(tmp_path / "out", quiet, "stacked")


def run_with_short_files(flags, log):
    """Run the command; the system refuses to write beyond 60,000 bytes of any file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    run_program(flags, log)


def test_a_file_system_that_takes_no_more_in_the_middle_of_a_file(tmp_path):
    process = start_process(run_with_short_files, flags(tmp_path / "out"), tmp_path / "log")
    process.join()
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 1
    assert "Traceback" not in log
    assert "File too large" in log.splitlines()[-1]
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
def test_no_memory_at_all(tmp_path, quiet, error, capsys):
    """Where halving the passes does not help: one line, and the checkpoint before it."""

    failing: list[int] = []

    def fail(number, ids):
        if failing:
            raise error

    with at_step(5, lambda: failing.append(5)), at_passes(fail):
        assert run_glue.main(flags(tmp_path / "out")) == 1
    assert "stopped: out of memory (a lower --max-tokens" in capsys.readouterr().err
    assert_as_if_never_stopped(tmp_path / "out", quiet, "stacked")


def test_a_bug_is_not_hidden(tmp_path):
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"), at_step(1, fail):
        run_glue.main(flags(tmp_path / "out"))


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fails(self, **options):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", fails)
    with output_paths.lock_folder(tmp_path):
        assert "cannot be locked here: start no second process on it" in caplog.text


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
