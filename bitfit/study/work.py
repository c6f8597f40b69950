"""Workers: each takes the next cell that nobody holds, and runs its command as a process.

Any number of them may work on one folder. What one leaves when it is killed, the next goes on with.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bitfit.signals import Signals
from bitfit.study import ledger
from utils import Stopped, UserError

LOGGER = logging.getLogger("bitfit")
PROGRAM = Path(__file__).resolve().parents[2] / "run_glue.py"
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"  # of torchrun: passed on to the ranks
STOPPED = {status for n in Signals.NUMBERS for status in (128 + n, -n)}
KILLED = {128 + signal.SIGKILL, -signal.SIGKILL}  # as the kernel does where memory runs out
NO_PROGRESS = (
    "killed (SIGKILL) twice without progress in between: memory may have run out; give it more, "
    "or run fewer workers at once"
)


# The environment's names of a process's number, how many there are, the first number, the step.
NUMBERS = (
    [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")],
    ["RANK", "WORLD_SIZE", "no first", "no step"],
)


def shard_of(word, environment=os.environ):
    """`3/8` -> (2, 8): which part of the cells; "" reads SLURM's array or torchrun's rank.

    Raises:
        UserError: it is not such a part, or the environment says nothing.
    """
    for own, count, first, step in NUMBERS:
        if not word and own in environment and count in environment:
            past = int(environment[own]) - int(environment.get(first, 0))
            word = f"{past // int(environment.get(step, 1)) + 1}/{environment[count]}"
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        what = "give --shard I/N with 1 <= I <= N, or SLURM_ARRAY_TASK_ID, or RANK and WORLD_SIZE"
        raise UserError(f"{word!r} is no part of a whole: {what}")
    return int(match[1]) - 1, int(match[2])


def takes(retry_failed):
    """The states of cells that a worker takes."""
    return {"missing", "interrupted"} | ({"failed"} if retry_failed else set())


def work(study, cells, states, gpu=None, shared=True, ranks=1):
    """Run what is in some states of some cells, in their order.

    Args:
        ranks: of torchrun, for each command; what was begun with another number goes on with that.
        shared: whether others may work on the same cells.

    Raises:
        Stopped: a signal came; the cell at work has written a checkpoint.
        UserError: they may, and the file system has no locks.
    """
    for number, cell in enumerate(cells, 1):
        if ledger.state_of(study, cell) not in states:
            continue
        with ledger.taken(study, cell, shared) as lock:
            # What it was may have changed before it was taken.
            if lock is None or ledger.state_of_taken(study, cell) not in states:
                continue
            LOGGER.info("[%d/%d] %s: %d runs", number, len(cells), cell.name, cell.runs)
            run(study, cell, lock, gpu, (ledger.args_of(study, cell) or {}).get("ranks") or ranks)


def run(study, cell, lock, gpu=None, ranks=1):
    """Run a cell's command to its end, output to its log; what fails is noted.

    What a signal ended counts as interrupted; but SIGKILL twice without progress is a failure.

    Args:
        lock: the file of `ledger.taken`.
    """
    more = [] if gpu is None else ["--gpu-device", str(gpu)]
    log, begin = ledger.beside(study, cell, ".log"), time.monotonic()
    command = [*launcher(ranks), str(PROGRAM), *cell.command(study.output, *more)[2:]]
    ledger.forget_failure(study, cell)
    with open(log, "ab") as output:
        output.write(f"$ {cell.shell(study.output)}\n".encode(errors="backslashreplace"))
        output.flush()
        # In a session of its own a Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=(lock,), env=own_environment(),
        )  # fmt: skip
        try:
            status = process.wait()
        except (Stopped, KeyboardInterrupt) as error:
            process.send_signal(getattr(error, "number", 2))
            process.wait()
            raise
    took = f"{(time.monotonic() - begin) / 60:.1f} min"
    line = last_line(log)
    killed = status in KILLED or (status and ranks > 1 and a_rank_was_killed(log))
    stuck = killed and ledger.note_kill(study, cell)
    if not killed or stuck:
        ledger.forget_kill(study, cell)
    if status == 0 and ledger.state_of_taken(study, cell) == "done":
        LOGGER.info("%s: done in %s", cell.name, took)
    elif status in STOPPED or (killed and not stuck):
        LOGGER.info("%s: stopped by a signal after %s; the next worker goes on", cell.name, took)
    else:
        line = NO_PROGRESS if stuck else line
        ledger.note_failure(study, cell, status, line)
        LOGGER.warning("%s: failed with status %d after %s: %s", cell.name, status, took, line)


def check_ranks(ranks, gpu):
    """UserError where so many ranks of one command would have no GPU each."""
    import torch

    count = torch.cuda.device_count()
    if ranks > 1 and (gpu not in (None, "cpu") or (gpu is None and 0 < count < ranks)):
        what = f"--nproc-per-node {ranks} needs as many GPUs, here are {count}"
        raise UserError(f"{what}: leave --gpus out, and give as many as there are")


def launcher(ranks):
    """What starts the program."""
    if ranks == 1:
        return [sys.executable]
    options = ["--standalone", HANDLED, "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def own_environment():
    """This process's, for a command that is no rank of the torchrun that may have started it."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}


def last_line(path):
    """The last that the program said of its end; or what is last there."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("$ python ")[-1].split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    said = [line for line in lines if line.startswith("run_glue.py: ")]
    return (said or lines or [""])[-1]


def a_rank_was_killed(path):
    """Whether torchrun's last report in a log says that SIGKILL ended a rank."""
    text = path.read_text(encoding="utf-8", errors="replace").split("$ python ")[-1]
    return f"exitcode  : {-signal.SIGKILL} " in text


def work_on(commands):
    """A worker process for each list of words; returns their exit statuses.

    They share the machine's cores, unless OMP_NUM_THREADS says otherwise.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    workers = [
        subprocess.Popen([sys.executable, *words], start_new_session=True, env=environment)
        for words in commands
    ]
    try:
        return [worker.wait() for worker in workers]
    except (Stopped, KeyboardInterrupt) as error:
        for worker in workers:
            worker.send_signal(getattr(error, "number", 2))
        for worker in workers:
            worker.wait()
        raise
