"""Scores of a study's cells, the selected scores, and differences between methods.

Everything is read from the files of the runs; nothing is trained or predicted here.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from bitfit.artifacts.metrics_files import LOGITS
from bitfit.data.tasks import TASKS, Task
from bitfit.results.scores import explain_unreadable, mean_std, read_metrics, select_scores
from bitfit.results.sweeps import sweep_warnings
from bitfit.study import cell_states, statistics
from bitfit.study.cell_tasks import task_of
from bitfit.study.cells import Cell, Study
from bitfit.study.protocol import ROWS, paper_model_name
from bitfit.study.published import COLUMNS, PUBLISHED

# The claims of the paper, and last of BEFT, as differences between two rows.
PAIRS = (
    ("bitfit", "full_ft"), ("bitfit", "rand_uniform"), ("bitfit", "rand_row_col"),
    ("bitfit", "frozen"), ("bitfit", "b_m2+b_q"), ("b_m2+b_q", "b_m2"), ("b_m2+b_q", "b_q"),
    ("b_v", "b_q"),
)  # fmt: skip


class Results(NamedTuple):
    """Scores of one cell: L learning rates, S seeds, E evaluated epochs; NaN where missing."""

    cell: Cell
    state: str
    logits: dict[str, np.ndarray]  # {validation split: (L, S, E, rows, C)}
    labels: dict[str, np.ndarray]  # {validation split: (rows,)}
    scores: pd.DataFrame  # learning_rate, seed, epoch, split, metric, value

    @property
    def task(self) -> Task:
        return task_of(self.cell.args)


def read_results(study: Study, cell: Cell) -> Results | None:
    """Return the results of a cell, or None if no run is scored or the folder is foreign.

    All logits of a run that diverged become NaN, so that the run counts nowhere.

    Raises:
        UserError: a file is damaged, or a finished run lacks one.
    """
    state, kept, scores = cell_states.cell_state(study, cell), {}, []
    folders = {} if state == "foreign" else cell.folders(study.output)
    splits = task_of(cell.args).validation_splits
    for run, folder in folders.items():
        has_scores = (folder / "metrics.json").exists() and (folder / LOGITS).exists()
        if has_scores or state == "done":
            with explain_unreadable(folder):
                content, table = read_metrics(folder)
                if content["diverged"] and not has_scores:
                    continue
                kept[run] = load_file(folder / LOGITS)
            scores.append(table.assign(learning_rate=run.learning_rate, seed=run.seed))
            for split in splits if content["diverged"] else ():
                kept[run][split][:] = np.nan
    if not kept:
        return None
    labels = {split: next(iter(kept.values()))[f"{split}.labels"] for split in splits}
    logits = {}
    for split in splits:
        longest = max((of_run[split] for of_run in kept.values()), key=len)
        grid = np.full((len(folders), *longest.shape), np.nan, longest.dtype)
        for place, run in enumerate(folders):
            if run in kept:
                grid[place, : len(kept[run][split])] = kept[run][split]
        logits[split] = grid.reshape(len(cell.rates), -1, *longest.shape)
    return Results(cell, state, logits, labels=labels, scores=pd.concat(scores))


def select(results: Results, split: str) -> dict[str, statistics.Selected]:
    """Return {selection: Selected} of a validation split; scores are at most 1.

    `last` is the last epoch and `best` the best epoch of each run, which is optimistic.
    """
    logits, labels = results.logits[split], results.labels[split]
    scores = statistics.main_scores(results.task, logits, labels)
    last = np.full(scores.shape[:2], scores.shape[2] - 1)
    return {
        "last": statistics.select_epochs(scores, last, len(labels)),
        "best": statistics.select_epochs(scores, scores.argmax(axis=-1), len(labels)),
        "split": statistics.select_split(results.task, logits, labels),
    }


class Entry(NamedTuple):
    """One cell of a table: a row's scores in one column."""

    column: str
    results: Results
    split: str
    selected: dict[str, statistics.Selected]  # {selection: Selected}


Entries = dict[tuple[str, str, str, int | None], Entry]  # by model, row, column, training size


def read_entries(study: Study) -> Entries:
    """Return the entries of all cells that have scores, in the paper's order."""
    found: Entries = {}
    tasks = [task for task, _ in COLUMNS.values()] + list(TASKS) + [c.task for c in study.cells]
    rows = list(ROWS)
    for cell in sorted(study.cells, key=lambda c: (tasks.index(c.task), rows.index(c.row))):
        results = read_results(study, cell)
        if results is None:
            continue
        for split, column in table_columns(task_of(cell.args)).items():
            column += f"-from-{cell.start}" if cell.start else ""
            key = cell.model, cell.row, column, cell.size
            found[key] = Entry(column, results, split, selected=select(results, split))
    return found


