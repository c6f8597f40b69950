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
from typing import Any

import pandas as pd

import utils
from bitfit.cli import exit_status
from bitfit.data.tasks import TASKS
from bitfit.output_paths import file_error
from bitfit.parsing import OneLineParser
from bitfit.results import escape
from bitfit.results.plots import (
    FIGURE_SUFFIXES,
    METHOD_STYLES,
    LineStyle,
    curve_figure,
    plot_curve,
    save_figure,
    series_style,
)
from bitfit.results.scores import read_metrics, select_scores
from utils import UserError, convert_errors, escape_unprintable, first_line

Run = tuple[dict[str, Any], pd.DataFrame]  # a run's metrics.json and its scores
LABELS = ("task", "model", "method", "learning rate", "trained")  # equal for runs of one curve


def run_folders(folder: str) -> list[Path]:
    """Return the folders of a sweep's scored runs, or the folder itself if it is a single run."""
    path = Path(folder)
    if not (path / "results.csv").exists():
        return [path]
    runs = [file.parent for file in path.glob("lr*/metrics.json")]
    if not runs:
        raise UserError(f"{folder} is a sweep without scored runs: give other folders")
    return sorted(runs)


def read_run(folder: str | Path) -> Run:
    """Return the metrics and scores of a run; raise a UserError where they cannot be read."""

    def unreadable(error: Exception) -> UserError:
        message = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            is_folder = Path(folder).is_dir()
            message = "it has no metrics.json" if is_folder else "there is no such folder"
        elif isinstance(error, OSError):
            message = f"{error.strerror}: {error.filename}"
        return UserError(f"{folder} holds no scores of run_glue.py: {message}")

    with convert_errors(unreadable):
        metrics, scores = read_metrics(folder)
        metrics["finished"] = is_finished(Path(folder))
        describe(metrics, scores)
    return metrics, scores


def is_finished(folder: Path) -> bool:
    """Return whether a run has all its files.

    run_glue.py says so in args.json, in the folder of the run or of the single command. A run of
    GLUEvaluator in Python has no args.json; an interrupted one has checkpoints.
    """
    for place in (folder, folder.absolute().parent):
        if (place / "args.json").exists():
            return json.loads((place / "args.json").read_text(encoding="utf-8"))["finished"]
    return not (folder / "checkpoints").exists()


def task_label(name: str) -> str:
    """Return the task's name as other programs print it, such as CoLA."""
    return TASKS[name].folder if name in TASKS else escape_unprintable(name)


def describe(metrics: dict[str, Any], scores: pd.DataFrame) -> dict[str, Any]:
    """Return a run's row of the table: method, trained share, main score × 100."""
    metric, terms = metrics["main_metric"], metrics["bias_terms"]
    method = metrics["fine_tune_type"] + f" ({', '.join(terms)})" * (terms not in ([], ["all"]))
    if start := metrics.get("started_from"):
        method += f" from {start['task']}"
    method += " (added biases)" * metrics.get("add_biases", False)
    validation = main_curve(metrics, scores)
    train = 100 * select_scores(scores, "train", metric)["value"]
    return {
        "task": task_label(metrics["task"]),
        "model": escape_unprintable(Path(metrics["model"]).name),
        "method": method + " (random encoder)" * metrics["random_encoder"],
        "learning rate": f"{metrics['learning_rate']:g}",
        "seed": metrics["seed"],
        "trained": f"{metrics['trained_parameters'] / metrics['all_parameters']:.2%}",
        "score": metric,
        "train": f"{train.iloc[-1]:.1f}",
        "validation": f"{validation.iloc[-1]:.1f}" + " (not finished)" * (not metrics["finished"]),
        "best": f"{validation.max():.1f} (epoch {validation.idxmax()})",
        "seconds": f"{sum(metrics['seconds'].values()):.1f}",
    }


def main_curve(metrics: dict[str, Any], scores: pd.DataFrame) -> pd.Series:
    """Return the main validation score × 100 by epoch."""
    validation = scores.loc[scores["split"] != "train", "split"].iloc[0]
    main = select_scores(scores, validation, metrics["main_metric"])
    return 100 * main.set_index("epoch")["value"]


