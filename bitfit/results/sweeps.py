"""The report of a sweep: results.csv, a table of learning rates, curves with bands, warnings.

The report is made from the metrics files of the runs, so it can be made again at any time.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bitfit.data.tasks import Task
from bitfit.files import write_text
from bitfit.model.run import Run, format_seeds
from bitfit.results import plots, seed_variance
from bitfit.results.scores import (
    explain_unreadable,
    format_mean_std,
    main_scores,
    mean_std,
    read_metrics,
    scores_frame,
    select_scores,
)
from utils import Diverged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_sweep(folders: dict[Run, Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the metadata (one line per run) and scores of the runs with metrics files.

    Args:
        folders: {run: folder}.
    """
    metadata, scores = [], [scores_frame([])]
    for run, folder in folders.items():
        if (folder / "metrics.json").is_file():
            with explain_unreadable(folder):
                content, table = read_metrics(folder)
                metadata.append({
                    "run": run.name,
                    "candidate": run.candidate,
                    "bias_terms": run.terms or "",
                    "learning_rate": run.learning_rate,
                    "seed": run.seed,
                    "data_seed": run.effective_data_seed,
                    "seeds": format_seeds(run.fields),
                    "train_loss": next(reversed(content["train_loss"]), None),
                    "seconds": round(sum(content["seconds"].values()), 2),
                    "diverged": content["diverged"] or "",
                    "stopped": content.get("stopped") or "",
                })  # fmt: skip
            scores += [table.assign(run=run.name)] * bool(len(table))
    return pd.DataFrame(metadata), pd.concat(scores[1:] or scores)


