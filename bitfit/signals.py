"""Stop signals during training."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from bitfit import early
from utils import Stopped

LOGGER = logging.getLogger("bitfit")


class Signals:
    """SIGTERM, SIGINT and SIGUSR1: what users and schedulers send to stop a program.

    At first a signal raises `Stopped` at once. Within `deferred` it is only noted in `received`,
    for the training loop to finish its step; a second SIGINT stops at once even there.
    """

    NUMBERS = early.NUMBERS

    def __init__(self) -> None:
        self.received: int | None = None
        self.waits = False
        self.raised = False  # whether `received` was raised as Stopped

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        self.hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            raise Stopped(self.received)  # a destructor swallowed it, and nobody asked since
        expected = kind is None or issubclass(kind, (Stopped, KeyboardInterrupt))
        if self.received and self.raised and not expected:
            raise Stopped(self.received) from None  # C code made another exception of it

    def _swallowed(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not Stopped:
            self.hook(unraisable)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if not self.waits:
            self.raised = True
            raise Stopped(number)
        LOGGER.info("%s: finishing the step and writing a checkpoint", signal.Signals(number).name)

    @contextmanager
    def deferred(self, waits: bool = True) -> Iterator[None]:
        """Within: a signal waits to be asked for, or raises `Stopped` at once."""
        before, self.waits = self.waits, waits
        try:
            if self.received and not waits:
                raise Stopped(self.received)
            yield
        finally:
            self.waits = before
        if self.received and not before:
            raise Stopped(self.received)  # it came too late for anybody inside to ask
