"""One training among those of a command; this module starts without torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Run(NamedTuple):
    """One training: a learning rate, a seed for classifier and masks, and a seed for the data."""

    learning_rate: float
    seed: int
    # Of the training rows, their order and dropout. None, never an equal number: the same as seed.
    data_seed: int | None = None
    terms: str | None = None  # as after --bias-terms, of a command with several sets of terms

    @property
    def effective_data_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def name(self) -> str:
        pair = f"init{self.seed}_data{self.data_seed}"
        seeds = f"seed{self.seed}" if self.data_seed is None else pair
        terms = "" if self.terms is None else "_" + self.terms.replace(" ", "-")
        return f"lr{self.learning_rate}_{seeds}{terms}"

    @property
    def candidate(self) -> str:
        """Return the learning rate and the bias terms as text, equal for runs of other seeds."""
        terms = "" if self.terms is None else f"bias terms {self.terms}, "
        return f"{terms}learning rate {self.learning_rate}"

    @property
    def caption(self) -> str:
        return f"learning rate {self.learning_rate:g}, {format_seeds(self.fields)}"

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields for metadata files, without those that are None and the terms."""
        fields = self._replace(terms=None)._asdict()
        return {name: value for name, value in fields.items() if value is not None}


def format_seeds(run: Mapping[str, Any]) -> str:
    """Return "seed 0", or "init seed 0, data seed 1", of a run's metadata."""
    seed, data_seed = f"seed {run['seed']}", run.get("data_seed")
    return seed if data_seed is None else f"init {seed}, data seed {data_seed}"
