"""What people look at: metrics files, tables, learning curves, the bias-change heatmap.

Scores are one long table, a row for each (run, epoch, split, metric); all that is shown of them is
grouped and pivoted from it.
"""

import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from bitfit.trainable import TERMS, count, layer_and_name, term_names
from utils import whole_file, write_text

FIXED = "fixed: its gradient is zero"


def frame_of(scores):
    """The long table of rows (run's name, epoch, split, metric, value)."""
    return pd.DataFrame(scores, columns=["run", "epoch", "split", "metric", "value"])


def evaluations(scores):
    """{split: {metric: [value per scored epoch]}} of one run."""
    return {
        split: {
            metric: list(values) for metric, values in of.groupby("metric", sort=False)["value"]
        }
        for split, of in scores.groupby("split", sort=False)
    }


def main_rows(scores, task):
    """The rows of the main metric of the first validation split."""
    main = (scores["split"] == task.validation_splits[0]) & (scores["metric"] == task.metrics[0])
    return scores[main]


def main_scores(scores, task):
    """The same, (epochs, runs)."""
    return main_rows(scores, task).pivot(index="epoch", columns="run", values="value")


def best_epochs(scores, task):
    """{run: the epoch with its highest main score, the earliest of equals}"""
    return main_scores(scores, task).fillna(-np.inf).idxmax()


def summary(scores, task):
    """The last and the best evaluation of one run: {"last"|"best": {"epoch", split: {...}}}"""
    if scores.empty:
        return {}
    epochs = {"last": scores["epoch"].iloc[-1], "best": best_epochs(scores, task).iloc[0]}
    return {
        name: {"epoch": int(epoch)} | {
            split: {metric: values[0] for metric, values in of.items()}
            for split, of in evaluations(scores[scores["epoch"] == epoch]).items()
        }
        for name, epoch in epochs.items()
    }  # fmt: skip


def facts(evaluator):
    """What metrics.json says of every run beside what it measured."""
    return {
        "task": evaluator.task_name,
        "model": str(evaluator.model_name),
        "model_commit": evaluator.model_commit,
        "random_encoder": evaluator.random_encoder,
        "fine_tune_type": evaluator.fine_tune_type,
        "bias_terms": term_names(evaluator.components),
        "validation_rows": {
            split: len(evaluator.tokens(split).lengths)
            for split in evaluator.task.validation_splits
        },
        "runs_in_one_pass": len(evaluator.runs),
        "trained_parameters": count(evaluator.model, evaluator.chosen),
        "zero_gradient": evaluator.zero_gradient,
        "all_parameters": sum(p.numel() for p in evaluator.model.parameters()),
    }


def write_metrics(folder, task, record, scores, facts):
    """metrics.json (facts, every score, last and best) and metrics.csv (one score a row)."""
    content = facts | record.run._asdict()
    content |= {"diverged": record.diverged, "train_loss": record.train_loss}
    content["seconds"] = {name: round(value, 2) for name, value in record.seconds.items()}
    content |= {"epochs": scores["epoch"].unique().tolist(), "evaluations": evaluations(scores)}
    content |= {"main_metric": task.metrics[0]} | summary(scores, task)
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    curve = scores.groupby(["split", "metric"], sort=False).ngroup()
    table = scores.iloc[curve.argsort(kind="stable")][["epoch", "split", "metric", "value"]]
    write_text(folder / "metrics.csv", table.to_csv(index=False))


def read_metrics(folder):
    """(metrics.json, the table metrics.csv) of a run; OSError, ValueError and others where there
    is none, or they were edited."""
    content = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    for name, kind in (("seconds", dict), ("train_loss", list), ("diverged", str)):
        if content.get(name) is not None and not isinstance(content[name], kind):
            raise ValueError(f"metrics.json: {name} is {json.dumps(content[name])}")
    table = pd.read_csv(Path(folder) / "metrics.csv")
    return content, table[["epoch", "split", "metric", "value"]].astype({"value": float})


def score_table(scores, task):
    """The scores of one run as text, x 100 as the paper prints them: a row per split and metric."""
    if scores.empty:
        return "nothing was evaluated"
    table = summary(scores, task)
    last, best = table["last"], table["best"]
    rows = [
        (split, metric, f"{100 * value:.1f}", f"{100 * best[split][metric]:.1f}")
        for split in scores["split"].unique()
        for metric, value in last[split].items()
    ]
    columns = ["split", "metric", f"last (epoch {last['epoch']})", f"best (epoch {best['epoch']})"]
    return pd.DataFrame(rows, columns=columns).to_string(index=False)


def one_line_scores(scores, task, loss):
    """One evaluation, for the log: all scores of one run, or the main ones of many."""
    shown = 100 * scores["value"]
    runs = scores["run"].nunique()
    if runs == 1:
        each = zip(scores["split"], scores["metric"], shown, strict=True)
        return f"loss {loss:.3f}  " + "  ".join(f"{s} {m} {value:.1f}" for s, m, value in each)
    split, metric = task.validation_splits[0], task.metrics[0]
    main = 100 * main_scores(scores, task).iloc[-1]
    main = main[scores["run"].unique()]  # in the runs' order: the first of equals is named
    return (
        f"{runs} runs: loss {loss:.3f}  {split} {metric} {main.mean():.1f} on average, "
        f"{main.max():.1f} the best ({main.idxmax()})"
    )


def new_figure(width, height, caption):
    """A figure that no screen is needed for and no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    caption = textwrap.fill(caption, int(12 * width))  # 12 letters an inch
    figure.suptitle(caption, fontsize=10, parse_math=False)
    return figure


def save_figure(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def save_curves(figures, folder):
    """{metric: figure} -> learning_curves_<metric>.png"""
    for metric, figure in figures.items():
        save_figure(figure, Path(folder) / f"learning_curves_{metric.lower()}.png")


def learning_curves(scores, task, caption, folder=None):
    """{metric: figure}: the metric over the epochs, a line per split, the best one marked."""
    figures = {m: learning_curve(scores, task, caption, m) for m in task.metrics}
    if folder:
        save_curves(figures, folder)
    return figures


def learning_curve(scores, task, caption, metric):
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


def curve_figure(caption, x, y, height=5):
    """A figure, so many inches high, and its axes for scores over epochs."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, height, caption)
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure, axes


def bias_changes(start, end, fixed=None):
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


def changes_table(names, changes):
    """The same as a table: a row per term, a column per layer, counted from 1."""
    return pd.DataFrame(changes, index=names, columns=range(1, changes.shape[1] + 1))


def save_changes(names, changes, path):
    write_text(path, changes_table(names, changes).to_csv(index_label="term"))


def bias_heatmap(names, changes, caption):
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


def write_predictions(path, task, predicted):
    """A file for the GLUE server: `index<TAB>prediction`, in the order of the test rows.

    Raises:
        OSError: what the disk holds is not a line per prediction.
    """
    labels = task.written_labels
    low, high = task.score_range
    digits = max(4, 4 - math.floor(math.log10(high - low)))  # four for STS-B, from 0 to 5
    words = [f"{own:.{digits}f}" if task.is_regression else labels[own] for own in predicted]
    lines = ["index\tprediction", *(f"{i}\t{word}" for i, word in enumerate(words))]
    write_text(path, "\n".join(lines) + "\n")
    count = Path(path).read_text(encoding="utf-8").count("\n")
    if count != len(predicted) + 1:
        raise OSError(f"{path} has {count} lines for {len(predicted)} predictions")
