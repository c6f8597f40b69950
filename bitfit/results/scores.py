"""Scores as one long table, their mean and deviation, their files, and the printed tables.

The long table has one row per (run, epoch, split, metric). Printed tables and files are grouped
and pivoted from the long table.
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from bitfit.data.tasks import Task
from bitfit.files import write_text
from utils import UserError, convert_errors, first_line


def scores_frame(scores: Iterable[Sequence]) -> pd.DataFrame:
    """Return the long table of scores (run, epoch, split, metric, value)."""
    return pd.DataFrame(scores, columns=["run", "epoch", "split", "metric", "value"])


def training_caption(task: Task, metadata: dict[str, Any]) -> str:
    """Return one line with task, model and method, from values of metrics.json."""
    model = Path(metadata["model"]).name + " (random encoder)" * metadata["random_encoder"]
    model += " (added biases)" * metadata.get("add_biases", False)
    terms = ", ".join(metadata["bias_terms"])
    kind = f"bitfit ({terms})" if terms else metadata["fine_tune_type"]
    if "started_from" in metadata:
        kind += f", started from {metadata['started_from']['task']}"
    return f"{task.folder}, {model}, {kind}"


def scores_by_split(scores: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Return {split: {metric: [value per scored epoch]}} of one run."""
    found: dict[str, dict[str, list[float]]] = {}
    for split, metric, value in scores[["split", "metric", "value"]].itertuples(index=False):
        found.setdefault(split, {}).setdefault(metric, []).append(value)
    return found


def select_scores(scores: pd.DataFrame, split: str, metric: str) -> pd.DataFrame:
    """Return the part of the long table that has one split and one metric."""
    return scores[(scores["split"] == split) & (scores["metric"] == metric)]


def main_scores(scores: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Return the main scores, of the first validation split and metric: (epochs, runs)."""
    main = select_scores(scores, task.validation_splits[0], task.metrics[0])
    return main.pivot(index="epoch", columns="run", values="value")


def best_epochs(scores: pd.DataFrame, task: Task) -> pd.Series:
    """Return {run: epoch of its highest main score, the earliest of equal ones}."""
    return main_scores(scores, task).fillna(-np.inf).idxmax()


def last_and_best(scores: pd.DataFrame, task: Task) -> dict[str, dict[str, Any]]:
    """Return {"last", "best": {"epoch": epoch, split: {metric: value}}} of a run."""
    if scores.empty:
        return {}
    epochs = {"last": scores["epoch"].iloc[-1], "best": best_epochs(scores, task).iloc[0]}
    return {
        name: {"epoch": int(epoch)} | {
            split: {metric: values[0] for metric, values in part.items()}
            for split, part in scores_by_split(scores[scores["epoch"] == epoch]).items()
        }
        for name, epoch in epochs.items()
    }  # fmt: skip


def read_metrics(folder: str | Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return the content of metrics.json and the table of metrics.csv of a run.

    Raises:
        OSError, ValueError, LookupError, TypeError: a file is missing or was edited.
    """
    content = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    table = pd.read_csv(Path(folder) / "metrics.csv")
    return content, table[["epoch", "split", "metric", "value"]].astype({"value": float})


def explain_unreadable(folder: Path) -> AbstractContextManager:
    """Return a context in which errors become a UserError: the run's folder cannot be read."""
    return convert_errors(lambda error: UserError(f"{folder} cannot be read: {first_line(error)}"))


def mean_std(values: ArrayLike, skip_nan: bool = False) -> tuple[float, float, int]:
    """Return (mean, sample standard deviation, n); the deviation is NaN for fewer than two values.

    Args:
        skip_nan: leave out NaN, the score of a run that diverged. By default NaN stays visible:
            mean and deviation become NaN.
    """
    counted = np.asarray(values, float)
    counted = counted[~np.isnan(counted)] if skip_nan else counted
    n = len(counted)
    mean = float(counted.mean()) if n else np.nan
    return mean, float(counted.std(ddof=1)) if n > 1 else np.nan, n


def format_mean_std(mean: float, std: float) -> str:
    """Return "mean ± deviation" with one decimal, or the mean alone if the deviation is NaN."""
    return f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def score_table(scores: pd.DataFrame, task: Task) -> str:
    """Return the scores of one run as text, × 100, one line per split and metric."""
    if scores.empty:
        return "nothing was evaluated"
    table = last_and_best(scores, task)
    last, best = table["last"], table["best"]
    rows = [
        (split, metric, f"{100 * value:.1f}", f"{100 * best[split][metric]:.1f}")
        for split in scores["split"].unique()
        for metric, value in last[split].items()
    ]
    columns = ["split", "metric", f"last (epoch {last['epoch']})", f"best (epoch {best['epoch']})"]
    return pd.DataFrame(rows, columns=columns).to_string(index=False)


def format_epoch_scores(scores: pd.DataFrame, task: Task, loss: float) -> str:
    """Return the scores of an epoch for the log: all of one run, or the main ones of many."""
    shown = 100 * scores["value"]
    runs = scores["run"].nunique()
    if runs == 1:
        triples = zip(scores["split"], scores["metric"], shown, strict=True)
        return f"loss {loss:.3f}  " + "  ".join(f"{s} {m} {value:.1f}" for s, m, value in triples)
    split, metric = task.validation_splits[0], task.metrics[0]
    main = 100 * main_scores(scores, task).iloc[-1]
    main = main[scores["run"].unique()]  # In the order of the runs, so the first best is named.
    return (
        f"{runs} runs: loss {loss:.3f}  {split} {metric} {main.mean():.1f} on average, "
        f"{main.max():.1f} the best ({main.idxmax()})"
    )


def write_predictions(path: Path, task: Task, predicted: np.ndarray) -> None:
    """Write a file for the GLUE server: `index<TAB>prediction`, in the order of the test set."""
    labels = task.written_labels
    low, high = task.score_range
    digits = max(4, 4 - math.floor(math.log10(high - low)))  # four for STS-B, from 0 to 5
    words = [f"{value:.{digits}f}" if task.is_regression else labels[value] for value in predicted]
    lines = ["index\tprediction", *(f"{i}\t{word}" for i, word in enumerate(words))]
    write_text(path, "\n".join(lines) + "\n")
