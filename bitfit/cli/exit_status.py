"""Map exceptions and signals to a message and an exit status."""

import errno
import signal
from collections.abc import Callable

import utils
from bitfit.signals import Stopped, StopSignals, exit_statuses


def run_cli(
    program: str,
    work: Callable[[StopSignals], int | None],
    after_signal: str = "",
    after_error: str = "",
    less_memory: str = "",
    write_message: Callable[[str, BaseException, int], None] | None = None,
    is_finished: Callable[[], bool | None] | None = None,
) -> int:
    """Do a program's work and return its exit status; write one line if it failed or was stopped.

    Args:
        program: the name at the beginning of the line.
        work: gets the stop signals and returns an exit status, or None for 0.
        after_signal: text after the name of a signal.
        after_error: text after an error of the machine.
        less_memory: advice how to need less memory, after "out of memory".
        write_message: writes the line; gets the line, the exception and the exit status.
        is_finished: returns whether all files are complete, so that a signal came too late.
    """
    write_message = write_message or (lambda line, error, status: utils.write_line(line))
    try:
        with StopSignals() as signals:
            status = work(signals) or 0
            exit_statuses.append(status)
        return status
    except BaseException as error:
        found, message = outcome(error, after_signal, after_error, less_memory=less_memory)
        if found is None:
            raise
        status = found
        if status > 128 and is_finished and is_finished():
            status, message = 0, f"finished before {signal.Signals(status - 128).name}"
        exit_statuses.append(status)
        write_message(f"{program}: {message}", error, status)
        return status


def outcome(
    error: BaseException, after_signal: str, after_error: str, less_memory: str
) -> tuple[int | None, str]:
    """Return the exit status and the message for an exception; the status of a bug is None."""
    if isinstance(error, utils.UserError):
        return 2, f"error: {error}"
    if isinstance(error, (utils.Diverged, utils.NotPushed)):
        return 1, f"stopped: {error}"
    if isinstance(error, Stopped):
        return 128 + error.number, f"stopped: {error}{after_signal}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, f"stopped: at once{after_signal}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        # Only the user gives such names.
        return 2, f"error: {utils.first_line(error)}: give another name"
    is_known = isinstance(error, (utils.CorruptFile, utils.RankLost, OSError))
    if is_known or utils.is_machine_error(error):
        memory = f"out of memory{less_memory}: " * utils.is_out_of_memory(error)
        return 1, f"stopped: {memory}{utils.first_line(error)}{after_error}"
    return None, ""
