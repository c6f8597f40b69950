"""Workers: a worker takes the next unlocked cells and runs their command as a process.

Any number of workers may share a folder. A cell of a killed worker is resumed by the next one.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bitfit import signals
from bitfit.signals import Stopped
from bitfit.study import cell_states, joint_pass, submit
from bitfit.study.cells import Cell, Study
from utils import LOGGER, UserError

PROGRAM = Path(__file__).resolve().parents[2] / "run_glue.py"
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"  # torchrun passes these on to the ranks
STOPPED = {status for n in signals.NUMBERS for status in (128 + n, -n)}
POLL_SECONDS = 5.0
KILLED = "killed (SIGKILL): memory may have run out; give it more, or run fewer workers at once"


def states_to_run(retry_failed: bool) -> set[str]:
    """Return the states of the cells that a worker runs."""
    return {"missing", "interrupted"} | ({"failed"} if retry_failed else set())


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    states: set[str],
    gpu: int | str | None = None,
    shared: bool = True,
    ranks: int = 1,
) -> None:
    """Run the cells that are in one of the given states, in order, once each; some in joint passes.

    Args:
        ranks: ranks of torchrun for each command. A resumed cell keeps its number of ranks.
        shared: whether other workers may work on the same cells.

    Raises:
        Stopped: on a signal; the running cell has written a checkpoint.
        UserError: the cells are shared, and the file system has no locks.
    """
    left = list(cells)
    while cell := next_cell(study, left, states):
        number = cells.index(cell) + 1
        free = joint_pass.free_cells(study, cell, left) if ranks == 1 else [cell]
        with cell_states.lock_cells(study, free, states, shared=shared) as locks:
            locked = [c for c in free if c.name in locks]
            command, trained = joint_pass.choose_command(study, cell, locked)
            left = [c for c in left if c not in trained]
            if cell not in locked:
                continue
            names, runs = ", ".join(c.name for c in trained), sum(c.runs for c in trained)
            LOGGER.info("[%d/%d] %s: %d runs", number, len(cells), names, runs)
            begun = cell_states.read_cell_args(study, command) or {}
            if begun.get("finished") is not True:  # else the worker that ran it was killed
                run_cell(
                    study, command, trained, locks=[*locks.values()], gpu=gpu,
                    ranks=begun.get("ranks") or ranks,
                )  # fmt: skip
            if command is not cell and cell_states.locked_cell_state(study, command) == "done":
                joint_pass.divide(study, command, trained)


def next_cell(study: Study, cells: Sequence[Cell], states: set[str]) -> Cell | None:
    """Return the first cell in one of the states, or None.

    While other workers run the cells that some of these cells start from, it waits.
    """
    while True:
        for cell in cells:
            if cell_states.cell_state(study, cell) in states:
                return cell
        waiting = [cell for cell in cells if cell_states.cell_state(study, cell) == "waiting"]
        sources = [cell_states.source_cell(study, cell) for cell in waiting]
        if "running" not in [cell_states.cell_state(study, source) for source in sources if source]:
            return None
        time.sleep(POLL_SECONDS)


def run_cell(
    study: Study, command: Cell, trained: Sequence[Cell], *,
    locks: Sequence[int], gpu: int | str | None = None, ranks: int = 1,
) -> None:  # fmt: skip
    """Run a command to its end, append its output to its log, and record a failure.

    A command that was stopped by a signal counts as interrupted, one that was killed as failed.

    Args:
        trained: the cell of the command, or the cells that a joint pass trains.
        locks: file descriptors of `cell_states.lock_cell`, which the command inherits.
    """
    log, begin = cell_states.sibling_file(study, command, ".log"), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    for cell in trained:
        cell_states.sibling_file(study, cell, ".failed.json").unlink(missing_ok=True)
        if cell is not command:
            text = f"trained with {', '.join(c.row for c in trained)}: the log is {log}\n"
            with open(cell_states.sibling_file(study, cell, ".log"), "ab") as file:
                file.write(text.encode(errors="backslashreplace"))
    status = run_command(study, command, log, locks=locks, gpu=gpu, ranks=ranks)
    name, took = command.name, f"{(time.monotonic() - begin) / 60:.1f} min"
    if status == 0 and cell_states.locked_cell_state(study, command) == "done":
        LOGGER.info("%s: done in %s", name, took)
    elif status in STOPPED:
        LOGGER.info("%s: stopped by a signal after %s; the next worker resumes it", name, took)
    else:
        line = failure_reason(log, status)
        for cell in trained:
            cell_states.write_failure(study, cell, status, line=line)
        LOGGER.warning("%s: failed with status %d after %s: %s", name, status, took, line)


def run_command(
    study: Study, cell: Cell, log: Path, locks: Sequence[int], gpu: int | str | None, ranks: int
) -> int:
    """Run a cell's command, append its output to a log, and return its exit status.

    Raises:
        Stopped, KeyboardInterrupt: a signal came; the command got the signal too and has ended.
    """
    more = [] if gpu is None else ["--gpu-device", str(gpu)]
    source = cell_states.source_cell(study, cell)
    folder = source and submit.best_run_folder(study, source)
    words = cell.command(study.output, *more, start=folder and folder / "evaluator")
    torchrun = ["-m", "torch.distributed.run", "--standalone", HANDLED, "--nproc-per-node"]
    launcher = [sys.executable, *([*torchrun, str(ranks)] if ranks > 1 else [])]
    command = [*launcher, str(PROGRAM), *words[2:]]
    # The command is no rank of a torchrun that started this process.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(words)}\n".encode(errors="backslashreplace"))
        output.flush()
        # In a new session, Ctrl-C reaches the command only through this process.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=locks, env=environment,
        )  # fmt: skip
        return wait_for([process])[0]


def wait_for(processes: Sequence[subprocess.Popen]) -> list[int]:
    """Return the exit statuses of processes that end.

    Raises:
        Stopped, KeyboardInterrupt: a signal came; the processes got the signal too and have ended.
    """
    try:
        return [process.wait() for process in processes]
    except (Stopped, KeyboardInterrupt) as error:
        for process in processes:
            process.send_signal(getattr(error, "number", signal.SIGINT))
        for process in processes:
            process.wait()
        raise


def check_gpus_for_ranks(ranks: int, gpu: int | str | None) -> None:
    """Raise UserError if two ranks of one command would share a GPU."""
    import torch

    count = torch.cuda.device_count()
    if ranks > 1 and (gpu not in (None, "cpu") or (gpu is None and 0 < count < ranks)):
        raise UserError(
            f"--nproc-per-node {ranks} needs {ranks} GPUs, but this machine has {count}: "
            "leave --gpus out, and give at most the number of GPUs"
        )


def failure_reason(log: Path, status: int) -> str:
    """Return why a command failed: its last line of run_glue.py in the log, else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace").split("$ python ")[-1]
    exit_code = f"exitcode  : {-signal.SIGKILL} "  # torchrun's report of a rank
    if status in (128 + signal.SIGKILL, -signal.SIGKILL) or exit_code in text:
        return KILLED
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    messages = [line for line in lines if line.startswith("run_glue.py: ")]
    return (messages or lines or [""])[-1]


def run_workers(commands: Sequence[Sequence[str]]) -> list[int]:
    """Run one worker process for each command and return their exit statuses.

    The workers share the cores of the machine, unless OMP_NUM_THREADS is set.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    workers = [
        subprocess.Popen([sys.executable, *words], start_new_session=True, env=environment)
        for words in commands
    ]
    return wait_for(workers)
