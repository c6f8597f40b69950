"""The pictures of a study's report: {file name: (figure, what it shows)}."""

from typing import TYPE_CHECKING

import numpy as np

from bitfit.results.plots import bias_heatmap, curve_figure, new_figure
from bitfit.study import results, statistics
from bitfit.study.cells import Study
from bitfit.study.results import Entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, tuple["Figure", str]]  # {file name: (figure, description)}
COLORS = {  # of the rows, the same in all pictures
    "full_ft": "black", "bitfit": "C0", "b_m2+b_q": "C9", "b_m2": "C2", "b_q": "C8",
    "frozen": "0.6", "rand_uniform": "C1", "rand_row_col": "C3",
}  # fmt: skip


def all_of(study: Study, entries: Entries) -> Figures:
    """All that there is data for."""
    figures: Figures = {}
    for model in dict.fromkeys(key[0] for key in entries):
        own = {key: entry for key, entry in entries.items() if key[0] == model}
        name = own[next(iter(own))].results.cell.name.split("/")[0]
        figures |= heatmaps(study, own, name) | size_curves(own, name)
        figures |= gaps(own, name) | learning_curves(own, name) | trials(own, name)
    return figures


def whole(entries: Entries) -> Entries:
    """Those that are no part of a train-size curve."""
    return {key: entry for key, entry in entries.items() if key[3] is None}


def by_column(entries: Entries) -> dict[str, dict[str, results.Entry]]:
    """{column: {row: Entry}}"""
    found: dict[str, dict[str, results.Entry]] = {}
    for (_, row, column, _), entry in entries.items():
        found.setdefault(column, {})[row] = entry
    return found


def heatmaps(study: Study, entries: Entries, name: str) -> Figures:
    """Figure 1: how far each term moved, b_q + b_m2 beside all."""
    figures: Figures = {}
    for (_, row, column, _), entry in whole(entries).items():
        if row not in ("bitfit", "b_m2+b_q"):
            continue
        found = results.bias_changes(study, entry)
        if found is None or column == "MNLI-mm":
            continue
        changes, seeds = found
        caption = f"{name}, {row}, {column}: change of each bias term, mean of {seeds} seeds"
        figure = bias_heatmap(list(changes.index), changes.to_numpy(), caption)
        text = f"Figure 1 of the paper, for {row} on {column}: mean absolute change per layer."
        figures[f"figure1_{name}_{row}_{column}"] = figure, text
    return figures


def size_curves(entries: Entries, name: str) -> Figures:
    """Figure 2: scores over the number of training rows."""
    figures: Figures = {}
    for column in dict.fromkeys(key[2] for key in entries if key[3] is not None):
        of_row: dict[str, list[tuple[int, results.Entry]]] = {}
        for (_, row, own, size), entry in entries.items():
            if own == column and size is not None:
                of_row.setdefault(row, []).append((size, entry))
        figure, axes = curve_figure(f"{name}, {column}", "training rows", "validation score x 100")
        for row, points in of_row.items():
            points.sort(key=lambda point: point[0])
            sizes = [size for size, _ in points]
            stats = [statistics.mean_std(100 * e.selected["split"].values) for _, e in points]
            mean, std = np.array(stats)[:, 0], np.nan_to_num(np.array(stats)[:, 1])
            axes.plot(sizes, mean, "o-", ms=3.5, color=COLORS[row], label=row)
            axes.fill_between(sizes, mean - std, mean + std, color=COLORS[row], alpha=0.15)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
        text = f"Figure 2 of the paper, on {column}: mean over the seeds ± standard deviation."
        figures[f"figure2_{name}_{column}"] = figure, text
    return figures


def gaps(entries: Entries, name: str) -> Figures:
    """How much better each method scores on its training rows than on the validation rows."""
    frame = results.train_gaps(entries)
    if frame.empty:
        return {}
    columns, rows = list(dict.fromkeys(frame["column"])), list(dict.fromkeys(frame["row"]))
    figure = new_figure(max(5, 1.8 + 1.7 * len(columns)), 4.5, f"{name}: train - validation")
    axes, width = figure.subplots(), 0.8 / len(rows)
    for i, row in enumerate(rows):
        own = frame[frame["row"] == row].set_index("column").reindex(columns)
        x = np.arange(len(columns)) + (i - (len(rows) - 1) / 2) * width
        axes.bar(x, own["gap"], width, yerr=own["std"], color=COLORS[row], label=row,
                 error_kw={"elinewidth": 0.8})  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("train - validation score x 100, last epoch")
    figure.legend(loc="outside lower center", frameon=False, ncols=min(len(rows), 4))
    text = "How far each method's train score is above its validation score (± over the seeds)."
    return {f"gap_{name}": (figure, text)}


def learning_curves(entries: Entries, name: str) -> Figures:
    figures: Figures = {}
    for column, of_row in by_column(whole(entries)).items():
        figure, axes = curve_figure(f"{name}, {column}", "epoch", "validation score x 100")
        for row, entry in of_row.items():
            curve = results.curve_of(entry)
            if curve is not None:
                axes.plot(curve, "o-", ms=3, color=COLORS[row], label=row)
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
        text = f"{column}: mean over the seeds, at each row's best learning rate at the last epoch."
        figures[f"curves_{name}_{column}"] = figure, text
    return figures


def trials(entries: Entries, name: str) -> Figures:
    """The expected best score of so many trials, of all learning rates, seeds and epochs."""
    figures: Figures = {}
    for column, of_row in by_column(whole(entries)).items():
        what = "trials (a learning rate, a seed, an epoch: each is one)"
        figure, axes = curve_figure(f"{name}, {column}", what, "expected best score x 100")
        for row, entry in of_row.items():
            logits = entry.results.logits[entry.split]
            labels = entry.results.labels[entry.split]
            scores = 100 * statistics.main_scores(entry.results.task, logits, labels).ravel()
            if np.isnan(scores).all():
                continue
            budgets = np.unique(np.geomspace(1, len(scores), 40).astype(int))
            best = statistics.expected_best(scores, budgets)
            axes.plot(budgets, best, color=COLORS[row], label=f"{row} ({len(scores)} trials)")
        axes.set_xscale("log")
        figure.legend(loc="outside lower center", frameon=False, ncols=3)
        text = f"{column}: what the best of n trials is expected to score (Tang et al. 2020)."
        figures[f"trials_{name}_{column}"] = figure, text
    return figures
