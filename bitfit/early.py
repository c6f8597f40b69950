"""Handle signals while a program imports its modules and after its work: one line, no traceback.

Imports take seconds, and `bitfit.signals.Signals` is available only after them. So a program calls
`catch_signals` first, and this file imports only fast modules.
"""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ended: list[int] = []  # the exit status, once the program's work is done


def catch_signals(program: str) -> None:
    """Let signals end the process: with one line, or with the exit status of its finished work.

    Pictures are drawn into files: what a notebook or a display chose for them may be absent here.
    """
    os.environ["MPLBACKEND"] = "agg"

    def end_at_once(number: int, frame: FrameType | None) -> None:
        if ended:
            die(ended[-1])
        if is_first_rank():
            with suppress(OSError):
                os.write(2, f"{program}: stopped: {signal.Signals(number).name}\n".encode())
        die(128 + number)

    for number in NUMBERS:
        signal.signal(number, end_at_once)
    # At exit the interpreter restores the default handlers, and a late signal would change the
    # status. This is registered first, so it is called last.
    atexit.register(ignore_signals)


def is_first_rank() -> bool:
    """Whether this process is alone, or is rank 0 of torchrun."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def ignore_signals() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def die(status: int) -> NoReturn:
    """End the process now, after SIGINT by SIGINT itself, so that a shell loop ends too."""
    if status == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def leave(status: int) -> NoReturn:
    """End a program with the exit status of its work, as `die` does, but run exit handlers."""
    if status == 128 + signal.SIGINT:
        die(status)
    sys.exit(status)
