"""Progress of a training: a bar on a terminal, a line every few minutes in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bitfit.training.plan import Plan
from utils import LOGGER

if TYPE_CHECKING:
    from bitfit.training.loop import TrainState

LOG_SECONDS = 120  # between two lines if there is no bar


class Progress:
    """The progress of all runs of a plan together, in training examples."""

    def __init__(
        self, plan: Plan, runs: int = 1, done: int = 0, shows: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """
        Args:
            runs: number of runs that train together.
            done: training examples of steps before this process.
            shows: show the bar or log lines; only one rank does.
            clock: returns the seconds that decide when the loss is read.
        """
        self.plan, self.runs, self.done = plan, runs, done
        self.total = plan.epochs * plan.rows_per_run * runs
        title = f"{plan.task.name}, {runs} runs" if runs > 1 else plan.task.name
        self.bar = tqdm(total=self.total, initial=done, unit="ex", desc=title,
                        disable=None if shows else True)  # fmt: skip
        self.logs = shows and self.bar.disable  # standard error is not a terminal
        self.first, self.begin = done, time.monotonic()
        self.logged_at = self.begin
        self.clock = clock
        self.read_at = clock()  # epochs may be shorter than the time between two readings

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, and write log lines above it."""
        with logging_redirect_tqdm(), self.bar:
            yield

    def expect(self, rows: int) -> None:
        """Set the number of training examples that are left, fewer if runs have ended."""
        self.total = self.bar.total = self.done + rows

    def update(self, rows: int) -> None:
        """Count training examples of a finished step."""
        self.done += rows
        self.bar.update(rows)

    def show(self, state: "TrainState", loss: float) -> None:
        """Show epoch, loss and best score; log them if it is time to.

        Args:
            loss: mean loss of the last step.
        """
        best = best_score(state)
        values = {"epoch": f"{state.epoch + 1}/{self.plan.epochs}", "loss": f"{loss:.3f}"}
        values |= {"best": f"{100 * best:.1f}"} if best is not None else {}
        self.bar.set_postfix(values, refresh=False)
        if self.logs and time.monotonic() - self.logged_at > LOG_SECONDS:
            self.logged_at = time.monotonic()
            rate = (self.done - self.first) / (self.logged_at - self.begin)
            left = tqdm.format_interval((self.total - self.done) / rate)
            values["step"] = f"{state.step}/{self.plan.steps_per_epoch}"
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            LOGGER.info("%s  %.0f ex/s  %s left", text, rate, left)


def best_score(state: "TrainState") -> float | None:
    """Return the best main score of all runs so far, or None before the first evaluation."""
    task = state.plan.task
    main = task.validation_splits[0], task.metrics[0]
    return max((value for *_, split, metric, value in state.scores if (split, metric) == main),
               default=None)  # fmt: skip