def without_diverged(metadata: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of runs that did not diverge."""
    return scores[scores["run"].isin(metadata.loc[metadata["diverged"] == "", "run"])]


def best_run(metadata: pd.DataFrame, scores: pd.DataFrame, task: Task) -> str | None:
    """Return the name of the run with the best main score in any epoch, or None.

    It is none of the runs that diverged or were stopped.
    """
    scores = without_diverged(metadata[metadata["stopped"] == ""], scores)
    if scores.empty:
        return None
    best = main_scores(scores, task)[scores["run"].unique()].max()
    return best.fillna(-np.inf).idxmax()


def has_seed_pairs(metadata: pd.DataFrame) -> bool:
    """Return whether the data seed of a run is not its init seed."""
    return bool((metadata["seed"] != metadata["data_seed"]).any())


def results_rows(metadata: pd.DataFrame, scores: pd.DataFrame, task: Task) -> list[dict[str, Any]]:
    """Return the rows of results.csv, one per run, scores × 100."""
    rows, main = [], select_scores(scores, task.validation_splits[0], task.metrics[0])
    pairs = has_seed_pairs(metadata)
    seeds = {"init_seed": "seed", "data_seed": "data_seed"} if pairs else {"seed": "seed"}
    first = ["run", *["bias_terms"] * metadata["bias_terms"].any(), "learning_rate"]
    more = ["train_loss", "seconds", "diverged", *["stopped"] * metadata["stopped"].any()]
    for entry in metadata.to_dict("records"):
        curve = 100 * main[main["run"] == entry["run"]].set_index("epoch")["value"]
        row = {name: entry[name] for name in first}
        row |= {name: entry[column] for name, column in seeds.items()} | {
            "metric": task.metrics[0],
            "last_epoch": int(curve.index[-1]) if len(curve) else None,
            "last": round(curve.iloc[-1], 2) if len(curve) else np.nan,
            "best_epoch": int(curve.fillna(-np.inf).idxmax()) if len(curve) else None,
            "best": round(curve.max(), 2),
        }
        rows.append(row | {name: entry[name] for name in more})
    return rows


def scores_by_learning_rate(
    metadata: pd.DataFrame, scores: pd.DataFrame, task: Task
) -> dict[float, pd.DataFrame]:
    """Return {learning rate: main scores × 100 (epochs, runs)} in rising order.

    The runs that diverged or were stopped are left out.
    """
    kept = metadata[metadata["stopped"] == ""]
    main = 100 * main_scores(without_diverged(kept, scores), task)
    return {
        rate: main[[run for run in of_rate["run"] if run in main]]
        for rate, of_rate in metadata.groupby("learning_rate")
    }


def learning_rate_table(
    metadata: pd.DataFrame, groups: dict[float, pd.DataFrame]
) -> list[dict[str, str]]:
    """Return a row for each learning rate: mean ± standard deviation over seeds, × 100."""
    rows, seeds = [], metadata.set_index("run")["seeds"]
    unit = " pairs" if has_seed_pairs(metadata) else ""
    for rate, scores in groups.items():
        of_rate, ended = metadata[metadata["learning_rate"] == rate], scores.shape[1]
        terms = metadata["bias_terms"].iloc[0]
        row = {"bias terms": terms} if terms else {}
        row |= {"learning rate": f"{rate:g}", "seeds": f"{ended}{unit}"}
        diverged = (of_rate["diverged"] != "").sum()
        missing = {"diverged": diverged, "stopped": len(of_rate) - ended - diverged}
        if ended < len(of_rate):
            row["seeds"] += f" ({', '.join(f'{n} {why}' for why, n in missing.items() if n)})"
        if ended:
            top = scores.max().fillna(-np.inf).idxmax()
            for name, values in (("last epoch", scores.iloc[-1]),
                                 ("best epoch of each", scores.max())):  # fmt: skip
                mean, std, _ = mean_std(values)
                row[name] = format_mean_std(mean, std)
            best_epoch = scores[top].fillna(-np.inf).idxmax()
            row["best seed"] = f"{scores[top].max():.1f} ({seeds[top]}, epoch {best_epoch})"
        rows.append(row)
    return rows


def sweep_warnings(groups: dict[float, pd.DataFrame]) -> list[str]:
    """Return warnings about a grid of learning rates that is too narrow, or too few epochs."""
    tried, warnings = list(groups), []
    known = {rate: scores for rate, scores in groups.items() if scores.shape[1]}
    means = {rate: scores.mean(axis=1, skipna=False) for rate, scores in known.items()}
    curves = pd.DataFrame(means).fillna(-np.inf)
    if curves.empty:
        return []
    last = curves.iloc[-1]
    best = last.idxmax()
    is_best = not (last.drop(best) >= last[best]).any()
    if len(tried) > 1 and is_best and best in (tried[0], tried[-1]):
        edge, beyond = ("lowest", "lower") if best == tried[0] else ("highest", "higher")
        warnings.append(
            f"the best learning rate, {best:g}, is the {edge} of the grid: try {beyond} ones too"
        )
    curve = curves[best]
    if len(curve) > 1 and curve.iloc[-1] > curve.iloc[:-1].max():
        warnings.append(
            f"the scores of learning rate {best:g} still rise at the last epoch, "
            f"{curve.index[-1]}: train for more --epochs"
        )
    return warnings


def sweep_curves(
    metadata: pd.DataFrame, scores: pd.DataFrame, task: Task, caption: str
) -> dict[str, "Figure"]:
    """Return {metric: figure} with the mean and the range over seeds of each learning rate."""
    terms = pd.Categorical(metadata["bias_terms"], metadata["bias_terms"].unique())  # in order
    settings = metadata[["run", "learning_rate", "stopped"]].assign(bias_terms=terms)
    scores = without_diverged(metadata, scores).merge(settings, on="run")
    scores = scores[scores["split"] == task.validation_splits[0]]
    by_metric = scores.groupby("metric", sort=False)
    unit = "seed pair" if has_seed_pairs(metadata) else "seed"
    return {
        metric: sweep_curve(part, task, metric, caption=caption, unit=unit)
        for metric, part in by_metric
    }


def sweep_curve(
    scores: pd.DataFrame, task: Task, metric: str, *, caption: str, unit: str
) -> "Figure":
    """Return a metric over the epochs: a line for each learning rate with a band over seeds."""
    x = "epoch (line: mean over the seeds; band: from the worst to the best seed)"
    y = f"{task.validation_splits[0].replace('_', ' ')} {metric} × 100"
    figure, axes = plots.curve_figure(caption, x, y, epochs=scores["epoch"])
    settings = scores.groupby(["bias_terms", "learning_rate"], observed=True)
    for number, ((terms, rate), of_rate) in enumerate(settings):
        curve = 100 * of_rate.groupby("epoch")["value"].agg(["mean", "min", "max"])
        count = of_rate["run"].nunique()
        seeds = f"{count} {unit}" + "s" * (count > 1)
        label = f"bias terms {terms}, " * bool(terms)
        when = of_rate["stopped"].iloc[0].partition(":")[0]
        seeds += f", stopped {when}" * bool(when)
        label += f"learning rate {rate:g} ({seeds}, last {curve['mean'].iloc[-1]:.1f})"
        band = (curve["min"], curve["max"])
        plots.plot_curve(axes, curve["mean"], plots.series_style(number), label=label, band=band)
    plots.add_wide_legend(figure)
    return figure


def remove_beaten_exports(folders: dict[Run, Path], best: str | None) -> None:
    """Remove evaluators and predictions of all runs but the best, for --keep best."""
    for run, folder in folders.items():
        if run.name != best:
            for name in ("evaluator", "model"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for path in folder.glob("*.tsv"):
                path.unlink()


def report_settings(
    metadata: pd.DataFrame, scores: pd.DataFrame, task: Task
) -> tuple[str, pd.DataFrame, list[str]]:
    """Return the table of learning rates, the variance of seeds and warnings, per set of terms."""
    rows, variances, warnings = [], [], []
    for terms, of_set in metadata.groupby("bias_terms", sort=False):
        groups = scores_by_learning_rate(of_set, scores, task)
        rows += learning_rate_table(of_set, groups)
        variances.append(seed_variance.seed_variance(of_set, groups))
        if terms:
            variances[-1].insert(0, "bias_terms", terms)
        prefix = f"bias terms {terms}: " if terms else ""
        warnings += [prefix + text for text in sweep_warnings(groups)]
    variance = pd.concat([part for part in variances if len(part)] or variances)
    return pd.DataFrame(rows).fillna("-").to_string(index=False), variance, warnings


def describe_stopped(metadata: pd.DataFrame) -> list[str]:
    """Return a line for each candidate that --halving stopped, and one about the others' scores."""
    stopped = metadata.loc[metadata["stopped"] != "", ["candidate", "stopped"]].drop_duplicates()
    note = "--halving chose among the settings by validation scores, so the scores are optimistic"
    lines = [f"stopped: {candidate} {reason}" for candidate, reason in stopped.to_numpy()]
    return lines + [note] * bool(lines)


def write_report(output: Path, task: Task, folders: dict[Run, Path], caption: str) -> str:
    """Write results.csv, results.json and the curves, and return the text to print.

    Raises:
        Diverged: all runs diverged.
    """
    metadata, scores = read_sweep(folders)
    rows = results_rows(metadata, scores, task)
    table = pd.DataFrame(rows).astype({"last_epoch": "Int64", "best_epoch": "Int64"})
    write_text(output / "results.csv", table.to_csv(index=False))
    best = best_run(metadata, scores, task)
    if best is None:
        left = (metadata["stopped"] == "").sum()
        raise Diverged(f"all {left} runs diverged: try a lower --learning-rate")
    row = next(row for row in rows if row["run"] == best)
    table, variance, warnings = report_settings(metadata, scores, task)
    if len(variance):
        write_text(output / "seed_variance.csv", variance.to_csv(index=False))
    score = 100 * main_scores(scores, task)[best].max()  # not rounded, unlike `row["best"]`
    content = {"trials": len(metadata), "best": row, "warnings": warnings}
    write_text(output / "results.json", json.dumps(content, indent=2) + "\n")
    curves = sweep_curves(metadata, scores, task, caption=f"{caption}, {len(metadata)} runs")
    plots.save_curves(curves, output)
    lines = [
        f"{caption}: {task.validation_splits[0].replace('_', ' ')} {task.metrics[0]} × 100",
        table,
        f"best of {len(metadata)} trials: {score:.1f} ({best}, epoch {row['best_epoch']}); "
        "chosen on the examples it is scored on, so it is optimistic",
        *describe_stopped(metadata),
        *([seed_variance.format_seed_variance(variance)] if len(variance) else []),
        *(f"warning: {text}" for text in warnings),
    ]
    return "\n".join(lines)
