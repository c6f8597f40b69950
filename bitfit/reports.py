"""What people look at: metrics files, tables, learning curves, the bias-change heatmap."""

import json
import textwrap
from pathlib import Path

import numpy as np

from bitfit.trainable import TERMS, count, layer_and_name, term_names
from utils import whole_file, write_text

SPLIT_COLORS = {"train": "0.75", "validation": "C0", "validation_matched": "C0"}


def metrics_rows(epochs, evaluations):
    """[(epoch, split, metric, value)]"""
    return [
        (epoch, split, metric, value)
        for split, metrics in evaluations.items()
        for metric, values in metrics.items()
        for epoch, value in zip(epochs, values, strict=True)
    ]


def best_index(task, evaluations):
    """Where the main metric of the first validation split was highest, the earliest of equals."""
    return int(np.argmax(evaluations[task.validation_splits[0]][task.metrics[0]]))


def summary(task, record):
    """The last and the best evaluation: {"last"|"best": {"epoch", split: {metric: value}}}"""

    def at(index):
        scores = {s: {m: v[index] for m, v in ms.items()} for s, ms in record.evaluations.items()}
        return {"epoch": record.epochs[index]} | scores

    if not record.epochs:
        return {}
    return {"last": at(-1), "best": at(best_index(task, record.evaluations))}


def facts(evaluator, record):
    """What metrics.json says of a run beside what it measured."""
    return {
        "task": evaluator.task_name,
        "model": str(evaluator.model_name),
        "random_encoder": evaluator.random_encoder,
        "fine_tune_type": evaluator.fine_tune_type,
        "bias_terms": term_names(evaluator.components),
        "learning_rate": record.run.learning_rate,
        "seed": record.run.seed,
        "runs_in_one_pass": len(evaluator.runs),
        "trained_parameters": count(evaluator.model, evaluator.chosen),
        "all_parameters": sum(p.numel() for p in evaluator.model.parameters()),
    }


def write_metrics(output_path, task, record, facts):
    """metrics.json (facts, every score, last and best) and metrics.csv (one score a row)."""
    import pandas as pd

    folder = Path(output_path)
    content = facts | {
        "diverged": record.diverged,
        "train_loss": record.train_loss,
        "seconds": {name: round(value, 2) for name, value in record.seconds.items()},
        "epochs": record.epochs,
        "evaluations": record.evaluations,
        "main_metric": task.metrics[0],
    }
    content |= summary(task, record)
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    table = pd.DataFrame(
        metrics_rows(record.epochs, record.evaluations),
        columns=["epoch", "split", "metric", "value"],
    )
    write_text(folder / "metrics.csv", table.to_csv(index=False))


def score_table(task, record):
    """The scores as text, x 100 as the paper prints them: a row per split and metric."""
    import pandas as pd

    epochs, evaluations = record.epochs, record.evaluations
    if not epochs:
        return "nothing was evaluated"
    best = best_index(task, evaluations)
    rows = [
        (split, metric, f"{100 * values[-1]:.1f}", f"{100 * values[best]:.1f}")
        for split, metrics in evaluations.items()
        for metric, values in metrics.items()
    ]
    columns = ["split", "metric", f"last (epoch {epochs[-1]})", f"best (epoch {epochs[best]})"]
    return pd.DataFrame(rows, columns=columns).to_string(index=False)


def one_line_scores(evaluations):
    """The latest scores, for the log."""
    return "  ".join(
        f"{split} {metric} {100 * values[-1]:.1f}"
        for split, metrics in evaluations.items()
        for metric, values in metrics.items()
    )


def new_figure(width, height, caption):
    """A figure that no screen is needed for and no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(caption, int(12 * width)), fontsize=10)  # 12 letters an inch
    return figure


def save_figure(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def save_curves(figures, folder):
    """{metric: figure} -> learning_curves_<metric>.png"""
    for metric, figure in figures.items():
        save_figure(figure, Path(folder) / f"learning_curves_{metric.lower()}.png")


def learning_curves(task, record, caption, folder=None):
    """{metric: figure}: the metric over the epochs, a line per split, the best one marked."""
    figures = {m: learning_curve(task, record, caption, m) for m in task.metrics}
    if folder:
        save_curves(figures, folder)
    return figures


def learning_curve(task, record, caption, metric):
    from matplotlib.ticker import MaxNLocator

    epochs, evaluations = record.epochs, record.evaluations
    figure = new_figure(7, 5, caption)
    axes = figure.subplots()
    best = best_index(task, evaluations)
    for split, metrics in evaluations.items():
        values = 100 * np.array(metrics[metric])
        label = f"{split.replace('_', ' ')} (last {values[-1]:.1f}, best epoch {values[best]:.1f})"
        color = SPLIT_COLORS.get(split, "C1")
        width = 4 if split == "train" else 1.5  # to be seen where the lines meet
        axes.plot(epochs, values, "o-", ms=3.5, linewidth=width, color=color, label=label)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))  # no score is above 100
    axes.axvline(epochs[best], color="0.8", linewidth=1, zorder=0)
    main = f"{task.validation_splits[0].replace('_', ' ')} {task.metrics[0]}"
    axes.set_xlabel(f"epoch (grey line: best {main}, epoch {epochs[best]})")
    axes.set_ylabel(f"{metric} x 100")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def bias_changes(start, end):
    """The paper's amount of change, 1/dim(b) * |b_0 - b_F|_1, per term and layer.

    Args:
        start, end: {parameter name: values} before and after training.

    Returns:
        (names, changes): the layers' bias names by falling total change, and (names, layers).
    """
    import pandas as pd

    table = pd.DataFrame(
        [
            (*layer_and_name(name), (end[name] - start[name]).abs().mean().item())
            for name in start
            if layer_and_name(name)[0] is not None
        ],
        columns=["layer", "name", "change"],
    ).pivot(index="name", columns="layer", values="change")
    table = table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    return list(table.index), table.to_numpy()


def bias_heatmap(start, end, caption):
    """The paper's figure 1: how far each bias term moved, per layer, with the average."""
    from seaborn import heatmap

    names, changes = bias_changes(start, end)
    changes = np.column_stack([changes, changes.mean(axis=1)])
    layers = changes.shape[1] - 1
    symbols = {name: rf"$\mathbf{{{symbol}}}^{{\ell}}$" for name, symbol in TERMS.values()}
    width = max(6.0, 2.5 + 0.62 * changes.shape[1])
    figure = new_figure(width, 2 + 0.5 * len(names), caption)
    axes = figure.subplots()
    heatmap(
        changes,
        ax=axes,
        cmap="Blues",
        vmin=0,
        xticklabels=[*map(str, range(1, layers + 1)), "Avg."],
        yticklabels=[symbols.get(name, name) for name in names],
        cbar_kws={"label": "mean absolute change"},
    )
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
    if task.is_regression:
        words = [f"{value:.4f}" for value in predicted]
    else:
        words = [task.written_labels[number] for number in predicted]
    lines = ["index\tprediction", *(f"{i}\t{word}" for i, word in enumerate(words))]
    write_text(path, "\n".join(lines) + "\n")
    count = Path(path).read_text(encoding="utf-8").count("\n")
    if count != len(predicted) + 1:
        raise OSError(f"{path} has {count} lines for {len(predicted)} predictions")