def table_columns(task: Task) -> dict[str, str]:
    """Return {validation split: column in the tables}."""
    known = {split: name for name, (of_task, split) in COLUMNS.items() if of_task == task.name}
    return known or {task.validation_splits[0]: task.folder}


def score_frame(entries: Entries) -> pd.DataFrame:
    """Return tables.csv: a row for each entry and selection, scores × 100."""
    rows = []
    for (model, row, column, size), entry in entries.items():
        cell, key = entry.results.cell, (paper_model_name(model), row, column)
        known = PUBLISHED if cell.args["train_size"] is None else {}  # the paper uses all rows
        published, published_std = known.get(key, (None, None))
        for selection, selected in entry.selected.items():
            mean, std, n = mean_std(100 * selected.values, skip_nan=True)
            low, high = statistics.mean_interval(100 * selected.values)
            rows.append({
                "model": model, "row": row, "column": column, "train_size": size,
                "metric": entry.results.task.metrics[0], "selection": selection,
                "mean": mean, "std": std, "low": low, "high": high,
                "seeds": n, "of": len(cell.seeds),
                "trials": entry.results.logits[entry.split][..., 0, 0].size,
                **selected_settings(selected, entry.results),
                "published": published, "published_std": published_std,
                "off": differs_from_paper(low, high, published, std=published_std),
                "state": entry.results.state,
            })  # fmt: skip
    return pd.DataFrame(rows)


def selected_settings(selected: statistics.Selected, results: Results) -> dict[str, str]:
    """Return the selected learning rates and epochs as texts."""
    choices, epochs = selected.choices, np.unique(results.scores["epoch"])
    texts = {
        "learning_rate": [f"{results.cell.rates[choice.rate]:g}" for choice in choices],
        "epoch": [str(epochs[i]) for choice in choices for i in choice.epoch],
    }
    return {name: " ".join(dict.fromkeys(values)) for name, values in texts.items()}


def differs_from_paper(
    low: float, high: float, published: float | None, std: float | None
) -> bool | None:
    """Return whether an interval does not overlap published ± std; None where one is unknown."""
    if published is None or np.isnan(low):
        return None
    return bool(low > published + (std or 0) or high < published - (std or 0))


def comparisons(entries: Entries, rng: np.random.Generator, resamples: int = 1000) -> pd.DataFrame:
    """Return the differences of PAIRS by `split`: a row for each model, pair and column.

    The column `all` pools the tasks of a pair. For each model Holm's correction is over all pairs
    and columns, and separately over the pooled rows of all pairs.
    """
    rows = []
    for model in dict.fromkeys(key[0] for key in entries):
        for a, b in PAIRS:
            rows += compare_pair(entries, model, (a, b), rng=rng, resamples=resamples)
    frame = pd.DataFrame(rows)
    if len(frame):
        groups = [frame["model"], frame["column"] == "all"]
        frame["p_holm"] = frame.groupby(groups)["p"].transform(lambda p: statistics.holm(p))
    return frame


def finished_pairs(
    entries: Entries, model: str, pair: tuple[str, str]
) -> dict[str, tuple[Entry, Entry]]:
    """Return {column: the entries of two rows}, trained on all rows and finished."""
    done = {key[1:3]: entry for key, entry in entries.items()
            if (key[0], key[3], entry.results.state) == (model, None, "done")}  # fmt: skip
    columns = dict.fromkeys(column for _, _, column, _ in entries)
    return {c: (done[pair[0], c], done[pair[1], c]) for c in columns
            if {(row, c) for row in pair} <= set(done)}  # fmt: skip


