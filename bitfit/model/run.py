"""One training among those of a command; this module starts without torch."""

from typing import NamedTuple


class Run(NamedTuple):
    """One training: a learning rate, and a seed for the classifier and the data order."""

    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"lr{self.learning_rate}_seed{self.seed}"

    @property
    def caption(self) -> str:
        return f"learning rate {self.learning_rate:g}, seed {self.seed}"
