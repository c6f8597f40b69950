"""Saved evaluators as deltas: shown, compared, averaged, scaled.

A saved evaluator holds values; its delta is those minus its base model's. The functions take
`members.Member`s, and one of them loaded, which knows the base model's values.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from bitfit.model.trainable import in_encoder, layer_and_name, term_names
from bitfit.results import escape, plots, scores
from utils import UserError


class Comparison(NamedTuple):
    """Of M deltas, those of the encoder alone: a classifier has the shape of its task."""

    lengths: pd.Series  # (M,) the L2 norms
    cosine: pd.DataFrame  # (M, M); NaN for a delta of length 0
    distance: pd.DataFrame  # (M, M) L2 norm of the difference / mean of the two lengths, 0 to 2


def terms_text(evaluator, names, changes):
    """What `evaluator.terms_changes` gave as text, with what lies outside the layers."""
    table = plots.changes_table(term_names(names), changes)
    table["mean"] = table.mean(axis=1)
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


def encoder_names(evaluator):
    return [name for name in evaluator.stack.slices if in_encoder(evaluator.model, name)]


def flat(named, names):
    """{name: values} -> one vector of those named, float64 on the host."""
    return torch.cat([named[name].flatten() for name in names]).double().cpu()


def compare(members, evaluator):
    """The `Comparison` of members that trained the same bias terms.

    Args:
        evaluator: one of them, loaded: it knows the base model's values.
    """
    names = encoder_names(evaluator)
    base = flat(evaluator.stack.named_params(0, evaluator.stack.initial_params), names)
    deltas = torch.stack([flat(member.tensors, names) - base for member in members])
    lengths = deltas.norm(dim=1)
    cosine = (deltas @ deltas.T / lengths.outer(lengths)).clamp(-1, 1)
    between = torch.cdist(deltas, deltas, compute_mode="donot_use_mm_for_euclid_dist")
    distance = between / ((lengths[:, None] + lengths) / 2)
    own = [member.name for member in members]
    frames = [pd.DataFrame(of.numpy(), own, own) for of in (cosine, distance)]
    return Comparison(pd.Series(lengths.numpy(), own), *frames)


def comparison_text(comparison):
    """Two tables, with the lengths."""
    names = [f"{number} {name}" for number, name in enumerate(comparison.lengths.index, 1)]
    lines = []
    for title, table in titled(comparison).items():
        numbered = table.set_axis(names).set_axis(range(1, len(names) + 1), axis=1)
        numbered.insert(0, "length", comparison.lengths.to_numpy())
        lines += [title, (numbered.round(2) + 0.0).to_string(float_format="{:.2f}".format)]
    return "\n".join(lines)


def titled(comparison):
    return {
        "cosine (1: same direction, 0: at right angles)": comparison.cosine,
        "L2 distance / mean length (0: equal, at most 2)": comparison.distance,
    }


def pairs(comparison):
    """The same, a row for each two."""
    names = list(comparison.lengths.index)
    return pd.DataFrame(
        [
            (names[i], names[j], comparison.cosine.iat[i, j], comparison.distance.iat[i, j],
             comparison.lengths.iat[i], comparison.lengths.iat[j])
            for i, j in zip(*np.triu_indices(len(names), 1), strict=True)
        ],
        columns=["first", "second", "cosine", "distance", "first_length", "second_length"],
    )  # fmt: skip


def comparison_heatmap(comparison, caption):
    """Cosine and distance side by side, a number in each cell."""
    from seaborn import heatmap

    count = len(comparison.lengths)
    longest = max(map(len, comparison.lengths.index))
    width = 2.5 + 0.09 * longest + 2 * max(0.5 * count, 2.4)
    height = 1.6 + 0.09 * longest + 0.36 * count
    figure = plots.new_figure(width, height, caption)
    colors = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, {"cmap": "Blues", "vmin": 0, "vmax": 2}
    for axes, own, (title, table) in zip(
        figure.subplots(1, 2, sharey=True), colors, titled(comparison).items(), strict=True
    ):
        table = table.round(2) + 0.0  # no -0.00
        table = table.rename(index=escape.plot, columns=escape.plot)
        heatmap(table, ax=axes, annot=True, fmt=".2f", annot_kws={"fontsize": 8}, linewidths=0.5,
                **own)  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", rotation=90, labelsize=8)
        axes.tick_params(axis="y", rotation=0, labelsize=8)
    return figure


def average(members, weights, evaluator):
    """Put the weighted mean of all that trained, classifier included, into an evaluator.

    Args:
        members: of one task, trained on the same parameters.
        weights: a number from 0 for each; their sum counts as 1.
        evaluator: the first of them, loaded; afterwards it is the average, and has its scores.

    Returns:
        A table with a row per member and one for the average: its weight, and its scores on the
        validation splits, all computed here in the same way.
    """
    values = torch.stack([flat(member.tensors, evaluator.stack.slices) for member in members])
    weights = torch.tensor(weights, dtype=torch.float64)
    weights /= weights.sum()
    rows = [about(*of) for of in zip(members, weights.tolist(), strict=True)]
    rows = [row | scores_of(evaluator, own) for row, own in zip(rows, values, strict=True)]
    last = scores_of(evaluator, weights @ values)
    evaluator.averaged = [
        {"folder": str(member.folder.resolve()), "weight": weight}
        for member, weight in zip(members, weights.tolist(), strict=True)
    ]
    if any(m.facts.get("zero_gradient", {}) != evaluator.zero_gradient for m in members):
        evaluator.zero_gradient = {}  # of one from before these were kept fixed, they moved
    evaluator.record.train_loss.clear()  # it was the first member's, as are these scores
    run = evaluator.record.run.name
    evaluator.scores = scores.frame_of([(run, 0, *of, value) for of, value in last.items()])
    table = pd.DataFrame(
        [*rows, {"name": "average", "learning_rate": "", "seed": "", "weight": 1.0} | last]
    )
    return table.rename(columns={of: " ".join(of) for of in last})


def about(member, weight):
    """What the table of `average` says of a member; one that is itself an average has no seed."""
    rate, seed = f"{member.facts['learning_rate']:g}", str(member.facts["seed"])
    rate, seed = ("", "") if member.facts.get("averaged") else (rate, seed)
    return {"name": member.name, "learning_rate": rate, "seed": seed, "weight": weight}


def scores_of(evaluator, values):
    """{(split, metric): value} of the validation splits with these values (n,), which stay."""
    evaluator.stack.set_params(values[None])
    return {
        (split, metric): value
        for split in evaluator.task.validation_splits
        for metric, value in evaluator.evaluate(split).items()
    }


def average_text(table, evaluator):
    """The table of `average`, scores x 100, and what the average is beside its members."""
    main = f"{evaluator.task.validation_splits[0]} {evaluator.task.metrics[0]}"
    first = list(table.columns).index(main)
    shown = table.assign(**{name: 100 * table[name] for name in table.columns[first:]})
    *own, last = shown[main]
    formats = dict.fromkeys(shown.columns[first:], "{:.1f}".format) | {"weight": "{:.3g}".format}
    return "\n".join([
        f"{evaluator.caption}: scores x 100",
        shown.to_string(index=False, formatters=formats),
        f"{main}: average {last:.1f}; its members {np.mean(own):.1f} on average, "
        f"{max(own):.1f} the best",
    ])  # fmt: skip


def scale(evaluator, factor):
    """Let the encoder's delta be `factor` times what it was; the classifier stays as it is.

    Raises:
        UserError: a number would be too large for the model.
    """
    values, start = evaluator.stack.params.clone(), evaluator.stack.initial_params
    limit = torch.finfo(values.dtype).max
    for name in encoder_names(evaluator):
        a, b = evaluator.stack.slices[name]
        values[:, a:b] = torch.lerp(start[:, a:b], values[:, a:b], min(factor, limit))
    if factor > limit or not values.isfinite().all():
        raise UserError(f"--scale {factor:g}: what results are no finite numbers: give a lower one")
    evaluator.stack.set_params(values)
