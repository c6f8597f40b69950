"""What a study's cells measured: arrays, the scores that count, differences between methods.

Everything is read from the files of the runs; nothing is trained or predicted here.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from bitfit.outputs import folders_of
from bitfit.reports import read_metrics
from bitfit.runs import Run
from bitfit.saved import LOGITS
from bitfit.study import ledger, statistics
from bitfit.study.cells import ROWS
from bitfit.study.published import COLUMNS, PUBLISHED
from bitfit.tasks import TASKS

SELECTIONS = ("last", "best", "split")
# The paper's claims, each as a difference between two rows.
PAIRS = (
    ("bitfit", "full_ft"), ("bitfit", "rand_uniform"), ("bitfit", "rand_row_col"),
    ("bitfit", "frozen"), ("bitfit", "b_m2+b_q"), ("b_m2+b_q", "b_m2"), ("b_m2+b_q", "b_q"),
)  # fmt: skip


class Results(NamedTuple):
    """Of one cell: L learning rates, S seeds, E scored epochs; NaN where there is nothing."""

    cell: object
    state: str
    logits: dict  # {validation split: (L, S, E, rows, C)}
    labels: dict  # {validation split: (rows,)}
    scores: pd.DataFrame  # learning_rate, seed, epoch, split, metric, value
    facts: list  # the runs' metrics.json

    @property
    def task(self):
        return TASKS[self.cell.task]


def read(study, cell):
    """The `Results` of a cell, or None where no run has been scored yet."""
    runs = [Run(rate, seed) for rate in cell.rates for seed in cell.seeds]
    folders = folders_of(ledger.folder_of(study, cell), runs)
    kept, facts, scores = {}, [], []
    for run, folder in folders.items():
        if (folder / LOGITS).exists() and (folder / "metrics.json").exists():
            kept[run] = load_file(folder / LOGITS)
            content, table = read_metrics(folder)
            facts.append(content)
            scores.append(table.assign(learning_rate=run.learning_rate, seed=run.seed))
    if not kept:
        return None
    logits, labels = {}, {}
    for split in TASKS[cell.task].validation_splits:
        labels[split] = next(iter(kept.values()))[f"{split}.labels"]
        logits[split] = grid_of([kept.get(run, {}).get(split) for run in runs], len(cell.rates))
    state = ledger.state_of(study, cell)
    return Results(cell, state, logits, labels, pd.concat(scores), facts)


def grid_of(arrays, rates):
    """Arrays (E, rows, C), or None, of runs by rate and seed -> (L, S, E, rows, C)."""
    shape = max((a.shape for a in arrays if a is not None), key=lambda shape: shape[0])
    dtype = next(a.dtype for a in arrays if a is not None)
    grid = np.full((len(arrays), *shape), np.nan, dtype)
    for own, array in zip(grid, arrays, strict=True):
        if array is not None:
            own[: len(array)] = array
    return grid.reshape(rates, -1, *shape)


def select(results, split):
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


def entries(study):
    """{(model, row, column, size): Entry} of all cells that have scores, in the paper's order."""
    found = {}
    tasks, rows = [task for task, _ in COLUMNS.values()] + list(TASKS), list(ROWS)
    for cell in sorted(study.cells, key=lambda c: (tasks.index(c.task), rows.index(c.row))):
        results = read(study, cell)
        for split, column in columns_of(cell.task).items() if results else ():
            key = cell.model, cell.row, column, cell.size
            found[key] = Entry(column, results, split, select(results, split))
    return found


def columns_of(task):
    """{validation split: the column it has in the tables}"""
    known = {split: name for name, (own, split) in COLUMNS.items() if own == task}
    return known or {TASKS[task].validation_splits[0]: TASKS[task].folder}


