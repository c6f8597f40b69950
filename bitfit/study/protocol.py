"""The experiments of the paper: models, tasks, table rows, learning rates, epochs and seeds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PAPER_MODELS = ("bert-base-cased", "bert-large-cased", "roberta-base")
PAPER_TASKS = ("qnli", "sst2", "mnli", "cola", "mrpc", "stsb", "rte", "qqp")  # Table 2's columns

Key = tuple[str, str, str, int | None]  # model, row, task, training size


class Row(NamedTuple):
    """A row of Table 3, or b_v: BEFT's paper ranks b_v above b_q and b_k."""

    fine_tune_type: str
    bias_terms: tuple[str, ...] = ()

    @property
    def stacks(self) -> bool:
        """Whether the runs of a cell share one pass, if the model allows it."""
        return self.fine_tune_type in ("bitfit", "frozen")


ROWS = {
    "full_ft": Row("full_ft"),
    "bitfit": Row("bitfit"),
    "b_m2+b_q": Row("bitfit", ("intermediate", "query")),
    "b_m2": Row("bitfit", ("intermediate",)),
    "b_q": Row("bitfit", ("query",)),
    "b_v": Row("bitfit", ("value",)),
    "frozen": Row("frozen"),
    "rand_uniform": Row("rand_uniform"),
    "rand_row_col": Row("rand_row_col"),
}
# The paper's protocol. The epochs are our choice: the paper says at most 8 for most tasks and up to
# 20 for bias terms; the first author advised 32 for MNLI at 1e-4.
LEARNING_RATES = (1e-4, 4e-4, 7e-4, 1e-3)
FULL_FT_RATES = (1e-5, 2e-5, 3e-5, 5e-5)
UNSEARCHED = {"roberta-base": {"full_ft": (1e-5,)} | dict.fromkeys(list(ROWS)[1:], (1e-4,))}
EPOCHS = {"cola": 16, "mrpc": 20, "rte": 20, "stsb": 16}
OTHER_EPOCHS = 8
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZE = 16
SIZES = (500, 1000, 2000, 4000, 8000, 16000)  # numbers of training examples in Figure 2


def paper_model_name(model: str) -> str:
    """Return a model's name as in the paper: without organization or folder."""
    return str(model).rstrip("/").rpartition("/")[2]


def paper_learning_rates(model: str, row: str) -> tuple[float, ...]:
    """Return the learning rates that the paper searches for a model and a table row."""
    given = UNSEARCHED.get(paper_model_name(model), {}).get(row)
    return given or (FULL_FT_RATES if row == "full_ft" else LEARNING_RATES)


def default_epochs(task: str) -> int:
    return EPOCHS.get(task, OTHER_EPOCHS)


def requested_cells(
    tables: Iterable[int], figures: Iterable[int], models: Sequence[str] | None,
    tasks: Sequence[str] | None, rows: Iterable[str], sizes: Iterable[int],
) -> list[Key]:  # fmt: skip
    """Return (model, row, task, size) of all cells of tables and figures, without repetitions."""
    base = list(models or PAPER_MODELS[:1])
    cells: list[Key] = []
    if 2 in tables:
        two = [row for row in ("full_ft", "bitfit") if row in rows]
        cells += [(m, r, t, None) for m in models or PAPER_MODELS for t in tasks or PAPER_TASKS
                  for r in two]  # fmt: skip
    if 3 in tables:
        cells += [(m, r, t, None) for m in base for t in tasks or PAPER_TASKS for r in rows]
    if 1 in figures:
        cells += [(m, r, t, None) for m in base for t in tasks or ("rte",)
                  for r in ("bitfit", "b_m2+b_q")]  # fmt: skip
    if 2 in figures:
        cells += [(m, r, t, n) for m in base for t in tasks or ("qnli",) for n in sizes
                  for r in ("full_ft", "bitfit")]  # fmt: skip
    return list(dict.fromkeys(cells))
