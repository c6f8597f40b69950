"""What one training works on, and how: all that does not change while it runs."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitfit.data.tasks import Task
from bitfit.data.tokens import Split
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model.forward import Forward
from bitfit.model.token_budget import TokenBudget
from utils import make_generator


@dataclass(frozen=True)
class Plan:
    """What one training works on, and how."""

    task: Task
    forward: Forward
    train: Split
    scored: dict  # {split: Split}
    token_budget: TokenBudget
    batch_size: int  # rows of each run in a step
    epochs: int
    lr_schedule: str = "constant"  # or "linear" down to 0
    warmup_ratio: float = 0.0  # share of all steps over which the learning rate first rises
    evaluation_frequency: int = 1  # score every so many epochs, and after the last
    group: Group = SINGLE_PROCESS  # the processes that train together

    @property
    def rows_per_run(self):
        return len(next(iter(self.train.rows_of_seed.values())))

    @property
    def steps_per_epoch(self):
        return math.ceil(self.rows_per_run / self.batch_size)

    @cached_property
    def factors(self):
        steps = self.epochs * self.steps_per_epoch
        return schedule(self.lr_schedule, round(self.warmup_ratio * steps), steps)

    def room_for_logits(self, runs):
        """What `State.logits` is before the first evaluation."""
        count = math.ceil(self.epochs / self.evaluation_frequency)
        dtype = np.float32 if self.task.is_regression else np.float16
        return {
            name: np.full(
                (count, runs, len(split.tokens.lengths), self.task.num_labels), np.nan, dtype
            )
            for name, split in self.scored.items()
            if name != "train"
        }

    def order(self, run, epoch):
        """A run's own order of its rows in an epoch, the same whatever else happens."""
        rows = self.train.rows_of_seed[run.seed]
        return rows[make_generator(run.seed, f"data order of epoch {epoch}").permutation(len(rows))]


def schedule(kind, warmup_steps, total_steps):
    """The learning rate's factor at each step, (total_steps,): warm-up, then constant or linear."""
    step = np.arange(total_steps, dtype=np.float64)
    falling = (total_steps - step) / max(1, total_steps - warmup_steps)
    factor = falling if kind == "linear" else np.ones(total_steps)
    return np.where(step < warmup_steps, (step + 1) / max(1, warmup_steps), factor)
