"""The result of a training: the trained values, scores and records of all runs."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.results import scores as reports
from bitfit.training.state import Record
from utils import UserError


@dataclass
class TrainingResult:
    """The trained values, scores and records of all runs."""

    stack: RunStack
    records: list[Record]
    scores: pd.DataFrame  # one row for each (run, epoch, split, metric), see `results.scores`
    averaged: list[dict[str, Any]] = field(default_factory=list)  # members of an average
    selected: int = 0  # the run that the model and all results belong to

    @property
    def record(self) -> Record:
        """Return the record of the selected run."""
        return self.records[self.selected]

    @property
    def caption(self) -> str:
        """Return the learning rate and seed of the selected run as text, or "average of n"."""
        count = len(self.averaged)
        return f"average of {count}" if count else self.record.run.caption

    def select(self, run: int) -> None:
        """Select a run, counted from 0, and load it into the model."""
        count = len(self.stack.runs)
        if not 0 <= run < count:
            raise UserError(f"there is no run {run}: there are {count}, counted from 0")
        self.stack.load_run(run)
        self.selected = run

    def values_before_and_after(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the initial and the trained values of the selected run, {name: values}."""
        before = self.stack.named_params(self.selected, self.stack.initial_params)
        return before, self.stack.named_params(self.selected)

    def scores_of(self, run: Run) -> pd.DataFrame:
        """Return the scores of one run."""
        return self.scores[self.scores["run"] == run.name]

    def require_scores_of(self, run: Run) -> pd.DataFrame:
        """Return the scores of one run; UserError if there are none."""
        scores = self.scores_of(run)
        if scores.empty:
            raise UserError("call train_and_evaluate first: there are no scores to plot")
        return scores


def new_result(stack: RunStack) -> TrainingResult:
    """Return the result of runs that have not trained yet."""
    return TrainingResult(stack, [Record(run) for run in stack.runs], reports.scores_frame([]))
