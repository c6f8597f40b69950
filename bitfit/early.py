"""Signals before a program's imports are done, and after its work is: one line, no traceback.

Importing takes seconds, and `utils.Signals` comes after it. So a program calls `catch_signals`
first of all, and this file imports nothing that takes time.
"""

import atexit
import os
import signal
import sys
from contextlib import suppress

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ended = []  # the exit status, once the program's work is done


def catch_signals(program):
    """From now on a signal ends the process: with one line, or as its work ended before."""

    def end_at_once(number, frame):
        if ended:
            die(ended[-1])
        if is_first_rank():
            with suppress(OSError):
                os.write(2, f"{program}: stopped: {signal.Signals(number).name}\n".encode())
        die(128 + number)

    for number in NUMBERS:
        signal.signal(number, end_at_once)
    # The interpreter takes its handlers away in the end: what comes then must not change the
    # status. Registered first, this is the last that is called.
    atexit.register(ignore_signals)


def is_first_rank():
    """Whether this process speaks for all that torchrun started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def ignore_signals():
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def die(status):
    """End the process now; of SIGINT itself where that stopped it, so that a shell loop ends."""
    if status == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def leave(status):
    """End a program with the exit status of its work; as `die`, but in the ordinary way."""
    if status == 128 + signal.SIGINT:
        die(status)
    sys.exit(status)
