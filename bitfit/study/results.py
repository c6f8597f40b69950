"""What a study's cells measured: arrays, the scores that count, differences between methods.

Everything is read from the files of the runs; nothing is trained or predicted here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from bitfit.artifacts.saved_evaluator import LOGITS
from bitfit.data.tasks import TASKS, Task
from bitfit.results.scores import read_metrics
from bitfit.study import cell_states, statistics
from bitfit.study.cells import Cell, Study
from bitfit.study.protocol import ROWS, paper_model_name
from bitfit.study.published import COLUMNS, PUBLISHED
from utils import UserError, convert_errors, first_line

SELECTIONS = ("last", "best", "split")
# The paper's claims, each as a difference between two rows.
PAIRS = (
    ("bitfit", "full_ft"), ("bitfit", "rand_uniform"), ("bitfit", "rand_row_col"),
    ("bitfit", "frozen"), ("bitfit", "b_m2+b_q"), ("b_m2+b_q", "b_m2"), ("b_m2+b_q", "b_q"),
)  # fmt: skip


class Results(NamedTuple):
    """Of one cell: L learning rates, S seeds, E scored epochs; NaN where there is nothing."""

    cell: Cell
    state: str
    logits: dict  # {validation split: (L, S, E, rows, C)}
    labels: dict  # {validation split: (rows,)}
    scores: pd.DataFrame  # learning_rate, seed, epoch, split, metric, value

    @property
    def task(self) -> Task:
        return TASKS[self.cell.task]


def read(study: Study, cell: Cell) -> Results | None:
    """The `Results` of a cell; None where no run has been scored yet, or the folder is another's.

    A run that diverged counts nowhere: all of its logits are NaN.

    Raises:
        UserError: a file is damaged.
    """
    state, kept, scores = cell_states.cell_state(study, cell), {}, []
    folders = {} if state == "foreign" else cell.folders(study.output)
    if state == "done":
        check_whole(folders.values())
    for run, folder in folders.items():
        if (folder / LOGITS).exists() and (folder / "metrics.json").exists():
            with convert_errors(
                lambda error, f=folder: UserError(f"{f} cannot be read: {first_line(error)}")
            ):
                kept[run] = load_file(folder / LOGITS)
                content, table = read_metrics(folder)
                diverged = content["diverged"]
            scores.append(table.assign(learning_rate=run.learning_rate, seed=run.seed))
            for split in TASKS[cell.task].validation_splits if diverged else ():
                kept[run][split][:] = np.nan
    if not kept:
        return None
    logits, labels = {}, {}
    for split in TASKS[cell.task].validation_splits:
        labels[split] = next(iter(kept.values()))[f"{split}.labels"]
        logits[split] = grid_of([kept.get(run, {}).get(split) for run in folders], len(cell.rates))
    return Results(cell, state, logits, labels, pd.concat(scores))


def check_whole(folders: Iterable[Path]) -> None:
    """UserError where a file of a finished run is gone: it would count as one that diverged."""
    for folder in folders:
        if not (folder / "metrics.json").exists():
            raise gone(folder / "metrics.json")
        if not (folder / LOGITS).exists():
            with convert_errors(
                lambda error, f=folder: UserError(f"{f} cannot be read: {first_line(error)}")
            ):
                diverged = read_metrics(folder)[0]["diverged"]
            if not diverged:
                raise gone(folder / LOGITS)


def gone(path: Path) -> UserError:
    what = "is gone, though its run is finished"
    return UserError(f"{path} {what}: put it back, or remove the cell's folder and run it again")


def grid_of(arrays: list[np.ndarray | None], rates: int) -> np.ndarray:
    """Arrays (E, rows, C), or None, of runs by rate and seed -> (L, S, E, rows, C)."""
    shape = max((a.shape for a in arrays if a is not None), key=lambda shape: shape[0])
    dtype = next(a.dtype for a in arrays if a is not None)
    grid = np.full((len(arrays), *shape), np.nan, dtype)
    for own, array in zip(grid, arrays, strict=True):
        if array is not None:
            own[: len(array)] = array
    return grid.reshape(rates, -1, *shape)


def select(results: Results, split: str) -> dict[str, statistics.Selected]:
    """{selection: Selected} of a validation split, scores from -1 or 0 to 1."""
    logits, labels = results.logits[split], results.labels[split]
    scores = statistics.main_scores(results.task, logits, labels)
    return {
        "last": statistics.select_last(scores, len(labels)),
        "best": statistics.select_best(scores, len(labels)),
        "split": statistics.select_split(results.task, logits, labels),
    }


class Entry(NamedTuple):
    """One column of a table's row."""

    column: str
    results: Results
    split: str
    selected: dict  # {selection: Selected}


