"""The figures of a study's report: {file name: (figure, caption below it)}."""

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bitfit.results import plots
from bitfit.study import results, statistics
from bitfit.study.cells import Study, slug
from bitfit.study.results import Entries, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = dict[str, tuple["Figure", str]]
AT_BEST_RATE = (
    "mean over the seeds ± standard deviation, at each method's best learning rate at the last "
    "epoch."
)


def all_figures(study: Study, entries: Entries) -> Figures:
    """Return all figures for which there is data."""
    figures: Figures = {}
    for model in dict.fromkeys(key[0] for key in entries):
        of_model = {key: entry for key, entry in entries.items() if key[0] == model}
        on_all_rows = {key: entry for key, entry in of_model.items() if key[3] is None}
        name, columns = slug(model), by_column(on_all_rows)
        figures |= heatmaps(study, on_all_rows, name) | size_curves(of_model, name)
        figures |= gaps(on_all_rows, name) | learning_curves(columns, name) | trials(columns, name)
    return figures


def by_column(entries: Entries) -> dict[str, dict[str, Entry]]:
    """Return {column: {row: entry}} of the entries with a run that did not diverge."""
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    for (_, row, column, _), entry in entries.items():
        if not np.isnan(entry.results.logits[entry.split]).all():
            found[column][row] = entry
    return found


def heatmaps(study: Study, entries: Entries, name: str) -> Figures:
    """Return Figure 1, the change of each bias term, for all terms and for b_q + b_m2."""
    figures: Figures = {}
    for (_, row, column, _), entry in entries.items():
        shown = row in ("bitfit", "b_m2+b_q") and column != "MNLI-mm"
        if shown and (found := results.bias_changes(study, entry)):
            changes, seeds = found
            figure = plots.bias_heatmap(changes, f"{name}, {row}, {column}, mean of {seeds} seeds")
            text = f"Figure 1 of the paper, for {row} on {column}: mean absolute change per layer."
            figures[f"figure1_{name}_{row}_{column}"] = figure, text
    return figures


def size_curves(entries: Entries, name: str) -> Figures:
    """Return Figure 2, the scores over the number of training examples."""
    figures: Figures = {}
    scores = results.score_frame(entries)
    scores = scores[(scores["selection"] == "split") & scores["train_size"].notna()]
    for (column, metric), of_column in scores.groupby(["column", "metric"], sort=False):
        xlabel = "training examples (line: mean; band: ± standard deviation over seeds)"
        figure, axes = plots.curve_figure(f"{name}, {column}", xlabel, f"validation {metric} × 100")
        for row in plots.METHOD_STYLES:
            of_row = of_column[of_column["row"] == row].set_index("train_size").sort_index()
            plot_mean(axes, row, of_row)
        plots.use_log_counts(axes, sorted(of_column["train_size"].unique().astype(int)))
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
        text = f"Figure 2 of the paper, on {column}: mean over the seeds ± standard deviation."
        figures[f"figure2_{name}_{column}"] = figure, text
    return figures


def plot_mean(axes: "Axes", row: str, curve: pd.DataFrame) -> None:
    """Draw the columns mean and std of a method: a line, and a band of one deviation around it."""
    std = curve["std"].fillna(0)
    band = curve["mean"] - std, curve["mean"] + std
    if len(curve):
        plots.plot_curve(axes, curve["mean"], plots.METHOD_STYLES[row], label=row, band=band)