def compare_pair(
    entries: Entries, model: str, pair: tuple[str, str], rng: np.random.Generator, resamples: int
) -> list[dict[str, Any]]:
    """Return the rows of one pair, from finished cells with the same seeds."""
    columns: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    drawn_seeds: dict[str, np.ndarray] = {}
    of_task = defaultdict(list)
    for column, (first, second) in finished_pairs(entries, model, pair).items():
        selected, task = (first.selected["split"], second.selected["split"]), first.results.task
        same_seeds = first.results.cell.seeds == second.results.cell.seeds
        if not same_seeds or len(statistics.pairs(*selected)) < 2:
            continue
        by_seed = statistics.differences(*selected)
        # The two columns of MNLI are of the same runs: they get the same seeds, and one mean.
        seeds = drawn_seeds.setdefault(task.name, statistics.draws(rng, len(by_seed), resamples))
        a_logits, b_logits = (entry.results.logits[entry.split] for entry in (first, second))
        drawn = statistics.bootstrap_differences(
            task, *selected, a_logits=a_logits, b_logits=b_logits,
            labels=first.results.labels[first.split], rng=rng, seeds=seeds,
        )  # fmt: skip
        columns[column] = [(by_seed, drawn)]
        of_task[task.name].append((by_seed, drawn))
    if len(of_task) > 1:
        columns["all"] = [(np.mean([values for values, _ in pairs], axis=0),
                           np.mean([drawn for _, drawn in pairs], axis=0))
                          for pairs in of_task.values()]  # fmt: skip
    key = {"model": model, "a": pair[0], "b": pair[1]}
    return [key | {"column": c} | statistics.difference(drawn, rng) for c, drawn in columns.items()]


def scores_at_last_rate(entry: Entry) -> pd.DataFrame:
    """Return the scores of an entry's runs at the rate of `last`; empty if no run counts."""
    scores, rates = entry.results.scores, entry.results.cell.rates
    chosen = [rates[choice.rate] for choice in entry.selected["last"].choices]
    return scores[scores["learning_rate"].isin(chosen)]


def train_gaps(entries: Entries) -> pd.DataFrame:
    """Return train minus validation score × 100 in the last epoch of `last`, a row per entry."""
    rows = []
    for (model, row, column, size), entry in entries.items():
        scores, metric = scores_at_last_rate(entry), entry.results.task.metrics[0]
        if size is not None or "train" not in set(scores["split"]):
            continue
        last = scores[(scores["epoch"] == scores["epoch"].max()) & (scores["metric"] == metric)]
        wide = 100 * last.pivot(index="seed", columns="split", values="value")
        gap, std, n = mean_std(wide["train"] - wide[entry.split], skip_nan=True)
        rows.append({"model": model, "row": row, "column": column, "metric": metric,
                     "train": wide["train"].mean(), "validation": wide[entry.split].mean(),
                     "gap": gap, "std": std, "seeds": n})  # fmt: skip
    return pd.DataFrame(rows)


def search_warnings(entries: Entries) -> pd.DataFrame:
    """Return the warnings of `sweep_warnings` about finished cells, a row for each warning."""
    rows = []
    for entry in entries.values():
        found = entry.results
        if found.state == "done" and entry.split == found.task.validation_splits[0]:
            logits, labels = found.logits[entry.split], found.labels[entry.split]
            scores = statistics.main_scores(found.task, logits, labels).swapaxes(1, 2)
            epochs = np.unique(found.scores["epoch"])
            groups = {rate: pd.DataFrame(of_rate, epochs).dropna(axis=1)
                      for rate, of_rate in zip(found.cell.rates, scores, strict=True)}  # fmt: skip
            for warning in sweep_warnings(dict(sorted(groups.items()))):
                rows.append((found.cell.name, warning))
    return pd.DataFrame(rows, columns=["cell", "warning"])


def curve_over_seeds(entry: Entry) -> pd.DataFrame:
    """Return mean and std over the seeds of the main score × 100 by epoch, at the rate of `last`.

    The frame is empty if no run counts.
    """
    main = select_scores(scores_at_last_rate(entry), entry.split, entry.results.task.metrics[0])
    return 100 * main.groupby("epoch")["value"].agg(["mean", "std"])


def bias_changes(study: Study, entry: Entry) -> tuple[pd.DataFrame, int] | None:
    """Return the mean absolute change of each bias term, at the learning rate of `last`.

    Returns:
        (frame (terms, layers) with the mean over the seeds that count, number of seeds), or None.
    """
    selected, cell = entry.selected["last"], entry.results.cell
    counted = [s for s, v in zip(cell.seeds, selected.values, strict=True) if np.isfinite(v)]
    rates = {cell.rates[choice.rate] for choice in selected.choices}
    paths = [
        folder / "bias_term_changes.csv"
        for run, folder in cell.folders(study.output).items()
        if run.learning_rate in rates and run.seed in counted
    ]
    frames = [pd.read_csv(path, index_col="term") for path in paths if path.exists()]
    if not frames:
        return None
    mean = sum(frame.loc[frames[0].index] for frame in frames) / len(frames)
    order = mean.sum(axis=1).sort_values(ascending=False, kind="stable").index
    return mean.loc[order], len(frames)
