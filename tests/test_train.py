"""Training against a plain loop: values, schedule, frozen weights, precision, optimizer."""

import numpy as np
import pytest
import torch
from conftest import GLUE, forward_of
from moments import at_passes
from small_training import (
    BUDGET,
    COLA,
    GRID,
    ONE,
    choose,
    new_model,
    new_state,
    next_epoch,
    tokens_of,
    trained,
)

from bitfit.data import splits
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split
from bitfit.model import loading
from bitfit.model.precision import DTYPES, cast_parameters
from bitfit.model.predict import predict
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.training import loop
from bitfit.training.plan import Plan, TrainOptions, learning_rate_factors
from utils import make_generator


def plain_loop(model, model_path, names, epochs, optimizer, rate=1e-3, factor=lambda step: 1.0):
    """The obvious loop: the tokenizer pads each batch, one forward a step, no flat rows."""
    texts = splits.read_split(COLA, "train", GLUE).take(range(44))
    tokenizer = loading.load_tokenizer(model_path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0, eps=1e-6),
        "adam": lambda p: torch.optim.Adam(p, lr=rate),
    }[optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses = []
    for epoch in range(epochs):
        order, total = make_generator(0, f"data order of epoch {epoch}").permutation(44), 0.0
        for rows in (order[:16], order[16:32], order[32:]):
            batch = texts.take(rows)
            inputs = tokenizer(*batch.columns, padding="longest", return_tensors="pt")
            loss = torch.nn.CrossEntropyLoss()(
                model(**inputs).logits, torch.from_numpy(batch.labels)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(rows)
        losses.append(total / 44)
    return losses


@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen", "full_ft"])
@pytest.mark.parametrize(
    ("optimizer", "packed", "cap"),
    [("adamw", True, 2048), ("adam", True, 100), ("adamw", False, 2048), ("adam", False, 100)],
)
def test_the_loop_is_the_plain_one(model_path, method, optimizer, packed, cap):
    """Packed rows, passes, flat rows and fused steps change no value beyond rounding."""
    expected, model = new_model(model_path), new_model(model_path)
    trainable, options = choose(model, method), {"packed": packed, "token_budget": TokenBudget(cap)}
    expected_losses = plain_loop(expected, model_path, set(trainable), 2, optimizer)
    _, losses = trained(model, tokens_of(model_path), trainable, 2, optimizer, **options)
    assert losses == pytest.approx(expected_losses, rel=2e-4)
    for (name, parameter), wanted in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        if not name.endswith("key.bias"):  # its gradient is rounding noise, which Adam magnifies
            assert torch.allclose(parameter, wanted, rtol=1e-3, atol=2e-4), name


def test_the_schedule_is_the_plain_one(tiny_bert):
    """Two epochs of three steps: up over two of them, then down; every step counts."""

    def factor(step):
        return (step + 1) / 2 if step < 2 else max(0, 6 - step) / 4

    expected, model = new_model(tiny_bert), new_model(tiny_bert)
    trainable = choose(model, "frozen")
    wanted = plain_loop(expected, tiny_bert, set(trainable), 2, "adamw", 1e-2, factor)
    options = {"epochs": 2, "lr_schedule": "linear", "warmup_ratio": 1 / 3}
    state = new_state(model, tokens_of(tiny_bert), trainable, [Run(1e-2, 0)], **options)
    assert [next_epoch(state)[0] for _ in range(2)] == pytest.approx(wanted, rel=1e-5)
    for name in trainable:
        found = model.get_parameter(name)
        assert torch.allclose(found, expected.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_the_order_of_the_rows_is_the_runs_own():
    rows = dict.fromkeys((0, 1), np.arange(50))
    plan = Plan(COLA, None, Split(None, rows), {}, BUDGET, TrainOptions(16, 2))
    orders = [plan.order(Run(1.0, s), e) for s in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], plan.order(Run(9.0, 0), 0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["bitfit", "frozen", "rand_uniform", "rand_row_col"])
def test_what_is_frozen_keeps_every_bit(tiny_bert, precision, method):
    model = new_model(tiny_bert, dropout=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = choose(model, method)
    state = new_state(model, tokens_of(tiny_bert), trainable, [Run(1e-2, 0)])
    next_epoch(state, precision)
    stack = state.stack
    for name, parameter in model.named_parameters():
        moved = (parameter != before[name]).flatten()
        if name not in trainable:
            assert not moved.any(), name
        elif trainable[name] is not None:
            allowed = torch.zeros_like(moved)
            allowed[torch.from_numpy(trainable[name])] = True
            assert not (moved & ~allowed).any(), name
        assert parameter.dtype == torch.float32
    assert (stack.params != stack.initial_params).float().mean() > 0.5


def test_the_optimizer_holds_state_only_for_what_trains(tiny_bert):
    model = new_model(tiny_bert)
    trainable = select_trainable(model, "rand_uniform", mask_size=500, rng=np.random.default_rng(0))
    state = new_state(model, tokens_of(tiny_bert), trainable)
    next_epoch(state)
    (moments,) = state.optimizer.state.values()
    head = model.classifier.weight.numel() + 2
    assert moments["exp_avg"].numel() == moments["exp_avg_sq"].numel() == 500 + head


def test_bf16_follows_fp32(tiny_bert):
    def run(precision):
        model = new_model(tiny_bert)
        state = new_state(model, tokens_of(tiny_bert), choose(model, "bitfit"))
        loss, tokens = next_epoch(state, precision), state.plan.train.tokens
        with cast_parameters(model, DTYPES[precision]):
            return loss[0], predict(state.plan.forward, tokens, BUDGET), state.stack

    loss, logits, _ = run("fp32")
    half_loss, half_logits, stack = run("bf16")
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert np.abs(half_logits - logits).max() < 0.1
    assert stack.params.dtype == stack.grads.dtype == torch.float32


@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen", "full_ft"])
def test_bf16_trains_on_the_values_of_now(tiny_bert, method):
    """No cast of a trained value outlives the step that changes it."""
    model, tokens = new_model(tiny_bert), tokens_of(tiny_bert, rows=8)
    stack = RunStack(model, choose(model, method), [Run(1e-3, 0)])
    forward = forward_of(model)
    with stack.patched(torch.bfloat16):
        first = forward.logits(tokens, np.arange(8)).detach()
        stack.params += 0.05 * torch.randn(stack.params.shape)
        stack.sync_to_model()
        second = forward.logits(tokens, np.arange(8)).detach()
        assert np.allclose(second.numpy(), predict(forward, tokens, BUDGET), atol=0.02)
    assert (first - second).abs().max() > 0.05


def test_predictions_come_in_the_order_of_the_rows(model_path):
    model, tokens = new_model(model_path), tokens_of(model_path)
    texts = splits.read_split(COLA, "train", GLUE).take(range(44))
    tokenizer = loading.load_tokenizer(model_path)
    model.eval()
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt") for text in texts.columns[0]]
        single = np.stack([model(**tensors).logits[0].numpy() for tensors in inputs])
    forward = forward_of(model)
    assert np.allclose(predict(forward, tokens, BUDGET), single, atol=1e-5)
    assert np.allclose(
        predict(forward, tokens, BUDGET, np.array([7, 3])), single[[7, 3]], atol=1e-5
    )


def test_schedules():
    assert learning_rate_factors("constant", 2, 10)[[0, 1, 2, 9]].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate_factors("linear", 2, 10)[[0, 1, 2, 6, 9]].tolist() == [
        0.5,
        1.0,
        1.0,
        0.5,
        0.125,
    ]
    assert learning_rate_factors("linear", 0, 4).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(tiny_bert):
    model, tokens = new_model(tiny_bert), tokens_of(tiny_bert)
    state = new_state(model, tokens, choose(model, "bitfit"))
    stack, kept = state.stack, []

    def second_step_is_bad(number, ids):
        if number == 2:
            kept.append(stack.params.clone())
            return float("nan")

    with at_passes(second_step_is_bad):
        (loss,) = next_epoch(state)
    assert np.isnan(loss)
    assert stack.last_step.tolist() == [1]
    assert not len(stack.active_runs())
    assert not torch.equal(kept[0], stack.initial_params)
    assert torch.equal(stack.params, kept[0])


def test_regression_trains(tiny_bert):
    task = TASKS["stsb"]
    model = new_model(tiny_bert, task=task)
    tokens = tokens_of(tiny_bert, task=task)
    _, losses = trained(model, tokens, choose(model, "bitfit"), 4, task=task, rate=3e-3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_without_a_gradient_nothing_moves(tiny_bert, optimizer):
    """No weight decay: it would move what has no gradient."""
    model = new_model(tiny_bert)
    state = new_state(model, tokens_of(tiny_bert), choose(model, "bitfit"), GRID, optimizer)
    state.rates.fill_(1.0)
    with state.stack.patched():
        loop.optimizer_step(state)
    assert torch.equal(state.stack.params, state.stack.initial_params)


@pytest.mark.parametrize("runs", [ONE, [Run(0.0, 0), Run(0.0, 1)]])
@pytest.mark.parametrize(("optimizer", "eps"), [("adamw", 1e-6), ("adam", 1e-8)])
def test_two_steps_by_the_papers_formula(tiny_bert, optimizer, eps, runs):
    """Adam's moments, bias correction and eps, in float64, on gradients of every size."""
    model = new_model(tiny_bert)
    state = new_state(model, tokens_of(tiny_bert), choose(model, "frozen"), runs, optimizer)
    start = state.stack.initial_params.double().numpy()
    grad = np.logspace(-12, 0, start.shape[1]) * np.where(np.arange(start.shape[1]) % 2, 1, -1)
    grad = np.stack([grad * (k + 1) for k in range(len(runs))])
    value, first, second = start.copy(), np.zeros(()), np.zeros(())
    for step, rate in ((1, 1e-2), (2, 3e-3)):
        rates = rate * (1 + np.arange(len(runs)))
        state.rates.copy_(torch.from_numpy(rates))
        state.stack.grads.copy_(torch.from_numpy(step * grad))
        with state.stack.patched():
            loop.optimizer_step(state)
        first = 0.9 * first + 0.1 * step * grad
        second = 0.999 * second + 0.001 * (step * grad) ** 2
        root = np.sqrt(second / (1 - 0.999**step)) + eps
        value -= rates[:, None] * first / (1 - 0.9**step) / root
    moved = np.abs(value - start)
    assert moved.min() < 1e-3 * moved.max()  # eps decides for the smallest
    assert np.allclose(state.stack.params.numpy(), value, rtol=1e-5, atol=1e-8)