def gaps(entries: Entries, name: str) -> Figures:
    """Return the figure of the gap between train and validation score, a bar for each method."""
    from matplotlib.patheffects import withStroke

    frame = results.train_gaps(entries)
    if frame.empty:
        return {}
    columns = frame.groupby("column", sort=False)["metric"].first()  # {column: metric}
    rows = [row for row in plots.METHOD_STYLES if row in set(frame["row"])]
    caption = f"{name}: gap between train and validation score in the last epoch"
    figure = plots.new_figure(max(6, 1.8 + 1.7 * len(columns)), 4.5, caption)
    axes, width = figure.subplots(), 0.8 / len(rows)
    hatches = ("", "//", "..", "\\\\", "xx", "**", "--", "oo", "++")  # to tell bars apart in grey
    for i, row in enumerate(rows):
        bars = frame[frame["row"] == row].set_index("column").reindex(columns.index)
        x = np.arange(len(columns)) + (i - (len(rows) - 1) / 2) * width
        color, hatch = plots.METHOD_STYLES[row].color, hatches[list(plots.METHOD_STYLES).index(row)]
        drawn = axes.bar(x, bars["gap"], width, yerr=bars["std"], color=color, label=row,
                 hatch=hatch, edgecolor="white", linewidth=0.5,
                 error_kw={"elinewidth": 0.8})  # fmt: skip
        for whiskers in drawn.errorbar[2] if drawn.errorbar else ():  # visible on black bars too
            whiskers.set_path_effects([withStroke(linewidth=2.4, foreground="white")])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(columns)), [f"{c}\n{m}" for c, m in columns.items()])
    axes.set_xlabel("task and metric\n(bar: mean; whisker: ± standard deviation over seeds)")
    axes.set_ylabel("train - validation score × 100")
    figure.legend(loc="outside lower center", frameon=False, ncols=min(len(rows), 4))
    text = f"Generalization gap: train minus validation score in the last epoch, {AT_BEST_RATE}"
    sampled = [entry.results.cell.args["train_score_rows"] or 0 for entry in entries.values()]
    if most := max(sampled):
        text += f" With --train-score-rows, train scores are of {most:,} training examples."
    return {f"gap_{name}": (figure, text)}


def learning_curves(columns: dict[str, dict[str, Entry]], name: str) -> Figures:
    """Return a figure for each column: the validation score by epoch, a line for each method."""
    figures: Figures = {}
    for column, of_row in columns.items():
        curves = {row: results.curve_over_seeds(entry) for row, entry in of_row.items()}
        xlabel = "epoch (line: mean; band: ± standard deviation over seeds)"
        ylabel = f"validation {main_metric(of_row)} × 100"
        epochs = [epoch for curve in curves.values() for epoch in curve.index]
        figure, axes = plots.curve_figure(f"{name}, {column}", xlabel, ylabel, epochs=epochs)
        for row, curve in curves.items():
            plot_mean(axes, row, curve)
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
        figures[f"curves_{name}_{column}"] = figure, f"{column}: {AT_BEST_RATE}"
    return figures


def main_metric(of_row: dict[str, Entry]) -> str:
    """Return the main metric of the entries of one column."""
    return next(iter(of_row.values())).results.task.metrics[0]


def trials(columns: dict[str, dict[str, Entry]], name: str) -> Figures:
    """Return a figure for each column: the expected best score of n trials.

    A trial is one epoch of one learning rate and seed.
    """
    figures: Figures = {}
    for column, of_row in columns.items():
        xlabel = "trials (a trial is one epoch of one learning rate and seed)"
        ylabel = f"expected best {main_metric(of_row)} × 100"
        figure, axes = plots.curve_figure(f"{name}, {column}", xlabel, ylabel)
        most = 1
        for row, entry in of_row.items():
            logits = entry.results.logits[entry.split]
            labels = entry.results.labels[entry.split]
            scores = 100 * statistics.main_scores(entry.results.task, logits, labels).ravel()
            if np.isnan(scores).all():
                continue
            budgets = np.unique(np.geomspace(1, len(scores), 40).astype(int))
            best = pd.Series(statistics.expected_best(scores, budgets), budgets)
            label = f"{row} ({len(scores)} trials)"
            plots.plot_curve(axes, best, plots.METHOD_STYLES[row], label=label)
            most = max(most, len(scores))
        plots.use_log_counts(axes, plots.count_ticks(most))
        figure.legend(loc="outside lower center", frameon=False, ncols=3)
        text = f"{column}: expected best score of n trials (Tang et al. 2020)."
        figures[f"trials_{name}_{column}"] = figure, text
    return figures
