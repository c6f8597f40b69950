"""What many runs say together: results.csv, a table per learning rate, curves with bands.

All of it is made from the runs' own metrics.json, so that it can be made again at any time.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from bitfit.reports import new_figure, save_curves
from bitfit.runs import Run
from utils import Diverged, write_text


def read_results(output, runs):
    """The metrics.json of the runs that have one, in the order of `runs`."""
    paths = [Path(output) / run.name / "metrics.json" for run in runs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def name_of(result):
    return Run(result["learning_rate"], result["seed"]).name


def main_scores(result):
    """A run's main validation score at each scored epoch."""
    split = next(name for name in result["evaluations"] if name.startswith("validation"))
    return result["evaluations"][split][result["main_metric"]]


def scored(results):
    """The results that count: a run that diverged has no last epoch to report."""
    return [r for r in results if r["epochs"] and not r["diverged"]]


def best_of(results):
    """The result with the best score of any epoch, the first of equals; None if there is none."""
    return max(scored(results), key=lambda r: max(main_scores(r)), default=None)


def results_table(results):
    """One row per run, scores x 100."""
    import pandas as pd

    return pd.DataFrame([results_row(result) for result in results])


def results_row(result):
    ended = bool(result["epochs"])
    values = np.array(main_scores(result)) * 100 if ended else np.array([np.nan])
    best = int(values.argmax())
    return {
        "run": name_of(result),
        "learning_rate": result["learning_rate"],
        "seed": result["seed"],
        "metric": result["main_metric"],
        "last_epoch": result["epochs"][-1] if ended else None,
        "last": round(values[-1], 2),
        "best_epoch": result["epochs"][best] if ended else None,
        "best": round(values[best], 2),
        "train_loss": result["train_loss"][-1] if result["train_loss"] else None,
        "seconds": round(sum(result["seconds"].values()), 2),
        "diverged": result["diverged"] or "",
    }


def by_learning_rate(results):
    """{learning rate: its results that count}, rising."""
    rates = sorted({result["learning_rate"] for result in results})
    return {rate: [r for r in scored(results) if r["learning_rate"] == rate] for rate in rates}


def learning_rate_table(results):
    """A row per learning rate: mean ± standard deviation over its seeds, x 100."""
    import pandas as pd

    rows = []
    for rate, group in by_learning_rate(results).items():
        tried = sum(result["learning_rate"] == rate for result in results)
        row = {"learning rate": f"{rate:g}", "seeds": str(len(group))}
        if len(group) < tried:
            row["seeds"] += f" ({tried - len(group)} diverged)"
        if group:
            scores = [np.array(main_scores(result)) * 100 for result in group]
            top = int(np.argmax([values.max() for values in scores]))
            epoch = group[top]["epochs"][int(scores[top].argmax())]
            row["last epoch"] = mean_and_std([values[-1] for values in scores])
            row["best epoch of each"] = mean_and_std([values.max() for values in scores])
            row["best seed"] = f"{scores[top].max():.1f} (seed {group[top]['seed']}, epoch {epoch})"
        rows.append(row)
    return pd.DataFrame(rows).fillna("-").to_string(index=False)


def mean_and_std(values):
    """The sample standard deviation; one value has none."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def warnings_of(results):
    """The two ways to go wrong unnoticed: a grid too narrow, a training too short."""
    groups = {rate: group for rate, group in by_learning_rate(results).items() if group}
    if not groups:
        return []
    mean_last = {rate: np.mean([main_scores(r)[-1] for r in g]) for rate, g in groups.items()}
    best, warnings = max(mean_last, key=mean_last.get), []
    tried = sorted({result["learning_rate"] for result in results})
    others = [score for rate, score in mean_last.items() if rate != best]
    if others and mean_last[best] > max(others) and best in (tried[0], tried[-1]):
        edge, where = ("lowest", "lower") if best == tried[0] else ("highest", "higher")
        warnings.append(
            f"the best learning rate, {best:g}, is the {edge} of the grid: try {where} ones too"
        )
    curve = np.mean([main_scores(result) for result in groups[best]], axis=0)
    if len(curve) > 1 and curve[-1] > curve[:-1].max():
        epoch = groups[best][0]["epochs"][-1]
        warnings.append(
            f"the scores of learning rate {best:g} still rise at the last epoch, {epoch}: "
            "train for more --epochs"
        )
    return warnings


def sweep_curves(results, caption):
    """{metric: figure}: a line per learning rate, the mean over its seeds, with their range."""
    split = next(name for name in results[0]["evaluations"] if name.startswith("validation"))
    return {
        metric: sweep_curve(results, split, metric, caption)
        for metric in results[0]["evaluations"][split]
    }


def sweep_curve(results, split, metric, caption):
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 5, caption)
    axes = figure.subplots()
    groups = {rate: group for rate, group in by_learning_rate(results).items() if group}
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(groups)))
    for color, (rate, group) in zip(colors, groups.items(), strict=True):
        scores = 100 * np.array([result["evaluations"][split][metric] for result in group])
        epochs, mean = group[0]["epochs"], scores.mean(axis=0)
        seeds = f"{len(group)} seed" + "s" * (len(group) > 1)
        label = f"learning rate {rate:g} ({seeds}, last {mean[-1]:.1f})"
        axes.plot(epochs, mean, marker="o", markersize=3.5, color=color, label=label)
        axes.fill_between(epochs, scores.min(axis=0), scores.max(axis=0), color=color, alpha=0.15)
    axes.set_xlabel("epoch (line: mean over the seeds; band: from the worst to the best seed)")
    axes.set_ylabel(f"{split.replace('_', ' ')} {metric} x 100")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, ncols=1 if len(groups) < 4 else 2)
    return figure


def drop_beaten(output, runs, best):
    """With --keep best: of the runs so far only the best keeps an evaluator and predictions."""
    for run in runs:
        if best is None or run.name != name_of(best):
            folder = Path(output) / run.name
            for name in ("evaluator", "model"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for path in folder.glob("*.tsv"):
                path.unlink()


def report(output, task, runs, caption):
    """Write results.csv, results.json and the curves; returns what to print.

    Raises:
        Diverged: if there is no run to report.
    """
    results = read_results(output, runs)
    write_text(Path(output) / "results.csv", results_table(results).to_csv(index=False))
    best = best_of(results)
    if best is None:
        raise Diverged(f"all {len(results)} runs diverged: try a lower --learning-rate")
    row, warnings = results_row(best), warnings_of(results)
    content = {"trials": len(results), "best": row, "warnings": warnings}
    write_text(Path(output) / "results.json", json.dumps(content, indent=2) + "\n")
    save_curves(sweep_curves(scored(results), f"{caption}, {len(results)} runs"), output)
    lines = [
        f"{caption}: {task.validation_splits[0].replace('_', ' ')} {task.metrics[0]} x 100",
        learning_rate_table(results),
        f"best of {len(results)} trials: {row['best']:.1f} ({row['run']}, epoch "
        f"{row['best_epoch']}); chosen on the rows it is scored on, so it is optimistic",
        *(f"warning: {text}" for text in warnings),
    ]
    return "\n".join(lines)
