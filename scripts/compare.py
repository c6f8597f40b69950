"""Compare runs in one table, and with --plot in one figure; a sweep's folder stands for its runs.

python scripts/compare.py out/a out/b --plot out/methods.png
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from bitfit.signals import catch_signals

if __name__ == "__main__":
    catch_signals("compare.py")

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import utils
from bitfit.cli import exit_status
from bitfit.data.tasks import TASKS
from bitfit.model.run import format_seeds
from bitfit.parsing import OneLineParser, new_file
from bitfit.results import escape, plots
from bitfit.results.scores import explain_unreadable, read_metrics, select_scores
from bitfit.study.protocol import ROWS, Row
from utils import UserError, escape_unprintable

LABELS = ["task", "model", "method", "learning rate", "trained"]  # equal for runs of one curve


class Run(NamedTuple):
    """A run as a row of the table, and its learning curve."""

    row: dict[str, Any]
    curve: pd.Series  # the main validation score × 100 by epoch
    method: str  # its name in METHOD_STYLES, or "" if it is none of them


def run_folders(folder: str) -> list[Path]:
    """Return the folders of a sweep's scored runs, or the folder itself if it is a single run."""
    path = Path(folder)
    if (path / "metrics.json").exists():
        return [path]
    runs = [file.parent for file in path.glob("lr*/metrics.json")]
    if not runs:
        raise UserError(f"{folder} has no scores: give the folder of a scored run or sweep")
    return sorted(runs)


def read_run(folder: Path) -> Run:
    """Return the run of a folder; UserError if its files cannot be read."""
    with explain_unreadable(folder):
        return make_run(*read_metrics(folder), finished=is_finished(folder))


def is_finished(folder: Path) -> bool:
    """Return whether a run has all its files.

    run_glue.py says so in args.json, in the folder of the run or of the single command. A run of
    GLUEvaluator in Python has no args.json; an interrupted one has checkpoints.
    """
    for place in (folder, folder.absolute().parent):
        if (place / "args.json").exists():
            return json.loads((place / "args.json").read_text(encoding="utf-8"))["finished"]
    return not (folder / "checkpoints").exists()


def make_run(metrics: dict[str, Any], scores: pd.DataFrame, finished: bool) -> Run:
    """Return the run of the content of metrics.json and metrics.csv."""
    metric, task = metrics["main_metric"], metrics["task"]
    validation = next(iter(scores.loc[scores["split"] != "train", "split"]), "")
    curve, train = (
        100 * select_scores(scores, split, metric).set_index("epoch")["value"]
        for split in (validation, "train")
    )
    end = " (not finished)" * (not finished)
    row = {
        "task": TASKS[task].folder if task in TASKS else escape_unprintable(task),
        "model": escape_unprintable(Path(metrics["model"]).name),
        "method": describe_method(metrics),
        "learning rate": f"{metrics['learning_rate']:g}",
        "seed": format_seeds(metrics).removeprefix("seed "),
        "trained": f"{metrics['trained_parameters'] / metrics['all_parameters']:.2%}",
        "score": metric,
        "train": f"{train.iloc[-1]:.1f}" if len(train) else "-",
        "validation": (f"{curve.iloc[-1]:.1f}" if len(curve) else "-") + end,
        "best": f"{curve.max():.1f} (epoch {curve.idxmax()})" if curve.notna().any() else "-",
        "seconds": f"{sum(metrics['seconds'].values()):.1f}",
    }
    return Run(row, curve, study_method(metrics))


def describe_method(metrics: dict[str, Any]) -> str:
    """Return the fine-tune type with bias terms, and how the run differs from others otherwise."""
    terms = metrics["bias_terms"]
    method = metrics["fine_tune_type"] + f" ({', '.join(terms)})" * (terms not in ([], ["all"]))
    if start := metrics.get("started_from"):
        method += f" from {start['task']}"
    if stopped := metrics.get("stopped"):
        method += f" (stopped {stopped.partition(':')[0]})"
    method += " (diverged)" * bool(metrics.get("diverged"))
    method += " (added biases)" * metrics.get("add_biases", False)
    return method + " (random encoder)" * metrics["random_encoder"]