Entries = dict[tuple, Entry]  # {(model, row, column, size): Entry}


def entries(study: Study) -> Entries:
    """{(model, row, column, size): Entry} of all cells that have scores, in the paper's order."""
    found = {}
    tasks, rows = [task for task, _ in COLUMNS.values()] + list(TASKS), list(ROWS)
    for cell in sorted(study.cells, key=lambda c: (tasks.index(c.task), rows.index(c.row))):
        results = read(study, cell)
        for split, column in columns_of(cell.task).items() if results else ():
            key = cell.model, cell.row, column, cell.size
            found[key] = Entry(column, results, split, select(results, split))
    return found


def columns_of(task: str) -> dict[str, str]:
    """{validation split: the column it has in the tables}"""
    known = {split: name for name, (own, split) in COLUMNS.items() if own == task}
    return known or {TASKS[task].validation_splits[0]: TASKS[task].folder}


def score_frame(entries: Entries) -> pd.DataFrame:
    """tables.csv: a row for each cell's column and selection, scores x 100."""
    rows = []
    for (model, row, column, size), entry in entries.items():
        cell = entry.results.cell  # the paper trains on all rows
        key = (paper_model_name(model), row, column) if cell.args["train_size"] is None else None
        published, std = PUBLISHED.get(key, (None, None))
        for selection in SELECTIONS:
            selected = entry.selected[selection]
            mean, spread, n = statistics.mean_std(100 * selected.values)
            low, high = statistics.mean_interval(100 * selected.values)
            rows.append({
                "model": model, "row": row, "column": column, "train_size": size,
                "metric": entry.results.task.metrics[0], "selection": selection,
                "mean": mean, "std": spread, "low": low, "high": high,
                "seeds": n, "of": len(cell.seeds),
                "trials": entry.results.logits[entry.split][..., 0, 0].size,
                "learning_rate": rates_of(selected, cell),
                "published": published, "published_std": std,
                "off": is_off(low, high, published, std),
                "state": entry.results.state,
            })  # fmt: skip
    return pd.DataFrame(rows)


def rates_of(selected: statistics.Selected, cell: Cell) -> str:
    """The learning rates chosen, as text."""
    chosen = dict.fromkeys(cell.rates[choice.rate] for choice in selected.choices)
    return " ".join(f"{rate:g}" for rate in chosen)


def is_off(low: float, high: float, published: float | None, std: float | None) -> bool | None:
    """Whether an interval has nothing in common with published ± std; None where it is unknown."""
    if published is None or np.isnan(low):
        return None
    return bool(low > published + (std or 0) or high < published - (std or 0))


def comparisons(entries: Entries, rng: np.random.Generator, resamples: int = 1000) -> pd.DataFrame:
    """The differences of PAIRS by `split`: a frame with a row for each model, pair and column, and
    one, `all`, pooled over the tasks of each pair.

    p-values are Holm's over the columns of a model's pairs, and over its pooled ones.
    """
    rows = []
    for model in dict.fromkeys(key[0] for key in entries):
        for a, b in PAIRS:
            rows += compared(entries, model, a, b, rng, resamples)
    frame = pd.DataFrame(rows)
    if len(frame):
        groups = [frame["model"], frame["column"] == "all"]
        frame["p_holm"] = frame.groupby(groups)["p"].transform(lambda p: statistics.holm(p))
    return frame


