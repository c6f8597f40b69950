"""Show, compare, average and scale the deltas of saved evaluators.

A delta is the difference between the trained values of a saved evaluator and the values of its base
model. The functions take saved evaluators and one of them loaded, which has the base model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from bitfit.model.run import format_seeds
from bitfit.model.trainable import components_to_terms, in_encoder, layer_and_name
from bitfit.results import escape, plots, scores
from bitfit.tools.saved_evaluators import SavedEvaluator
from bitfit.training.state import Record
from glue_evaluator import GLUEvaluator

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Comparison(NamedTuple):
    """A comparison of M deltas of the encoder. Classifiers are left out: their shapes differ."""

    norms: pd.Series  # (M,) L2 norms
    cosine: pd.DataFrame  # (M, M); NaN for a delta of norm 0
    distance: pd.DataFrame  # (M, M) L2 norm of the difference / mean of the two norms, 0 to 2


def bias_changes_text(evaluator: GLUEvaluator, changes: pd.DataFrame) -> str:
    """Return the result of `evaluator.terms_changes` as text, with biases outside the layers."""
    table = changes.assign(mean=changes.mean(axis=1)).rename_axis(None)
    table.index = components_to_terms(changes.index)
    fixed = [f"{term} {plots.FIXED}" for term in table.index[table["mean"].isna()]]
    stack = evaluator.stack
    start, end = stack.named_params(0, stack.initial_params), stack.named_params()
    outside = [n for n in encoder_names(evaluator) if layer_and_name(n)[0] is None]
    return "\n".join([
        f"{evaluator.caption}: mean absolute change of each bias term, by layer",
        table.to_string(float_format="{:.5f}".format, na_rep="-"),
        *fixed,
        *(f"{name} {(end[name] - start[name]).abs().mean():.5f}" for name in outside),
    ])  # fmt: skip


def encoder_names(evaluator: GLUEvaluator) -> list[str]:
    """Return the names of the trained parameters of the encoder."""
    return [name for name in evaluator.stack.slices if in_encoder(evaluator.model, name)]


def flatten(named: dict[str, torch.Tensor], names: Iterable[str]) -> torch.Tensor:
    """Return the named tensors as one vector, in float64 on the host."""
    return torch.cat([named[name].flatten() for name in names]).double().cpu()


def compare_deltas(evaluators: Sequence[SavedEvaluator], evaluator: GLUEvaluator) -> Comparison:
    """Compare saved evaluators of the same bias terms; `evaluator` is one of them, loaded."""
    names = encoder_names(evaluator)
    base = flatten(evaluator.stack.named_params(0, evaluator.stack.initial_params), names)
    deltas = torch.stack([flatten(saved.tensors, names) - base for saved in evaluators])
    norms = deltas.norm(dim=1)
    cosine = (deltas @ deltas.T / norms.outer(norms)).clamp(-1, 1)
    between = torch.cdist(deltas, deltas, compute_mode="donot_use_mm_for_euclid_dist")
    distance = between / ((norms[:, None] + norms) / 2)
    labels = [saved.name for saved in evaluators]
    return Comparison(
        pd.Series(norms.numpy(), labels),
        pd.DataFrame(cosine.numpy(), labels, labels),
        pd.DataFrame(distance.numpy(), labels, labels),
    )


def comparison_text(comparison: Comparison) -> str:
    """Return the cosines and distances as two tables, with the norms."""
    names = [f"{number} {name}" for number, name in enumerate(comparison.norms.index, 1)]
    lines = []
    for title, table in titled_tables(comparison).items():
        numbered = table.set_axis(names).set_axis(range(1, len(names) + 1), axis=1)
        numbered.insert(0, "norm", comparison.norms.to_numpy())
        lines += [title, (numbered.round(2) + 0.0).to_string(float_format="{:.2f}".format)]
    return "\n".join(lines)


def titled_tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """Return {title: table} of a comparison."""
    return {
        "cosine (1: same direction, 0: orthogonal)": comparison.cosine,
        "L2 distance / mean norm (0: equal, at most 2)": comparison.distance,
    }


def comparison_pairs(comparison: Comparison) -> pd.DataFrame:
    """Return a table with one line per pair of evaluators."""
    names, norms = comparison.norms.index, comparison.norms.to_numpy()
    i, j = np.triu_indices(len(names), 1)
    return pd.DataFrame({
        "first": names[i], "second": names[j],
        "cosine": comparison.cosine.to_numpy()[i, j],
        "distance": comparison.distance.to_numpy()[i, j],
        "first_length": norms[i], "second_length": norms[j],
    })  # fmt: skip


def comparison_heatmap(comparison: Comparison, caption: str) -> "Figure":
    """Draw cosines and distances side by side, with a number in each cell."""
    from seaborn import heatmap

    count = len(comparison.norms)
    longest = max(map(len, comparison.norms.index))
    width = 2.5 + 0.09 * longest + 2 * max(0.5 * count, 2.4)
    height = 1.6 + 0.09 * longest + 0.36 * count
    figure = plots.new_figure(width, height, caption)
    colors = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, {"cmap": "Blues", "vmin": 0, "vmax": 2}
    for axes, style, (title, table) in zip(
        figure.subplots(1, 2, sharey=True), colors, titled_tables(comparison).items(), strict=True
    ):
        table = table.round(2) + 0.0  # no -0.00
        table = table.rename(index=escape.plot, columns=escape.plot)
        heatmap(table, ax=axes, annot=True, fmt=".2f", annot_kws={"fontsize": 8}, linewidths=0.5,
                **style)  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", rotation=90, labelsize=8)
        axes.tick_params(axis="y", rotation=0, labelsize=8)
    return figure


def average_evaluators(
    evaluators: Sequence[SavedEvaluator], weights: Sequence[float], evaluator: GLUEvaluator
) -> tuple[GLUEvaluator, pd.DataFrame]:
    """Return an evaluator with the weighted mean of all trained values, classifier included.

    Args:
        evaluators: evaluators of one task that trained the same parameters.
        weights: one number >= 0 per evaluator; they are divided by their sum.
        evaluator: the first of them, loaded.

    Returns:
        The average with its scores; and a table with one line per evaluator and one for the
        average: weights and scores on the validation splits, all computed here in the same way.
    """
    values = torch.stack([flatten(saved.tensors, evaluator.stack.slices) for saved in evaluators])
    shares = torch.tensor(weights, dtype=torch.float64)
    shares /= shares.sum()
    rows, averaged = [], []
    for saved, weight, params in zip(evaluators, shares.tolist(), values, strict=True):
        rows.append(table_entry(saved, weight) | score_params(evaluator, params))
        averaged.append({"folder": str(saved.folder.resolve()), "weight": weight})
    last = score_params(evaluator, shares @ values)
    rows.append({"name": "average", "learning_rate": "", "seed": "", "weight": 1.0} | last)
    table = pd.DataFrame(rows).rename(columns={key: " ".join(key) for key in last})
    prepared, run = evaluator.need_prepared(), evaluator.record.run
    if any(e.metadata.get("zero_gradient", {}) != prepared.zero_gradient for e in evaluators):
        prepared = replace(prepared, zero_gradient={})  # Earlier versions trained these biases.
    of_average = scores.scores_frame([(run.name, 0, *key, value) for key, value in last.items()])
    result = replace(
        evaluator.need_result(), records=[Record(run)], scores=of_average, averaged=averaged
    )
    return evaluator.with_parts(prepared=prepared, result=result), table


def table_entry(saved: SavedEvaluator, weight: float) -> dict[str, Any]:
    """Return one line of the table of averages. An average has no learning rate and no seed."""
    metadata = saved.metadata
    rate, seed = f"{metadata['learning_rate']:g}", format_seeds(metadata).removeprefix("seed ")
    rate, seed = ("", "") if metadata.get("averaged") else (rate, seed)
    return {"name": saved.name, "learning_rate": rate, "seed": seed, "weight": weight}


def score_params(evaluator: GLUEvaluator, params: torch.Tensor) -> dict[tuple[str, str], float]:
    """Set the trained parameters (n,) and return {(split, metric): score} of validation splits."""
    evaluator.stack.set_params(params[None])
    return {
        (split, metric): value
        for split in evaluator.task.validation_splits
        for metric, value in evaluator.evaluate(split).items()
    }


def average_text(table: pd.DataFrame, evaluator: GLUEvaluator) -> str:
    """Return the table of averages as text, with the average beside the members' mean and best."""
    main = f"{evaluator.task.validation_splits[0]} {evaluator.task.metrics[0]}"
    first = list(table.columns).index(main)
    shown = table.assign(**{name: 100 * table[name] for name in table.columns[first:]})
    *of_members, last = shown[main]
    formats = dict.fromkeys(shown.columns[first:], "{:.1f}".format) | {"weight": "{:.3g}".format}
    return "\n".join([
        f"{evaluator.caption}: scores × 100",
        shown.to_string(index=False, formatters=formats),
        f"{main}: average {last:.1f}; its members {np.mean(of_members):.1f} on average, "
        f"{max(of_members):.1f} the best",
    ])  # fmt: skip


def scale_delta(evaluator: GLUEvaluator, factor: float) -> None:
    """Multiply the delta of the encoder by a factor. The classifier does not change."""
    values, start = evaluator.stack.params.clone(), evaluator.stack.initial_params
    for name in encoder_names(evaluator):
        a, b = evaluator.stack.slices[name]
        values[:, a:b] = torch.lerp(start[:, a:b], values[:, a:b], factor)
    evaluator.stack.set_params(values)
