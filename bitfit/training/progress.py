"""How far a training is: a bar on a terminal, a line every few minutes in a log file."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bitfit.training.plan import Plan

if TYPE_CHECKING:
    from bitfit.training.loop import TrainState

LOGGER = logging.getLogger("bitfit")
TELL_SECONDS = 120  # between two lines, where there is no bar


class Progress:
    """Of all runs of a `bitfit.training.plan.Plan` together, in rows."""

    def __init__(
        self, plan: Plan, runs: int = 1, done: int = 0, shows: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """
        Args:
            runs: how many train together.
            done: rows that were trained before.
            shows: whether there is anybody to look.
            clock: returns the seconds that decide when the loss is read.
        """
        self.plan, self.runs, self.done = plan, runs, done
        self.total = plan.epochs * plan.rows_per_run * runs
        what = f"{plan.task.name}, {runs} runs" if runs > 1 else plan.task.name
        self.bar = tqdm(total=self.total, initial=done, unit="ex", desc=what,
                        disable=None if shows else True)  # fmt: skip
        self.tells = shows and self.bar.disable  # standard error is no terminal
        self.first, self.begin = done, time.monotonic()
        self.told = self.begin
        self.clock = clock
        self.looked = clock()  # epochs may be shorter than the time between two looks

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within: log lines do not break the bar."""
        with logging_redirect_tqdm(), self.bar:
            yield

    def update(self, rows: int) -> None:
        self.done += rows
        self.bar.update(rows)

    def look(self, state: "TrainState", loss: float) -> None:
        """Show what there is to see.

        Args:
            loss: the mean of the last step.
        """
        best = best_score(state)
        said = {"epoch": f"{state.epoch + 1}/{self.plan.epochs}", "loss": f"{loss:.3f}"}
        said |= {"best": f"{100 * best:.1f}"} if best is not None else {}
        self.bar.set_postfix(said, refresh=False)
        if self.tells and time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            rate = (self.done - self.first) / (self.told - self.begin)
            left = tqdm.format_interval((self.total - self.done) / rate)
            said["step"] = f"{state.step}/{self.plan.steps_per_epoch}"
            words = "  ".join(f"{name} {value}" for name, value in said.items())
            LOGGER.info("%s  %.0f ex/s  %s left", words, rate, left)


def best_score(state: "TrainState") -> float | None:
    """The best main score of all runs so far, or None."""
    task = state.plan.task
    main = task.validation_splits[0], task.metrics[0]
    return max((value for *_, split, metric, value in state.scores if (split, metric) == main),
               default=None)  # fmt: skip
