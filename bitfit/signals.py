"""Stop signals, from a program's first import to the end of its process.

A program calls `catch_signals` before its other imports, which take seconds. During its work
`StopSignals` raises `Stopped` instead. So this module imports only fast modules.
"""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Self

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # sent by users and schedulers
exit_statuses: list[int] = []  # the exit status, once the program's work is done


class Stopped(BaseException):
    """A signal asked the program to stop; `number` is the signal's.

    Like KeyboardInterrupt it is no Exception, so that handlers of errors do not catch it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context manager in which SIGTERM, SIGINT and SIGUSR1 raise `Stopped`.

    Within `deferred` a signal is only stored in `received`, so that the training loop can finish
    the current step. A second SIGINT raises KeyboardInterrupt at once even there.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferred = False
        self.raised = False  # whether `received` was raised as Stopped

    def __enter__(self) -> Self:
        self.saved_handlers = {number: signal.signal(number, self._handle) for number in NUMBERS}
        self.saved_hook, sys.unraisablehook = sys.unraisablehook, self._handle_unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        sys.unraisablehook = self.saved_hook
        for number, handler in self.saved_handlers.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            raise Stopped(self.received)  # A destructor swallowed it and nobody checked since.
        expected = kind is None or issubclass(kind, (Stopped, KeyboardInterrupt))
        if self.received and self.raised and not expected:
            raise Stopped(self.received) from None  # C code replaced it by another exception.

    def _handle_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not Stopped:
            self.saved_hook(unraisable)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if not self.is_deferred:
            self.raised = True
            raise Stopped(number)
        import logging  # not at the top: this module is imported before signals are caught

        name = signal.Signals(number).name
        logging.getLogger("bitfit").info("%s: finishing the step and writing a checkpoint", name)

    @contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """Store a signal in `received` within the context; with `defer=False` raise it again."""
        saved, self.is_deferred = self.is_deferred, defer
        try:
            if self.received and not defer:
                raise Stopped(self.received)
            yield
        finally:
            self.is_deferred = saved
        if self.received and not saved:
            raise Stopped(self.received)  # The signal came after the last check in the context.


def catch_signals(program: str) -> None:
    """Let a signal end the process with one line, or with the exit status of finished work.

    Also select Matplotlib's file backend: the one configured for a notebook or a display may be
    missing here.
    """
    os.environ["MPLBACKEND"] = "agg"

    def end_process(number: int, frame: FrameType | None) -> None:
        if exit_statuses:
            exit_at_once(exit_statuses[-1])
        if is_first_rank():
            with suppress(OSError):
                os.write(2, f"{program}: stopped: {signal.Signals(number).name}\n".encode())
        exit_at_once(128 + number)

    for number in NUMBERS:
        signal.signal(number, end_process)
    # At exit the interpreter restores the default handlers, and a late signal would change the
    # status. This is registered first, so it is called last.
    atexit.register(ignore_signals)


def is_first_rank() -> bool:
    """Return whether this process is the only one of its command, or rank 0 of torchrun."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def ignore_signals() -> None:
    """Ignore stop signals from now on."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def exit_at_once(status: int) -> NoReturn:
    """End the process without exit handlers; for SIGINT by that signal, so that shell loops end."""
    if status == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def exit_with_status(status: int) -> NoReturn:
    """End the process with an exit status; for SIGINT by that signal, so that shell loops end."""
    if status == 128 + signal.SIGINT:
        exit_at_once(status)
    sys.exit(status)
