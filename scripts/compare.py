"""One table, and with --plot a picture, from the output folders of several runs.

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
from bitfit.output_paths import file_error
from bitfit.parsing import OneLineParser
from bitfit.results import escape
from bitfit.results.plots import curve_figure, save_figure
from bitfit.results.scores import read_metrics
from utils import UserError, convert_errors, escape_unprintable, first_line

Run = tuple[dict[str, Any], pd.DataFrame]  # a run's metadata and scores
COLORS = [f"C{number}" for number in range(10)]
STYLES = ("-", "--", ":", "-.")  # so that 40 lines can be told apart


def read(folder: str) -> Run:
    """(facts, scores) of a run's folder; UserError where it is none, or was edited."""
    if (Path(folder) / "results.csv").exists():
        raise UserError(f"{folder} is a sweep: give its runs, {folder}/lr*")

    def unreadable(error: Exception) -> UserError:
        what = f"{type(error).__name__}: {first_line(error)}"
        return UserError(f"{folder} holds no scores of run_glue.py: {what}")

    with convert_errors(unreadable):
        facts, scores = read_metrics(folder)
        facts["finished"] = is_finished(Path(folder))
        describe(facts, scores)
    return facts, scores


def is_finished(folder: Path) -> bool:
    """Whether a run has all its files; a sweep marks each of its runs, and itself at the end.

    One of GLUEvaluator's own in Python has no args.json, and leaves none but its checkpoints.
    """
    for place in (folder, folder.absolute().parent):
        if (place / "args.json").exists():
            return json.loads((place / "args.json").read_text(encoding="utf-8"))["finished"]
    return not (folder / "checkpoints").exists()


def describe(facts: dict[str, Any], scores: pd.DataFrame) -> dict[str, Any]:
    """One run's line: what ran, how much trained, its main score x 100."""
    metric, terms = facts["main_metric"], facts["bias_terms"]
    method = facts["fine_tune_type"] + f" ({', '.join(terms)})" * (terms not in ([], ["all"]))
    validation = curve(facts, scores)
    train = 100 * scores.query("split == 'train' and metric == @metric")["value"]
    return {
        "task": escape_unprintable(facts["task"]),
        "model": escape_unprintable(Path(facts["model"]).name),
        "method": method + " (random encoder)" * facts["random_encoder"],
        "learning rate": f"{facts['learning_rate']:g}",
        "seed": facts["seed"],
        "trained": f"{facts['trained_parameters'] / facts['all_parameters']:.2%}",
        "score": metric,
        "train": f"{train.iloc[-1]:.1f}",
        "validation": f"{validation.iloc[-1]:.1f}" + " (not finished)" * (not facts["finished"]),
        "best": f"{validation.max():.1f} (epoch {validation.idxmax()})",
        "seconds": f"{sum(facts['seconds'].values()):.1f}",
    }


def curve(facts: dict[str, Any], scores: pd.DataFrame) -> pd.Series:
    """The main validation score x 100 by epoch."""
    validation = scores.loc[scores["split"] != "train", "split"].iloc[0]
    main = scores[(scores["split"] == validation) & (scores["metric"] == facts["main_metric"])]
    return 100 * main.set_index("epoch")["value"]


def picture(runs: list[Run], path: str | Path) -> None:
    """The main validation score of each run over its epochs, one line each."""
    rows = [describe(*run) for run in runs]
    same = {name for name in ("task", "model") if len({row[name] for row in rows}) == 1}
    caption = ", ".join([*(rows[0][name] for name in ("task", "model") if name in same), ""])
    scores = " or ".join(dict.fromkeys(row["score"] for row in rows))
    labels = []
    for row in rows:
        differs = [row[name] for name in ("task", "model") if name not in same]
        what = ", ".join([*differs, row["method"]])
        how = f"{row['trained']} trained, learning rate {row['learning rate']}, seed {row['seed']}"
        labels.append(textwrap.fill(f"{what}: {row['validation']} ({how})", 88))
    height = 4 + 0.22 * sum(label.count("\n") + 1 for label in labels)
    figure, axes = curve_figure(f"{caption}validation score", "epoch", f"{scores} x 100", height)
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        style = {"color": COLORS[number % 10], "linestyle": STYLES[number // 10 % 4]}
        axes.plot(curve(*run), marker="o", markersize=3.5, label=escape.plot(label), **style)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    save_figure(figure, path)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a run")
    parser.add_argument("--plot", metavar="FILE.png", help="write their curves as a picture")
    return parser


def run(args: argparse.Namespace) -> None:
    runs = [read(folder) for folder in args.folders]
    if args.plot and (wrong := file_error(args.plot, (".png",))):
        raise UserError(f"--plot {args.plot} {wrong}")
    table = pd.DataFrame([describe(*run) for run in runs]).to_string(index=False)
    if args.plot:
        picture(runs, args.plot)
    utils.print_result(table)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    utils.setup_logging()
    status = exit_status.run_cli("compare.py", lambda signals: run(args))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
