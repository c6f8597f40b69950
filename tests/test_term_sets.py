"""Runs that train different bias terms in one pass: each equals the run of its own command."""

import numpy as np
import pytest
import torch
from conftest import forward_of
from small_training import COLA, new_model, next_epoch, tokens_of

from bitfit.data.tokens import Split
from bitfit.model import loading
from bitfit.model.predict import predict_runs
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.state import init_state

SETS = [["bias"], ["attention.self.query.bias"], [], ["intermediate.dense.bias"]]
RUNS = [Run(3e-4, 0), Run(2e-3, 0), Run(1e-3, 7)]


def trained(model_path, sets, max_tokens=2048, optimizer="adamw", broken=()):
    """Train RUNS with each set of bias terms in one stack; return (state, losses, logits).

    Args:
        broken: numbers of runs whose first values are not finite.
    """
    model = new_model(model_path)
    trainable = [select_trainable(model, "bitfit" if s else "frozen", s) for s in sets]
    names = {name for selected in trainable for name in selected}
    union = {name: None for name, _ in model.named_parameters() if name in names}
    fixed = {name: [[0, 16]] for name in union if name.endswith("key.bias")}
    selections = [
        (selected, {name: fixed[name] for name in fixed if name in selected})
        for selected in trainable
        for _ in RUNS
    ]
    runs = RUNS * len(sets)
    stack = RunStack(model, union, runs, loading.init_head, selections=selections)
    for run in broken:
        stack.params[run] = torch.inf
    tokens = tokens_of(model_path)
    rows = {run.seed: np.arange(44) for run in runs}
    options = TrainOptions(16, epochs=9)
    budget = TokenBudget(max_tokens)
    plan = Plan(COLA, forward_of(model, True), Split(tokens, rows), {}, budget, options)
    state = init_state(plan, stack, optimizer)
    losses = np.array([next_epoch(state) for _ in range(2)])
    with stack.patched():
        every = {k: np.arange(44) for k in range(len(runs))}
        logits = dict(predict_runs(plan.forward, stack, tokens, budget, every))
    return state, losses, logits


def assert_same_as_its_command(mixed, number, single, broken=()):
    """Compare the runs of one set with a stack of this set alone, bit by bit."""
    (state, losses, logits), (wanted, wanted_losses, wanted_logits) = mixed, single
    first = number * len(RUNS)
    assert np.array_equal(losses[:, first : first + len(RUNS)], wanted_losses, equal_nan=True)
    for k in range(len(RUNS)):
        values, expected = state.stack.named_params(first + k), wanted.stack.named_params(k)
        before = state.stack.named_params(first + k, state.stack.initial_params)
        if first + k not in broken:
            assert np.array_equal(logits[first + k], wanted_logits[k])
            for name in values:
                assert torch.equal(values[name], expected.get(name, before[name])), name
    moments = state.optimizer.state[state.optimized[number]]
    for name, value in wanted.optimizer.state[wanted.optimized[0]].items():
        assert torch.equal(moments[name], value), name


@pytest.mark.parametrize(("max_tokens", "optimizer"), [(2048, "adamw"), (60, "adam")])
def test_each_set_of_a_stack_equals_its_own_stack(model_path, max_tokens, optimizer, one_thread):
    """In values, losses, logits and optimizer state, bit by bit; no other value changes."""
    mixed = trained(model_path, SETS, max_tokens, optimizer)
    for number, terms in enumerate(SETS):
        assert_same_as_its_command(
            mixed, number, trained(model_path, [terms], max_tokens, optimizer)
        )


def test_a_run_that_diverges_changes_no_other_set(tiny_bert, one_thread):
    broken = [1, 4]
    mixed = trained(tiny_bert, SETS, broken=broken)
    assert mixed[0].stack.active_runs().tolist() == [k for k in range(12) if k not in broken]
    for number, terms in enumerate(SETS[2:], start=2):
        assert_same_as_its_command(mixed, number, trained(tiny_bert, [terms]))
    for number, terms in enumerate(SETS[:2]):
        single = trained(tiny_bert, [terms], broken=[1])
        assert_same_as_its_command(mixed, number, single, broken=broken)
