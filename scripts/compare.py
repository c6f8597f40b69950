"""One table, and with --plot a picture, from the output folders of several runs.

python scripts/compare.py out/a out/b --plot out/methods.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

from bitfit.reports import curve_figure, main_scores, read_metrics, save_figure
from bitfit.tasks import TASKS


def read(parser, folder):
    """(facts, scores) of a run's folder; `scores` with its name as `run`."""
    try:
        facts, scores = read_metrics(folder)
        return facts, scores.assign(run=folder)
    except (OSError, ValueError) as error:
        parser.exit(2, f"compare.py: error: {folder} holds no results of run_glue.py: {error}\n")


def method_of(facts):
    terms = facts["bias_terms"]
    named = f" ({', '.join(terms)})" if terms not in ([], ["all"]) else ""
    return facts["fine_tune_type"] + named + " (random encoder)" * facts["random_encoder"]


def row(facts, scores):
    """One run's line: what ran, how much trained, its main score x 100."""
    metric = facts["main_metric"]
    validation = 100 * main_scores(scores, TASKS[facts["task"]]).iloc[:, 0]
    train = 100 * scores.query("split == 'train' and metric == @metric")["value"]
    return {
        "task": facts["task"],
        "method": method_of(facts),
        "learning rate": f"{facts['learning_rate']:g}",
        "seed": facts["seed"],
        "trained": f"{facts['trained_parameters'] / facts['all_parameters']:.2%}",
        "score": metric,
        "train": f"{train.iloc[-1]:.1f}",
        "validation": f"{validation.iloc[-1]:.1f}",
        "best": f"{validation.max():.1f} (epoch {validation.idxmax()})",
        "seconds": f"{sum(facts['seconds'].values()):.1f}",
    }


def picture(runs, path):
    """The main validation score of each run over its epochs, one line each."""
    y = " / ".join(dict.fromkeys(facts["main_metric"] for facts, _ in runs))
    caption = ", ".join(dict.fromkeys(TASKS[facts["task"]].folder for facts, _ in runs))
    figure, axes = curve_figure(f"{caption}, validation", "epoch", f"{y} x 100")
    for facts, scores in runs:
        curve = 100 * main_scores(scores, TASKS[facts["task"]]).iloc[:, 0]
        share = facts["trained_parameters"] / facts["all_parameters"]
        of = f"{share:.2%} of the parameters train, learning rate {facts['learning_rate']:g}"
        label = f"{method_of(facts)}: {curve.iloc[-1]:.1f} ({of}, seed {facts['seed']})"
        axes.plot(curve, "o-", markersize=3.5, label=label)
    figure.legend(loc="outside lower center", frameon=False)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a run")
    parser.add_argument("--plot", metavar="FILE", help="write their curves as a PNG file")
    args = parser.parse_args()
    runs = [read(parser, folder) for folder in args.folders]
    runs = [(facts, scores) for facts, scores in runs if len(scores)]
    if not runs:
        parser.exit(2, "compare.py: error: nothing was evaluated in these folders\n")
    print(pd.DataFrame([row(*run) for run in runs]).to_string(index=False))
    if args.plot:
        picture(runs, args.plot)


if __name__ == "__main__":
    main()
