"""Estimated hours and sizes of a study's cells, and the hours a worker may take."""

import numpy as np
import paper
import pytest
from small_training import choose, new_model, new_state, tokens_of
from toy_study import TOY, plan

from bitfit.model.run import Run
from bitfit.study import cell_states, cells, cost


@pytest.mark.parametrize("content", ["{", "[1]", '{"tiny_bert": {}}'])
def test_rates_that_cannot_be_read_are_none(study, content, capsys):
    (study.output / cost.RATES).write_text(content)
    assert paper.main(["plan", "-o", str(study.output)]) == 0
    assert "`plan --calibrate` estimates them" in capsys.readouterr().out


def test_a_budget_takes_the_cheapest(quick_python, study, capsys):
    assert paper.main(["run", "-o", str(study.output), "--budget-hours", "1"]) == 2
    assert "--calibrate" in capsys.readouterr().err
    assert plan(study.output, "--rows", "bitfit", "--calibrate") == 0
    costs = cost.Costs(study)
    seconds = {cell.name: costs.seconds(cell) or 0.0 for cell in study.cells}
    dear, cheap = sorted(study.cells, key=lambda cell: seconds[cell.name], reverse=True)
    hours = str(sum(seconds.values()) / 2 / 3600)
    capsys.readouterr()
    command = ["run", "-o", str(study.output), "--gpus", "cpu", "--budget-hours", hours]
    assert paper.main(command) == 0
    assert f"left, beyond --budget-hours: {dear.name}" in capsys.readouterr().out
    assert cell_states.cell_state(study, cheap) == "done"
    assert cell_states.cell_state(study, dear) == "missing"


def test_operations_are_counted_from_the_sizes(study):
    cell = study.cells[0]
    sizes = cost.Sizes(1000, {"train": 100, "validation": 10, "test": 7},
                       {"train": 5.0, "validation": 4.0, "test": 3.0})  # fmt: skip
    training = 4 * 2 * 24 * 5  # operations, epochs, rows, tokens
    scoring = 2 * (2 * (24 * 5 + 10 * 4) + 7 * 3)
    assert cost.operations(cell, sizes) == 1000 * 2 * (training + scoring)  # two runs
    few = sizes._replace(rows=sizes.rows | {"train": 20})  # fewer than --train-size, 24
    training, scoring = 4 * 2 * 20 * 5, 2 * (2 * (20 * 5 + 10 * 4) + 7 * 3)
    assert cost.operations(cell, few) == 1000 * 2 * (training + scoring)


def test_a_large_training_set_is_scored_in_part(tmp_path):
    words = ["plan", "-o", str(tmp_path / "one"), "--tables", "3", *TOY, "--rows", "bitfit"]
    args = paper.parse_args([*words, "--train-size", "70000"])
    (cell,) = cells.plan_study(tmp_path / "one", args).cells  # two runs
    sizes = cost.Sizes(1, {"train": 80_000, "validation": 0}, {"train": 1.0, "validation": 0})
    assert cost.operations(cell, sizes) == 2 * (4 * 2 * 70_000 + 2 * 2 * 50_000)


def test_hours_from_rates(study, monkeypatch):
    """Done cells of the row count before those of the kind, and all of them before --calibrate."""
    costs, (stacked, single) = cost.Costs(study), study.cells
    sizes = cost.Sizes(1000, {"train": 100, "validation": 10}, {"train": 5.0, "validation": 4.0})
    monkeypatch.setattr(costs, "cell_sizes", lambda cell: sizes)
    rates = {"stacked": 800.0, "single": 100.0, "full": 50.0}
    costs.measured = {"tiny_bert": rates}
    work_of = cost.operations(stacked, sizes)
    assert costs.seconds(stacked) == work_of / 800 + 8 + 1
    apart = cost.operations(single, sizes)
    assert costs.seconds(single) == apart / 50 + 8 + 2 * 1  # a model for each run
    costs.done = [(stacked, 3000.0, 1.0), (stacked, 1000.0, 3.0)]
    assert costs.rate(stacked) == 1000
    assert costs.rate(stacked._replace(row="frozen")) == 1000  # of its kind
    assert costs.rate(single) == 50
    assert costs.rate(stacked._replace(model="other")) is None
    costs.done += [(stacked._replace(row="frozen"), 10.0, 1.0)]
    assert costs.rate(stacked._replace(row="frozen")) == 10


def test_the_tokens_of_all_runs_count(tiny_bert):
    seconds = 0.0

    def clock():
        nonlocal seconds
        seconds += 2.0
        return seconds

    model, tokens, rows = new_model(tiny_bert), tokens_of(tiny_bert), np.array([0, 2])
    runs = [Run(1e-3, seed) for seed in range(4)]
    state = new_state(model, tokens, choose(model, "bitfit"), runs)
    with state.stack.patched():
        found = cost.tokens_per_second(state, np.tile(rows, (4, 1)), clock=clock)
    assert found == 4 * tokens.lengths[rows].sum() / 2
