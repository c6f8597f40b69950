"""Simulated successive halving against a plain implementation, and by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import paper
import pytest
from drawn_scores import drawn, slow_scores

from bitfit.data.tasks import TASKS
from bitfit.study import figures, halving, results, statistics
from bitfit.training.halving import rank_candidates
from utils import UserError

RATES = [0.1, 0.2, 0.3]


def entries_of(cells, task="cola", rates=RATES, state="done"):
    """Return the table's entries of {row: (logits (L, S, E, rows, C), labels)}."""
    entries = {}
    for row, (logits, labels) in cells.items():
        seeds = list(range(logits.shape[1]))
        cell = SimpleNamespace(model="m", row=row, name=f"m/{row}/{task}", rates=rates, seeds=seeds)
        scores = pd.DataFrame({"epoch": np.arange(logits.shape[2]) + 1})
        of_split = {"validation": logits}, {"validation": labels}
        found = results.Results(cell, state, *of_split, scores=scores)
        known = SimpleNamespace(**found._asdict(), task=TASKS[task])
        entries["m", row, task, None] = results.Entry(task, known, "validation", {})
    return entries


def slow_halving(scores, halvings, epochs):
    """Return (winner, its last epoch, selected, share saved) of scores {candidate: (S, E)}.

    Who stops is decided by the function that stops the runs of a real sweep.
    """

    def best(candidates):
        mean = {c: scores[c][:, -1].mean().round(12) for c in candidates}
        return min(candidates, key=lambda c: (np.isnan(mean[c]), -mean[c]))

    alive, trained = list(scores), dict.fromkeys(scores, epochs)
    for epoch in halvings:
        values = {c: np.nan_to_num(scores[c][:, epoch - 1].round(12), nan=-np.inf) for c in alive}
        stopped = rank_candidates({c: v.tolist() for c, v in values.items()}, "", "MCC")
        trained |= dict.fromkeys(stopped, epoch)
        alive = [c for c in alive if c not in stopped]
    winner = best(scores)
    saved = 1 - sum(trained.values()) / (len(scores) * epochs)
    return winner, trained[winner], best(alive), saved


def slow_row(parts, task, halvings, resamples):
    """Return (winner, stopped, selected, lost, saved, resampled) of {row: (logits, labels)}."""
    labels = next(iter(parts.values()))[1]
    seeds, epochs = next(iter(parts.values()))[0].shape[1:3]
    rng = np.random.default_rng(0)
    of_seeds = statistics.draws(rng, seeds, resamples)
    of_rows = statistics.draws(rng, len(labels), resamples)
    stops = []
    for seed_counts, counts in [(np.ones(seeds, int), np.ones(len(labels), int)),
                                *zip(of_seeds, of_rows, strict=True)]:  # fmt: skip
        rows = np.repeat(np.arange(len(labels)), counts)
        scores: dict[str, np.ndarray] = {}
        for row, (logits, _) in parts.items():
            values = slow_scores(TASKS[task], np.nan_to_num(logits)[..., rows, :], labels[rows])
            values[np.isnan(logits).any(axis=(-2, -1))] = np.nan
            values = np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, values)
            values = [np.repeat(v, seed_counts, axis=0) for v in values]
            scores |= {f"{row} {rate:g}": v for rate, v in zip(RATES, values, strict=True)}
        stops.append(slow_halving(scores, halvings, epochs))
        if len(stops) == 1:
            last = {c: 100 * v[:, -1].mean() for c, v in scores.items()}
    winner, stop, selected, saved = stops[0]
    resampled = np.mean([s[1] < epochs for s in stops[1:]])
    stopped = str(stop) if stop < epochs else ""
    return winner, stopped, selected, last[winner] - last[selected], saved, resampled


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_halving_against_a_slow_version(task):
    """Two methods that share a pass and one that does not, with a diverged run and with ties."""
    cells = {row: drawn(TASKS[task], (3, 2, 3), 25, skill=0.4) for row in ("full_ft", "bitfit")}
    cells["b_q"] = drawn(TASKS[task], (3, 2, 3), 25, seed=1, skill=0.6)[0], cells["bitfit"][1]
    cells["b_q"][0][1, 1] = np.nan
    frame = halving.halving_frame(entries_of(cells, task), [1, 2], resamples=4)
    names = ["full_ft", "bitfit", "b_q", np.nan, "bitfit, b_q", np.nan]
    assert frame["methods"].fillna("").tolist() == pd.Series(names).fillna("").tolist()
    grids = [{name: cells[name] for name in names.split(", ")}
             for names in frame["methods"].dropna()]  # fmt: skip
    columns = ["winner", "stopped", "selected", "lost", "saved", "resampled"]
    for (_, found), parts in zip(frame.dropna().iterrows(), grids, strict=True):
        expected = slow_row(parts, task, [1, 2], 4)
        assert found[columns[:3]].tolist() == list(expected[:3])
        np.testing.assert_allclose(found[columns[3:]].astype(float), expected[3:], atol=1e-9)
    means = frame[:3][columns[3:]].mean().tolist()
    assert frame.iloc[3][columns[3:]].tolist() == pytest.approx(means)


def test_what_cannot_be_halved(tmp_path, capsys):
    """No cell has epoch 4 before its last; a single rate, or a diverged or unfinished cell."""
    cells = {"bitfit": drawn(TASKS["cola"], (3, 1, 4), 20)}
    with pytest.raises(UserError, match="--halving 4 9: no finished cell"):
        halving.halving_frame(entries_of(cells), [1, 4, 9], resamples=2)
    diverged = {"bitfit": (np.full((3, 1, 4, 20, 2), np.nan), cells["bitfit"][1])}
    single = {"bitfit": (cells["bitfit"][0][:1], cells["bitfit"][1])}
    assert not figures.by_column(entries_of(diverged))  # no empty figures either
    for entries in (entries_of(cells, state="interrupted"), entries_of(diverged),
                    entries_of(single, rates=[0.1])):  # fmt: skip
        with pytest.raises(UserError, match="--halving 1: "):
            halving.halving_frame(entries, [1], resamples=2)
    for epochs in (["2", "1"], ["1", "1"]):
        with pytest.raises(SystemExit, match="2"):
            paper.main(["report", "--output-path", str(tmp_path), "--halving", *epochs])
        assert "--halving: give ascending epochs" in capsys.readouterr().err
