"""Figures of scores and of changes of bias terms, and the line styles of all figures."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from bitfit.data.tasks import Task
from bitfit.files import atomic_file, write_text
from bitfit.model.trainable import layer_and_name
from bitfit.options import TERMS
from bitfit.results.scores import best_epochs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

FIXED = "fixed: its gradient is zero"
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
MAX_TICKS = 12


class LineStyle(NamedTuple):
    """The style of a method or another series, distinguishable in color and in grey."""

    color: str
    linestyle: str | tuple[int, tuple[int, ...]]
    marker: str


# The methods in their order in all tables and figures. Colors: Okabe and Ito, and Tol for b_v.
METHOD_STYLES = {
    "full_ft": LineStyle("#000000", "-", "o"),
    "bitfit": LineStyle("#0072B2", "-", "s"),
    "b_m2+b_q": LineStyle("#56B4E9", "--", "^"),
    "b_m2": LineStyle("#009E73", "-.", "v"),
    "b_q": LineStyle("#B8A000", ":", "D"),
    "b_v": LineStyle("#882255", (0, (4, 1, 1, 1)), "<"),
    "frozen": LineStyle("#888888", (0, (1, 3)), "x"),
    "rand_uniform": LineStyle("#D55E00", "--", "P"),
    "rand_row_col": LineStyle("#CC79A7", (0, (6, 2, 1, 2)), "*"),
}


def series_style(number: int) -> LineStyle:
    """Return the style of series `number` where the series are not methods.

    Colors, line styles and markers have cycles of different lengths, so that 40 series differ.
    """
    styles = list(METHOD_STYLES.values())
    colors = [styles[i].color for i in (1, 7, 3, 8, 0, 2, 4)]
    lines, markers = ("-", "--", "-.", ":"), ("o", "s", "^", "v", "D", "P", "x", "*", "<")
    return LineStyle(*(cycle[number % len(cycle)] for cycle in (colors, lines, markers)))


def new_figure(width: float, height: float, caption: str) -> "Figure":
    """Return an empty figure that needs neither a screen nor pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    caption = textwrap.fill(caption, int(12 * width))  # 12 letters an inch
    figure.suptitle(caption, fontsize=10, parse_math=False)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure; the suffix, one of FIGURE_SUFFIXES, gives the format."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix[1:])


def save_curves(figures: Mapping[str, "Figure"], folder: Path | str) -> None:
    """Write {metric: figure} as learning_curves_<metric>.png."""
    for metric, figure in figures.items():
        save_figure(figure, Path(folder) / f"learning_curves_{metric.lower()}.png")


def plot_curve(
    axes: "Axes",
    curve: pd.Series,
    style: LineStyle,
    label: str,
    band: tuple[pd.Series, pd.Series] | None = None,
    linewidth: float = 1.5,
) -> None:
    """Draw one series, and a band (low, high) if given."""
    axes.plot(curve.index, curve, label=label, linewidth=linewidth, markersize=4, **style._asdict())
    if band:
        axes.fill_between(curve.index, *band, color=style.color, alpha=0.15, linewidth=0)


def curve_figure(
    caption: str, xlabel: str, ylabel: str, epochs: Iterable[int] = (), height: float = 5
) -> tuple["Figure", "Axes"]:
    """Return a figure and its axes for scores over epochs, with ticks at evaluated epochs.

    Args:
        epochs: the evaluated epochs; without them matplotlib places the ticks.
        height: in inches.
    """
    figure = new_figure(7, height, caption)
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if ticks := epoch_ticks(epochs):
        axes.set_xticks(ticks)
    axes.grid(alpha=0.3)
    return figure, axes


def add_wide_legend(figure: "Figure") -> None:
    """Add a legend below the axes, in one column if its labels are long, and enlarge the figure."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if len(labels) > 3 and max(map(len, labels)) <= 42 else 1
    labels = [textwrap.fill(label, 84) for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, lines - 4))
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=columns)


def epoch_ticks(epochs: Iterable[int]) -> list[int]:
    """Return at most MAX_TICKS of the epochs, evenly spaced, always with the last epoch."""
    unique = sorted({int(epoch) for epoch in epochs})
    step = -(-len(unique) // MAX_TICKS)
    return unique[::-1][:: max(step, 1)][::-1]


def use_log_counts(axes: "Axes", ticks: Iterable[int]) -> None:
    """Give the axes a logarithmic x axis of counts, with ticks at these whole numbers."""
    ticks = list(ticks)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def count_ticks(largest: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to the largest count."""
    digits = range(len(str(largest)))
    return [n for k in digits for n in (10**k, 2 * 10**k, 5 * 10**k) if n <= largest]


def learning_curves(
    scores: pd.DataFrame, task: Task, caption: str, folder: Path | str | None = None
) -> dict[str, "Figure"]:
    """Return {metric: figure} of one run's scores, and write the figures to a folder if given."""
    figures = {m: learning_curve(scores, task, caption, metric=m) for m in task.metrics}
    if folder:
        save_curves(figures, folder)
    return figures