def study_method(metrics: dict[str, Any]) -> str:
    """Return the name of a run's method in METHOD_STYLES, or "" if it is none of them."""
    if metrics["random_encoder"] or "started_from" in metrics:
        return ""
    terms = tuple(sorted(metrics["bias_terms"]))
    row = Row(metrics["fine_tune_type"], () if terms == ("all",) else terms)
    return next((name for name, known in ROWS.items() if known == row), "")


def group_by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs in groups that differ in nothing but the seed, in the methods' order."""
    rows = pd.DataFrame([run.row for run in runs])
    groups = [[runs[i] for i in rows] for rows in rows.groupby(LABELS, sort=False).indices.values()]
    order = [*plots.METHOD_STYLES, ""]
    return sorted(groups, key=lambda group: order.index(group[0].method))


def line_styles(methods: list[str]) -> list[plots.LineStyle]:
    """Return a style for each line: its method's style where the method occurs once.

    Other lines get styles of other colors, as far as there are any.
    """
    known = [plots.METHOD_STYLES.get(m) if methods.count(m) == 1 else None for m in methods]
    used = {style.color for style in known if style}
    others = map(plots.series_style, range(7 * len(methods)))
    free = iter(sorted(others, key=lambda style: style.color in used))
    return [style or next(free) for style in known]


def group_label(runs: list[Run], differing: list[str]) -> str:
    """Return the text of the legend for runs that differ in nothing but the seed."""
    row, last = runs[0].row, sum(run.curve.iloc[-1] for run in runs) / len(runs)
    score = f"{last:.1f} on average" if len(runs) > 1 else row["validation"]
    has_pairs = any("data" in run.row["seed"] for run in runs)
    single = row["seed"] if has_pairs else f"seed {row['seed']}"
    seeds = f"{len(runs)} seed{' pairs' if has_pairs else 's'}" if len(runs) > 1 else single
    names = ", ".join([*(row[name] for name in differing), row["method"]])
    details = f"{row['trained']} trained, learning rate {row['learning rate']}, {seeds}"
    return textwrap.fill(f"{names}: {score} ({details})", 88)


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Plot the main validation score over the epochs: a line per method and learning rate.

    The line is the mean over the seeds, and the band reaches from the worst to the best seed.
    """
    runs = [run for run in runs if len(run.curve)]
    if not runs:
        raise UserError("--plot needs a run with scores: all runs diverged before an evaluation")
    rows, groups = pd.DataFrame([run.row for run in runs]), group_by_seed(runs)
    shared = [name for name in ("task", "model") if rows[name].nunique() == 1]
    caption = "".join(f"{rows[name][0]}, " for name in shared) + "validation score"
    metrics = " or ".join(rows["score"].unique())
    differing = [name for name in ("task", "model") if name not in shared]
    labels = [group_label(group, differing) for group in groups]
    xlabel = "epoch"
    if len(groups) < len(runs):
        xlabel += " (line: mean over the seeds; band: from the worst to the best seed)"
    height = 4 + 0.22 * sum(label.count("\n") + 1 for label in labels)
    epochs = [epoch for run in runs for epoch in run.curve.index]
    ylabel = f"validation {metrics} × 100"
    figure, axes = plots.curve_figure(caption, xlabel, ylabel, epochs=epochs, height=height)
    styles = line_styles([group[0].method for group in groups])
    for group, style, label in zip(groups, styles, labels, strict=True):
        curves = pd.concat([run.curve for run in group], axis=1)
        band = (curves.min(axis=1), curves.max(axis=1)) if len(group) > 1 else None
        plots.plot_curve(axes, curves.mean(axis=1), style, label=escape.plot(label), band=band)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    plots.save_figure(figure, path)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run or a sweep")
    parser.add_argument("--plot", metavar="FILE", type=new_file(*plots.FIGURE_SUFFIXES),
                        help="draw the learning curves (.png, .pdf or .svg)")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> None:
    runs = [read_run(path) for folder in args.folders for path in run_folders(folder)]
    if args.plot:
        plot_runs(runs, args.plot)
    utils.print_result(pd.DataFrame([run.row for run in runs]).to_string(index=False))


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    utils.setup_logging()
    return exit_status.run_cli("compare.py", lambda signals: run(args))


if __name__ == "__main__":
    sys.exit(main())
