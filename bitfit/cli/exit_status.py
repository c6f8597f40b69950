"""Map exceptions and signals to a message and an exit status."""

import errno
import signal
from collections.abc import Callable

from bitfit.signals import Stopped, StopSignals, exit_statuses
from utils import (
    CorruptFile,
    Diverged,
    NotPushed,
    RankLost,
    UserError,
    first_line,
    is_machine_error,
    is_out_of_memory,
    write_line,
)


def run_cli(
    program: str,
    work: Callable[[StopSignals], int | None],
    stopped: str = "",
    fault: str = "",
    less_memory: str = "",
    tell: Callable[[str, BaseException, int], None] | None = None,
    is_finished: Callable[[], bool | None] | None = None,
) -> int:
    """A program's exit status: that of `work(signals)`, or with one line where it ended badly.

    Args:
        program: its name.
        stopped, fault: what the line says after the name of the signal, and after the fault.
        less_memory: what needs less memory.
        tell: writes the line, given it, the exception and the status.
        is_finished: whether all is done, so that a signal comes too late to stop anything.
    """
    tell = tell or (lambda line, error, status: write_line(line))
    try:
        with StopSignals() as signals:
            status = work(signals) or 0
            exit_statuses.append(status)
        return status
    except BaseException as error:
        found, message = outcome(error, stopped, fault, less_memory)
        if found is None:
            raise
        status = found
        if status > 128 and is_finished and is_finished():
            status, message = 0, f"finished before {signal.Signals(status - 128).name}"
        exit_statuses.append(status)
        tell(f"{program}: {message}", error, status)
        return status


def outcome(
    error: BaseException, stopped: str, fault: str, less_memory: str
) -> tuple[int | None, str]:
    """(exit status, message) of the exception that ended a program; None: it is a bug."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, (Diverged, NotPushed)):
        return 1, f"stopped: {error}"
    if isinstance(error, Stopped):
        return 128 + error.number, f"stopped: {error}{stopped}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, f"stopped: at once{stopped}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # only input has those
        return 2, f"error: {first_line(error)}: give another name"
    if is_machine_error(error) or isinstance(error, (CorruptFile, RankLost, OSError)):
        memory = f"out of memory{less_memory}: " * is_out_of_memory(error)
        return 1, f"stopped: {memory}{first_line(error)}{fault}"
    return None, ""
