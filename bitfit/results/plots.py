"""Figures of learning curves and of changes of bias terms."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bitfit.data.tasks import Task
from bitfit.files import atomic_file, write_text
from bitfit.model.trainable import TERMS, layer_and_name
from bitfit.results.scores import best_epochs

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIXED = "fixed: its gradient is zero"


def new_figure(width: float, height: float, caption: str) -> "Figure":
    """A figure that no screen is needed for and no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    caption = textwrap.fill(caption, int(12 * width))  # 12 letters an inch
    figure.suptitle(caption, fontsize=10, parse_math=False)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def save_curves(figures: dict[str, "Figure"], folder: str | Path) -> None:
    """{metric: figure} -> learning_curves_<metric>.png"""
    for metric, figure in figures.items():
        save_figure(figure, Path(folder) / f"learning_curves_{metric.lower()}.png")


def learning_curves(
    scores: pd.DataFrame, task: Task, caption: str, folder: str | Path | None = None
) -> dict[str, "Figure"]:
    """{metric: figure}: the metric over the epochs, a line per split, the best one marked."""
    figures = {m: learning_curve(scores, task, caption, m) for m in task.metrics}
    if folder:
        save_curves(figures, folder)
    return figures


def learning_curve(scores: pd.DataFrame, task: Task, caption: str, metric: str) -> "Figure":
    best = best_epochs(scores, task).iloc[0]
    main = f"{task.validation_splits[0].replace('_', ' ')} {task.metrics[0]}"
    x = f"epoch (vertical line: best {main}, epoch {best})"
    figure, axes = curve_figure(caption, x, f"{metric} x 100")
    by_split = scores[scores["metric"] == metric].groupby("split", sort=False)
    for number, (split, of) in enumerate(by_split):  # train is the first
        values = 100 * of.set_index("epoch")["value"]
        last = f"last {values.iloc[-1]:.1f}, best epoch {values[best]:.1f}"
        label = f"{split.replace('_', ' ')} ({last})"
        color = f"C{number - 1}" if number else "0.75"
        width = 1.5 if number else 4  # to be seen where the lines meet
        axes.plot(values.index, values, "o-", ms=3.5, linewidth=width, color=color, label=label)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))  # no score is above 100
    axes.axvline(best, color="0.8", linewidth=1, zorder=0)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def curve_figure(caption: str, x: str, y: str, height: float = 5) -> tuple["Figure", "Axes"]:
    """A figure, so many inches high, and its axes for scores over epochs."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, height, caption)
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure, axes


def bias_changes(
    start: dict[str, "torch.Tensor"],
    end: dict[str, "torch.Tensor"],
    fixed: dict[str, list[list[int]]] | None = None,
) -> tuple[list[str], np.ndarray]:
    """The paper's amount of change, 1/dim(b) * |b_0 - b_F|_1, per term and layer.

    Args:
        start, end: {parameter name: values} before and after training.
        fixed: {parameter name: [[start, stop], ...]} of what cannot move, and is not counted.

    Returns:
        (names, changes): the layers' bias names by falling total change, and (names, layers); NaN
        where a layer has no such bias, or one that is fixed. Where a model has several stacks of
        layers (CANINE), the names begin with the stack's.
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
    table = pd.DataFrame(rows, columns=["stack", "layer", "name", "change"])
    if table["stack"].nunique() > 1:
        table["name"] = table["stack"] + ": " + table["name"]
    table = table.pivot(index="name", columns="layer", values="change")
    table = table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    return list(table.index), table.to_numpy()


def changes_table(names: list[str], changes: np.ndarray) -> pd.DataFrame:
    """The same as a table: a row per term, a column per layer, counted from 1."""
    return pd.DataFrame(changes, index=names, columns=range(1, changes.shape[1] + 1))


def save_changes(names: list[str], changes: np.ndarray, path: str | Path) -> None:
    write_text(path, changes_table(names, changes).to_csv(index_label="term"))


def bias_heatmap(names: list[str], changes: np.ndarray, caption: str) -> "Figure":
    """The paper's figure 1: how far each bias term moved, per layer, with the average.

    Args:
        names, changes: as from `bias_changes`.
    """
    from seaborn import heatmap

    changes = np.column_stack([changes, pd.DataFrame(changes).mean(axis=1)])
    layers, fixed = changes.shape[1] - 1, np.isnan(changes).all(axis=1)
    symbols = {name: rf"$\mathbf{{{symbol}}}^{{\ell}}$" for name, symbol in TERMS.values()}
    longest = max((len(name) for name in names if name not in symbols), default=0)
    width = max(6.0, 2.5 + 0.62 * changes.shape[1] + 0.11 * longest)
    figure = new_figure(width, 2 + 0.5 * len(names), caption)
    axes = figure.subplots()
    columns, rows = [*range(1, layers + 1), "Avg."], [symbols.get(name, name) for name in names]
    bar = {"label": "mean absolute change"}
    highest = 1.0 if fixed.all() else None
    heatmap(changes, ax=axes, cmap="Blues", vmin=0, vmax=highest, xticklabels=columns,
            yticklabels=rows, cbar_kws=bar)  # fmt: skip
    for row in np.flatnonzero(fixed):
        axes.text((layers + 1) / 2, row + 0.5, FIXED, ha="center", va="center", color="0.4")
    axes.axvline(layers, color="white", linewidth=4)
    axes.tick_params(axis="y", rotation=0, labelsize=13)
    axes.tick_params(axis="x", rotation=0)
    axes.set_xlabel(r"layer $\ell$")
    axes.set_ylabel("")
    return figure
