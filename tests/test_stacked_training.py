"""Runs that share a pass: each equals its single run, and a diverged one does not affect others."""

import numpy as np
import pytest
import torch
from conftest import forward_of, set_dropout
from moments import at_passes, at_step
from small_training import BUDGET, COLA, GRID, choose, new_state, next_epoch, tokens_of

from bitfit.model import loading
from bitfit.model.precision import DTYPES
from bitfit.model.predict import predict, predict_runs
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget


def stack_of(model_path, method, runs, optimizer="adamw", epochs=2, rows=44, precision="fp32"):
    """(logits of each run, losses by epoch, the stack) after training `runs` together."""
    model, needs_head = loading.load_model(model_path, COLA)
    assert needs_head
    set_dropout(model, 0.0)
    tokens = tokens_of(model_path, rows)
    state = new_state(model, tokens, choose(model, method), runs, optimizer, draw=loading.init_head)
    losses = [next_epoch(state, precision) for _ in range(epochs)]
    with state.stack.patched(DTYPES[precision]):
        every = {k: np.arange(rows) for k in range(len(runs))}
        of_run = predict_runs(state.plan.forward, state.stack, tokens, BUDGET, every)
        logits = [run_logits for _, run_logits in of_run]
    return np.stack(logits), np.array(losses), state.stack


ALONE: dict = {}


def alone(model_path, method, run, optimizer):
    """One run by itself, remembered."""
    key = (model_path, method, run, optimizer)
    if key not in ALONE:
        ALONE[key] = stack_of(model_path, method, [run], optimizer, epochs=3)
    return ALONE[key]


def assert_same_values(stack, k, one):
    """Run k's trained values are those of its single run, but for rounding."""
    wanted = one.named_params()
    for name, values in stack.named_params(k).items():
        if not name.endswith("key.bias"):  # gradient 0: Adam magnifies the rounding noise
            assert torch.allclose(values, wanted[name], rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen"])
def test_each_run_of_a_stack_is_its_single_run(model_path, method, optimizer):
    """44 ragged rows in batches of 16: the last one is smaller."""
    logits, losses, stack = stack_of(model_path, method, GRID, optimizer, epochs=3)
    for k, run in enumerate(GRID):
        one_logits, one_losses, one = alone(model_path, method, run, optimizer)
        assert np.allclose(losses[:, k], one_losses[:, 0], rtol=1e-4)
        assert np.allclose(logits[k], one_logits[0], atol=2e-4)
        assert_same_values(stack, k, one)
    spread = np.abs(logits[:, None] - logits[None]).max(axis=(2, 3))
    assert spread[~np.eye(len(GRID), dtype=bool)].min() > 0.01  # and no two runs are the same


def test_bf16_stacks_too(tiny_bert):
    logits, losses, _ = stack_of(tiny_bert, "bitfit", GRID, precision="bf16")
    exact, exact_losses, _ = stack_of(tiny_bert, "bitfit", GRID)
    assert np.allclose(losses, exact_losses, rtol=0.02)
    assert np.abs(logits - exact).max() < 0.1


def test_permuted_runs_give_permuted_results(model_path):
    logits, losses, stack = stack_of(model_path, "bitfit", GRID)
    order = [2, 0, 3, 1]
    again, again_losses, again_stack = stack_of(model_path, "bitfit", [GRID[k] for k in order])
    assert np.allclose(again, logits[order], atol=2e-4)
    assert np.allclose(again_losses, losses[:, order], rtol=1e-4)
    assert torch.allclose(again_stack.initial_params, stack.initial_params[order])


@pytest.mark.parametrize(("packed", "cap"), [(True, 2048), (True, 60), (False, 100), (True, 1)])
def test_a_run_that_diverges_cannot_touch_the_others(model_path, packed, cap):
    """Run 1's rows turn to infinity inside the model at its third step, and it stays as it was.

    In one pass or in many, which then hold rows of some runs only, the last of a single row.
    """
    model, _ = loading.load_model(model_path, COLA)
    set_dropout(model, 0.0)
    trainable = choose(model, "bitfit")
    options = {"draw": loading.init_head, "packed": packed, "token_budget": TokenBudget(cap)}
    state = new_state(model, tokens_of(model_path), trainable, GRID, **options)
    stack = state.stack
    steps: list[int] = []
    kept: list[torch.Tensor] = []

    def overflow(number, ids):
        if steps and not kept:
            kept.append(stack.params.clone())
            stack.params[1] *= float("inf")  # NaN and infinite biases: all it computes is bad

    def restore():
        stack.params[1] = kept[0][1]

    with at_step(2, lambda: steps.append(2)), at_passes(overflow), at_step(3, restore):
        losses = [next_epoch(state) for _ in range(3)]
    assert stack.last_step.tolist() == [-1, 2, -1, -1]
    assert stack.active_runs().tolist() == [0, 2, 3]
    assert torch.equal(stack.params[1], kept[0][1])
    assert np.isnan(np.array(losses)[:, 1]).all()
    for k in (0, 2, 3):
        _, one_losses, one = alone(model_path, "bitfit", GRID[k], "adamw")
        assert np.allclose(np.array(losses)[:, k], one_losses[:, 0], rtol=1e-4)
        assert_same_values(stack, k, one)


def test_frozen_runs_share_the_encoder_when_scored(model_path):
    """Three runs, one pass: the same logits as run by run."""
    model, _ = loading.load_model(model_path, COLA)
    stack = RunStack(model, choose(model, "frozen"), GRID, loading.init_head)
    forward, tokens = forward_of(model), tokens_of(model_path)
    rows = {k: np.arange(44) for k in range(4)}
    passes = []
    with stack.patched():
        together = dict(predict_runs(forward, stack, tokens, BUDGET, rows))
        for k in rows:
            stack.load_run(k)
            assert np.allclose(together[k], predict(forward, tokens, BUDGET), atol=1e-5)
        model.base_model.register_forward_pre_hook(lambda module, args: passes.append(1))
        list(predict_runs(forward, stack, tokens, BUDGET, rows))
        shared = len(passes)
        rows[0] = rows[0][::-1].copy()  # other rows: no sharing
        list(predict_runs(forward, stack, tokens, BUDGET, rows))
    assert len(passes) - shared == 4 * shared