def compared(
    entries: Entries, model: str, a: str, b: str, rng: np.random.Generator, resamples: int
) -> list[dict[str, Any]]:
    """The rows of one pair; of cells that are done, with the same seeds."""
    rows = []
    of_task: dict[str, list] = {}
    drawn_seeds: dict[str, np.ndarray] = {}
    for column in dict.fromkeys(key[2] for key in entries):
        one, two = (entries.get((model, row, column, None)) for row in (a, b))
        if not one or not two or not comparable(one, two):
            continue
        selected = one.selected["split"], two.selected["split"]
        own, task = statistics.differences(*selected), one.results.task
        # The two columns of MNLI are of the same runs: they get the same seeds, and one mean.
        seeds = drawn_seeds.setdefault(task.name, statistics.draws(rng, len(own), resamples))
        logits = (entry.results.logits[entry.split] for entry in (one, two))
        labels = one.results.labels[one.split]
        drawn = statistics.bootstrap_differences(task, *selected, *logits, labels, rng, seeds)
        of_task.setdefault(task.name, []).append((own, drawn))
        rows.append(difference(model, a, b, column, [(own, drawn)], rng))
    if len(of_task) > 1:
        means = [[np.mean(of, axis=0) for of in zip(*pairs, strict=True)]
                 for pairs in of_task.values()]  # fmt: skip
        rows.append(difference(model, a, b, "all", means, rng))
    return rows


def comparable(one: Entry, two: Entry) -> bool:
    """Whether two entries are of done cells with the same seeds, of which two or more count."""
    done = one.results.state == two.results.state == "done"
    if not done or one.results.cell.seeds != two.results.cell.seeds:
        return False
    return len(statistics.pairs(one.selected["split"], two.selected["split"])) > 1


def difference(
    model: str, a: str, b: str, column: str, columns: list, rng: np.random.Generator
) -> dict[str, Any]:
    """A row of `comparisons`, of the columns that these arrays are of."""
    found = statistics.difference(columns, rng)
    return {
        "model": model, "a": a, "b": b, "column": column, "difference": 100 * found.mean,
        "low": 100 * found.low, "high": 100 * found.high, "pairs": found.n, "p": found.p,
        "least_p": statistics.least_p(found.n),
    }  # fmt: skip


def train_gaps(entries: Entries) -> pd.DataFrame:
    """Train minus validation, main metric x 100, last epoch of `last`: a row for each entry."""
    rows = []
    for (model, row, column, size), entry in entries.items():
        choices = entry.selected["last"].choices
        if size is not None or not choices:
            continue
        rate = entry.results.cell.rates[choices[0].rate]
        own = entry.results.scores
        own = own[own["learning_rate"] == rate]
        metric, last = entry.results.task.metrics[0], own["epoch"].max()
        last = own[(own["epoch"] == last) & (own["metric"] == metric)]
        wide = 100 * last.pivot(index="seed", columns="split", values="value")
        gap, std, n = statistics.mean_std(wide["train"] - wide[entry.split])
        rows.append({"model": model, "row": row, "column": column, "train": wide["train"].mean(),
                     "validation": wide[entry.split].mean(), "gap": gap, "std": std,
                     "seeds": n})  # fmt: skip
    return pd.DataFrame(rows)


def curve_of(entry: Entry) -> pd.Series | None:
    """(epochs, main score x 100) averaged over the seeds, at the rate of `last`; None if none."""
    choices = entry.selected["last"].choices
    if not choices:
        return None
    results = entry.results
    rate = results.cell.rates[choices[0].rate]
    own = results.scores[results.scores["learning_rate"] == rate]
    own = own[(own["split"] == entry.split) & (own["metric"] == results.task.metrics[0])]
    return 100 * own.groupby("epoch")["value"].mean()


def bias_changes(study: Study, entry: Entry) -> tuple[pd.DataFrame, int] | None:
    """How far each bias term moved, at the rate of `last`.

    Returns:
        (a frame (terms, layers): the mean over the seeds that count, their number); or None.
    """
    selected, cell = entry.selected["last"], entry.results.cell
    counted = [s for s, v in zip(cell.seeds, selected.values, strict=True) if np.isfinite(v)]
    chosen = {(cell.rates[c.rate], seed) for c in selected.choices for seed in counted}
    folders = [f for run, f in cell.folders(study.output).items() if tuple(run) in chosen]
    paths = [folder / "bias_term_changes.csv" for folder in folders]
    frames = [pd.read_csv(path, index_col="term") for path in paths if path.exists()]
    if not frames:
        return None
    mean = sum(frame.loc[frames[0].index] for frame in frames) / len(frames)
    order = mean.sum(axis=1).sort_values(ascending=False, kind="stable").index
    return mean.loc[order], len(frames)