def group_by_seed(runs: list[Run]) -> list[list[Run]]:
    """Return the runs in groups that differ in nothing but the seed."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        row = describe(*run)
        groups.setdefault(tuple(row[name] for name in LABELS), []).append(run)
    return list(groups.values())


def study_method(metrics: dict[str, Any]) -> str:
    """Return the name of a run's method in METHOD_STYLES, or "" if it is none of them."""
    if metrics["random_encoder"] or "started_from" in metrics:
        return ""
    terms = tuple(sorted(metrics["bias_terms"]))
    names = {("intermediate", "query"): "b_m2+b_q", ("intermediate",): "b_m2", ("query",): "b_q",
            ("value",): "b_v"}  # fmt: skip
    return metrics["fine_tune_type"] if terms in ((), ("all",)) else names.get(terms, "")


def in_study_order(groups: list[list[Run]]) -> list[list[Run]]:
    """Return the groups in the order of METHOD_STYLES; methods that it lacks are last."""
    positions = {name: number for number, name in enumerate(METHOD_STYLES)}
    return sorted(
        groups, key=lambda group: positions.get(study_method(group[0][0]), len(positions))
    )


def line_styles(methods: list[str]) -> list[LineStyle]:
    """Return a style for each line: its method's style where the method occurs once.

    Other lines get styles of other colors and markers, as far as there are any.
    """
    known = [METHOD_STYLES.get(m) if methods.count(m) == 1 else None for m in methods]
    used = {value for style in known if style for value in (style.color, style.marker)}
    others = [series_style(number) for number in range(7 * len(methods))]
    free = iter(sorted(others, key=lambda style: (style.color in used, style.marker in used)))
    return [style or next(free) for style in known]


def group_label(runs: list[Run], differing: list[str]) -> str:
    """Return the text of the legend for runs that differ in nothing but the seed."""
    row, curves = describe(*runs[0]), [main_curve(*run) for run in runs]
    last = sum(curve.iloc[-1] for curve in curves) / len(curves)
    score = f"{last:.1f} on average" if len(runs) > 1 else row["validation"]
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"seed {row['seed']}"
    names = ", ".join([*(row[name] for name in differing), row["method"]])
    details = f"{row['trained']} trained, learning rate {row['learning rate']}, {seeds}"
    return textwrap.fill(f"{names}: {score} ({details})", 88)


def plot_runs(runs: list[Run], path: str | Path) -> None:
    """Plot the main validation score over the epochs: a line per method and learning rate.

    The line is the mean over the seeds, and the band reaches from the worst to the best seed.
    """
    rows, groups = [describe(*run) for run in runs], in_study_order(group_by_seed(runs))
    names = ("task", "model")
    shared = [name for name in names if len({row[name] for row in rows}) == 1]
    caption = "".join(f"{rows[0][name]}, " for name in shared) + "validation score"
    metrics = " or ".join(dict.fromkeys(row["score"] for row in rows))
    labels = [group_label(group, [n for n in names if n not in shared]) for group in groups]
    xlabel = "epoch"
    if len(groups) < len(runs):
        xlabel += " (line: mean over the seeds; band: from the worst to the best seed)"
    height = 4 + 0.22 * sum(label.count("\n") + 1 for label in labels)
    epochs = [epoch for run in runs for epoch in main_curve(*run).index]
    figure, axes = curve_figure(
        caption, xlabel, f"validation {metrics} × 100", epochs=epochs, height=height
    )
    styles = line_styles([study_method(group[0][0]) for group in groups])
    for group, style, label in zip(groups, styles, labels, strict=True):
        curves = pd.DataFrame({i: main_curve(*run) for i, run in enumerate(group)})
        band = (curves.min(axis=1), curves.max(axis=1)) if len(group) > 1 else None
        plot_curve(axes, curves.mean(axis=1), style, label=escape.plot(label), band=band)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    save_figure(figure, path)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="output folder of a run or a sweep"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the learning curves (.png, .pdf or .svg)"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    runs = [read_run(path) for folder in args.folders for path in run_folders(folder)]
    if args.plot and (error := file_error(args.plot, FIGURE_SUFFIXES)):
        raise UserError(f"--plot {args.plot} {error}")
    table = pd.DataFrame([describe(*run) for run in runs]).to_string(index=False)
    if args.plot:
        plot_runs(runs, args.plot)
    utils.print_result(table)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    utils.setup_logging()
    status = exit_status.run_cli("compare.py", lambda signals: run(args))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