def score_frame(entries):
    """tables.csv: a row for each cell's column and selection, scores x 100."""
    rows = []
    for (model, row, column, size), entry in entries.items():
        published, std = PUBLISHED.get((model, row, column), (None, None))
        for selection in SELECTIONS:
            selected = entry.selected[selection]
            mean, spread, n = statistics.mean_std(100 * selected.values)
            low, high = statistics.mean_interval(100 * selected.values)
            cell = entry.results.cell
            rows.append({
                "model": model, "row": row, "column": column, "train_size": size,
                "metric": entry.results.task.metrics[0], "selection": selection,
                "mean": mean, "std": spread, "seeds": n, "low": low, "high": high,
                "trials": entry.results.logits[entry.split][..., 0, 0].size,
                "learning_rate": rates_of(selected, cell),
                "published": published if size is None else None,
                "published_std": std if size is None else None,
                "off": is_off(low, high, published, std) if size is None else None,
                "state": entry.results.state,
            })  # fmt: skip
    return pd.DataFrame(rows)


def rates_of(selected, cell):
    """The learning rates chosen, as text."""
    chosen = dict.fromkeys(cell.rates[choice.rate] for choice in selected.choices)
    return " ".join(f"{rate:g}" for rate in chosen)


def is_off(low, high, published, std):
    """Whether an interval has nothing in common with published ± std; None where it is unknown."""
    if published is None or np.isnan(low):
        return None
    return bool(low > published + (std or 0) or high < published - (std or 0))


def comparisons(entries, rng, resamples=1000):
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


def compared(entries, model, a, b, rng, resamples):
    rows, of_task = [], {}
    for column in dict.fromkeys(key[2] for key in entries):
        one, two = (entries.get((model, row, column, None)) for row in (a, b))
        if not one or not two or one.results.cell.seeds != two.results.cell.seeds:
            continue
        args = (one.results.task, one.selected["split"], two.selected["split"],
                one.results.logits[one.split], two.results.logits[two.split],
                one.results.labels[one.split])  # fmt: skip
        if not args[1].choices or not args[2].choices:
            continue
        drawn = statistics.bootstrap_differences(*args, rng, resamples)
        own = statistics.differences(args[1], args[2])
        rows.append(difference(model, a, b, column, [drawn], [own], rng))
        of_task.setdefault(one.results.cell.task, []).append((drawn, own))
    if len(of_task) > 1:
        # The two columns of MNLI are of the same runs: first their mean.
        pairs = [[np.mean(arrays, axis=0) for arrays in zip(*of, strict=True)]
                 for of in of_task.values()]  # fmt: skip
        rows.append(difference(model, a, b, "all", *map(list, zip(*pairs, strict=True)), rng))
    return rows


def difference(model, a, b, column, bootstraps, own, rng):
    """A row of `comparisons`, of the columns that these arrays are of."""
    mean, p = statistics.pooled(own, rng)
    low, high = statistics.pooled_interval(bootstraps)
    n = sum(map(len, own))
    return {
        "model": model, "a": a, "b": b, "column": column, "difference": 100 * mean,
        "low": 100 * low, "high": 100 * high, "pairs": n, "p": p,
        "least_p": statistics.least_p(n),
    }  # fmt: skip


def train_gaps(entries):
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


def curve_of(entry):
    """(epochs, main score x 100) averaged over the seeds, at the rate of `last`; None if none."""
    choices = entry.selected["last"].choices
    if not choices:
        return None
    results = entry.results
    rate = results.cell.rates[choices[0].rate]
    own = results.scores[results.scores["learning_rate"] == rate]
    own = own[(own["split"] == entry.split) & (own["metric"] == results.task.metrics[0])]
    return 100 * own.groupby("epoch")["value"].mean()


def bias_changes(study, entry):
    """How far each bias term moved, a frame (terms, layers): the mean over the seeds at the rate of
    `last`; None where there are none."""
    cell, choices = entry.results.cell, entry.selected["last"].choices
    runs = [Run(rate, seed) for rate in cell.rates for seed in cell.seeds]
    folders = folders_of(ledger.folder_of(study, cell), runs)
    chosen = {cell.rates[choice.rate] for choice in choices}
    paths = [f / "bias_term_changes.csv" for r, f in folders.items() if r.learning_rate in chosen]
    frames = [pd.read_csv(path, index_col="term") for path in paths if path.exists()]
    if not frames:
        return None
    mean = sum(frame.loc[frames[0].index] for frame in frames) / len(frames)
    return mean.loc[mean.sum(axis=1).sort_values(ascending=False, kind="stable").index]
