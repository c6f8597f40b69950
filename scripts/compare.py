"""One table, and with --plot a picture, from the output folders of several runs.

python scripts/compare.py out/a out/b --plot out/methods.png
"""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

from bitfit.reports import curve_figure, read_metrics, save_figure

COLORS = [f"C{number}" for number in range(10)]
STYLES = ("-", "--", ":", "-.")  # so that 40 lines can be told apart


def read(folder):
    """(facts, scores) of a run's folder, or what is wrong with it."""
    if (Path(folder) / "results.csv").exists():
        return f"{folder} is a sweep: give its runs, {folder}/lr*"
    try:
        facts, scores = read_metrics(folder)
        facts["finished"] = not (Path(folder) / "checkpoints").exists()
        describe(facts, scores)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{folder} holds no scores of run_glue.py: {type(error).__name__}: {error}"
    return facts, scores


def describe(facts, scores):
    """One run's line: what ran, how much trained, its main score x 100."""
    metric, terms = facts["main_metric"], facts["bias_terms"]
    method = facts["fine_tune_type"] + f" ({', '.join(terms)})" * (terms not in ([], ["all"]))
    validation = curve(facts, scores)
    train = 100 * scores.query("split == 'train' and metric == @metric")["value"]
    return {
        "task": facts["task"],
        "model": Path(facts["model"]).name,
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


def curve(facts, scores):
    """The main validation score x 100 by epoch."""
    validation = scores.loc[scores["split"] != "train", "split"].iloc[0]
    main = scores[(scores["split"] == validation) & (scores["metric"] == facts["main_metric"])]
    return 100 * main.set_index("epoch")["value"]


def picture(runs, path):
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
        axes.plot(curve(*run), marker="o", markersize=3.5, label=label, **style)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a run")
    parser.add_argument("--plot", metavar="FILE.png", help="write their curves as a picture")
    args = parser.parse_args()
    runs = [read(folder) for folder in args.folders]
    wrong = [run for run in runs if isinstance(run, str)]
    if args.plot and (not args.plot.endswith(".png") or not Path(args.plot).parent.is_dir()):
        wrong.append(f"--plot {args.plot}: give a .png file in a folder that is there")
    if wrong:
        parser.exit(2, f"compare.py: error: {wrong[0]}\n")
    print(pd.DataFrame([describe(*run) for run in runs]).to_string(index=False))
    if args.plot:
        picture(runs, args.plot)


if __name__ == "__main__":
    main()
