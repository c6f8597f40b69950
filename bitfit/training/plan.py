"""The plan of one training: everything that does not change while it runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitfit.data.tasks import Task
from bitfit.data.tokens import Split
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.halving_checks import halving_problem
from bitfit.model.batching import count_labels
from bitfit.model.forward import Forward
from bitfit.model.run import Run
from bitfit.model.token_budget import TokenBudget
from bitfit.parsing import POSITIVE, RATIO, check_values
from utils import UserError, make_generator


@dataclass(frozen=True)
class TrainOptions:
    """How long and how to train, how often to evaluate, and which epoch to keep."""

    batch_size: int  # training examples of each run in a step
    epochs: int
    lr_schedule: str = "constant"  # or "linear" down to 0
    warmup_ratio: float = 0.0  # share of all steps over which the learning rate first rises
    evaluation_frequency: int = 1  # in epochs; the last epoch is always evaluated
    keep: str = "last"  # or "best": each run ends with the values of its best evaluation
    halving: Sequence[int] = ()  # epochs after which the worse half of the candidates stops

    def check(self, candidates: int) -> None:
        """Raise UserError if a value is not allowed for so many candidates."""
        if self.lr_schedule not in ("constant", "linear") or self.keep not in ("last", "best"):
            raise UserError("lr_schedule is 'constant' or 'linear', keep is 'last' or 'best'")
        limits = self.epochs, self.evaluation_frequency
        check_values("num_epochs, evaluation_frequency", limits, POSITIVE)
        check_values("warmup_ratio", self.warmup_ratio, RATIO)
        if problem := halving_problem(self.halving, *limits, candidates=candidates):
            raise UserError(f"halving {problem}")


@dataclass(frozen=True)
class Plan:
    """Everything about one training that does not change while it runs."""

    task: Task
    forward: Forward
    train: Split
    scored: dict[str, Split]
    token_budget: TokenBudget
    options: TrainOptions
    group: Group = SINGLE_PROCESS  # the processes that train together

    @property
    def batch_size(self) -> int:
        return self.options.batch_size

    @property
    def epochs(self) -> int:
        return self.options.epochs

    @property
    def evaluation_frequency(self) -> int:
        return self.options.evaluation_frequency

    @property
    def rows_per_run(self) -> int:
        return len(next(iter(self.train.rows_of_seed.values())))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_run / self.batch_size)

    def labels_of(self, run: Run) -> int:
        """Return the number of labels that a run trains on in an epoch: of examples, or words."""
        rows = self.train.rows_of_seed[run.effective_data_seed]
        return int(count_labels(self.train.tokens, rows).sum())

    def examples_before(self, epoch: int, step: int) -> int:
        """Return how many training examples a run has seen before a step of an epoch."""
        rows = self.rows_per_run
        return epoch * rows + min(rows, step * self.batch_size)

    @cached_property
    def factors(self) -> np.ndarray:
        """Return the learning rate's factor at each step, (all steps,) float64."""
        steps, options = self.epochs * self.steps_per_epoch, self.options
        warmup_steps = round(options.warmup_ratio * steps)
        return learning_rate_factors(options.lr_schedule, warmup_steps, steps)

    def empty_logits(self, runs: int) -> dict[str, np.ndarray]:
        """Return {validation split: (evaluations, K, labels, C)}, NaN until a run is evaluated."""
        count = math.ceil(self.epochs / self.evaluation_frequency)
        dtype = np.float32 if self.task.is_regression else np.float16
        return {
            name: np.full(
                (count, runs, len(split.tokens.require_labels()), self.task.num_labels),
                np.nan,
                dtype,
            )
            for name, split in self.scored.items()
            if name != "train"
        }

    def order(self, run: Run, epoch: int) -> np.ndarray:
        """Return the training examples of a run in the order of an epoch, (rows,) int64.

        The order depends only on the data seed of the run and on the epoch.
        """
        seed = run.effective_data_seed
        rows = self.train.rows_of_seed[seed]
        return rows[make_generator(seed, f"data order of epoch {epoch}").permutation(len(rows))]


def learning_rate_factors(kind: str, warmup_steps: int, total_steps: int) -> np.ndarray:
    """Return factors (total_steps,) float64: a linear warm-up, then constant or linear to 0."""
    step = np.arange(total_steps, dtype=np.float64)
    falling = (total_steps - step) / max(1, total_steps - warmup_steps)
    factor = falling if kind == "linear" else np.ones(total_steps)
    return np.where(step < warmup_steps, (step + 1) / max(1, warmup_steps), factor)