def learning_curve(scores: pd.DataFrame, task: Task, caption: str, metric: str) -> "Figure":
    """Return a metric over the epochs: a line for each split, and the best epoch marked."""
    best = best_epochs(scores, task).iloc[0]
    main = f"{task.validation_splits[0].replace('_', ' ')} {task.metrics[0]}"
    xlabel = f"epoch (vertical line: best {main}, epoch {best})"
    figure, axes = curve_figure(caption, xlabel, f"{metric} × 100", epochs=scores["epoch"])
    by_split = scores[scores["metric"] == metric].groupby("split", sort=False)
    has_train = "train" in by_split.groups
    for number, (split, of_split) in enumerate(by_split):
        values = 100 * of_split.set_index("epoch")["value"]
        last = f"last {values.iloc[-1]:.1f}, best epoch {values[best]:.1f}"
        label = f"{split.replace('_', ' ')} ({last})"
        is_train = split == "train"  # Its line, the first, is thick: it stays visible below others.
        style = LineStyle("0.75", "-", "o") if is_train else series_style(number - has_train)
        plot_curve(axes, values, style, label=label, linewidth=4 if is_train else 1.5)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))  # no score is above 100
    axes.axvline(best, color="0.8", linewidth=1, zorder=0)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def bias_changes(
    start: Mapping[str, "Tensor"],
    end: Mapping[str, "Tensor"],
    fixed: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> pd.DataFrame:
    """Return the paper's amount of change, 1/dim(b) * |b_0 - b_F|_1, of each term and layer.

    Args:
        start, end: {parameter name: values} before and after training.
        fixed: {parameter name: [[start, stop], ...]}: values that cannot move and do not count.

    Returns:
        A row for each term, by falling total change, and a column for each layer, counted from 1;
        NaN where a layer has no such bias, or a fixed one. If a model has several stacks of layers
        (CANINE), a term begins with the name of the stack.
    """
    rows = []
    for name in start:
        layer, term = layer_and_name(name)
        if layer is not None:
            stack = name[: -len(f".{layer}.{term}")]
            moved = (end[name] - start[name]).abs()
            trains = np.ones(len(moved), bool)
            for a, b in (fixed or {}).get(name, ()):
                trains[a:b] = False
            rows.append((stack, layer, term, moved[trains].mean().item()))
    table = pd.DataFrame(rows, columns=["stack", "layer", "term", "change"])
    if table["stack"].nunique() > 1:
        table["term"] = table["stack"] + ": " + table["term"]
    table = table.pivot(index="term", columns="layer", values="change")
    table.columns = range(1, table.shape[1] + 1)
    return table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index]


def term_labels(names: Iterable[str]) -> dict[str, str]:
    """Return {bias name: label}, in the order in which a layer computes.

    A label has the name in --bias-terms and the paper's symbol. Other biases follow without one.
    """
    labels = {name: rf"{term}  $\mathbf{{{symbol}}}^{{\ell}}$"
              for term, (name, symbol) in TERMS.items() if name in names}  # fmt: skip
    return labels | {name: name.removesuffix(".bias") for name in sorted({*names} - {*labels})}


def bias_heatmap(changes: pd.DataFrame, caption: str) -> "Figure":
    """Return the paper's Figure 1: the change of each bias term in each layer, and the average.

    The order of the terms is fixed, so that two heatmaps can be compared.

    Args:
        changes: as from `bias_changes`.
    """
    labels = term_labels(list(changes.index))
    table = changes.loc[list(labels)].assign(**{"Avg.": changes.mean(axis=1)})
    fixed = table["Avg."].isna()
    longest = max(len(label.partition("$")[0]) + 4 for label in labels.values())
    width = max(6.0, 2 + 0.62 * table.shape[1] + 0.1 * longest)
    caption = f"Mean absolute change of each bias term, by layer: {caption}"
    figure = new_figure(width, 2 + 0.5 * len(table), caption)
    axes = figure.subplots()
    # Not seaborn's heatmap: it draws the whole figure once more, to look for overlapping labels.
    mesh = axes.pcolormesh(np.ma.masked_invalid(table.to_numpy()), vmin=0,
                           vmax=1.0 if fixed.all() else None, cmap="Blues")  # fmt: skip
    figure.colorbar(mesh, ax=axes, label="mean absolute change").outline.set_linewidth(0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    layers = table.shape[1] - 1
    axes.set_xticks(np.arange(layers + 1) + 0.5, table.columns)
    axes.set_yticks(np.arange(len(table)) + 0.5, list(labels.values()), va="center")
    for row in np.flatnonzero(fixed):
        axes.text((layers + 1) / 2, row + 0.5, FIXED, ha="center", va="center", color="0.4")
    axes.axvline(layers, color="white", linewidth=4)
    axes.tick_params(axis="y", labelsize=11)
    axes.set_xlabel(r"layer $\ell$")
    return figure


def plot_bias_changes(changes: pd.DataFrame, caption: str, path: Path | str | None) -> "Figure":
    """Return the heatmap of changes, and save it with its numbers as .png and .csv."""
    figure = bias_heatmap(changes, caption)
    if path:
        save_figure(figure, Path(path).with_suffix(".png"))
        write_text(Path(path).with_suffix(".csv"), changes.to_csv())
    return figure
