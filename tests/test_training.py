from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GLUE, set_dropout

from bitfit import data, models, sources, training
from bitfit.compute import Limit, forward, precision_of, predict, predict_runs
from bitfit.data import gather, tokenize
from bitfit.runs import Run, Stack
from bitfit.tasks import TASKS
from bitfit.trainable import bitfit_names, row_column_positions, trainable, uniform_positions, whole
from bitfit.training import Plan, Schedule, epoch_order, make_optimizers, whole_epoch

COLA = TASKS["cola"]
CPU = torch.device("cpu")
CONSTANT = Schedule("constant", 0, 0)
LIMIT = Limit(2048)


@pytest.fixture(params=["tiny_bert", "tiny_roberta"])
def folder(request):
    return request.getfixturevalue(request.param)


def tokens_of(folder, rows=44, task=COLA, pad_to_max=False):
    texts = sources.read_split(task, "train", GLUE).take(range(rows))
    return tokenize(texts, models.load_tokenizer(folder), 48, pad_to_max)


def new_model(folder, dropout=0.0, task=COLA):
    model = models.load_model(folder, task, seed=0)
    set_dropout(model, dropout)
    return model


def make_plan(model, tokens, task=COLA, seeds=(0,)):
    rows = dict.fromkeys(seeds, np.arange(len(tokens.lengths)))
    return Plan(task, model, tokens, 16, CONSTANT, LIMIT, rows)


def train(model, tokens, chosen, epochs=2, optimizer="adamw", task=COLA, rate=1e-3):
    torch.manual_seed(0)
    stack = Stack(model, chosen, [Run(rate, 0)])
    optimizers = make_optimizers(optimizer, stack)
    plan = make_plan(model, tokens, task)
    losses = [whole_epoch(plan, stack, optimizers, e)[0] for e in range(epochs)]
    stack.release()
    return stack, losses


def plain_loop(model, folder, names, epochs, optimizer, rate=1e-3):
    """The obvious loop: the tokenizer pads each batch, one forward a step, no flat rows."""
    texts = sources.read_split(COLA, "train", GLUE).take(range(44))
    tokenizer = models.load_tokenizer(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0, eps=1e-6),
        "adam": lambda p: torch.optim.Adam(p, lr=rate),
    }[optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    model.train()
    losses = []
    for epoch in range(epochs):
        order, total = epoch_order(Run(rate, 0), epoch, 44), 0.0
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
            total += loss.item() * len(rows)
        losses.append(total / 44)
    return losses


def methods(model):
    return {
        "bitfit": whole(bitfit_names(model, ["bias"])),
        "partial": whole(bitfit_names(model, ["intermediate.dense.bias"])),
        "frozen": trainable(model, False),
        "full_ft": trainable(model, True),
    }


@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen", "full_ft"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_the_loop_is_the_plain_one(folder, method, optimizer):
    """Micro-batches, flat rows and fused steps change no value beyond rounding."""
    expected, model = new_model(folder), new_model(folder)
    chosen = methods(model)[method]
    expected_losses = plain_loop(expected, folder, set(chosen), 2, optimizer)
    _, losses = train(model, tokens_of(folder), chosen, 2, optimizer)
    assert losses == pytest.approx(expected_losses, rel=2e-4)
    for (name, parameter), wanted in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        if not name.endswith("key.bias"):  # its gradient is rounding noise, which Adam magnifies
            assert torch.allclose(parameter, wanted, rtol=1e-3, atol=2e-4), name


def test_the_order_of_the_rows_is_the_runs_own():
    orders = [epoch_order(Run(1.0, s), e, 50) for s in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], epoch_order(Run(9.0, 0), 0, 50))


@pytest.mark.parametrize("overhead", [0.0, 1e12])
def test_micro_batches_equal_one_padded_batch(tiny_bert, monkeypatch, overhead):
    """As many micro-batches as pay, or one: the same losses and trained values."""
    one = new_model(tiny_bert)
    monkeypatch.setitem(data.OVERHEAD, "cpu", 1e18)
    expected, losses = train(one, tokens_of(tiny_bert, pad_to_max=True), methods(one)["partial"])
    many = new_model(tiny_bert)
    monkeypatch.setitem(data.OVERHEAD, "cpu", overhead)
    stack, found = train(many, tokens_of(tiny_bert), methods(many)["partial"])
    assert found == pytest.approx(losses, rel=1e-4)
    assert torch.allclose(stack.values, expected.values, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["bitfit", "frozen", "rand_uniform", "rand_row_col"])
def test_what_is_frozen_keeps_every_bit(tiny_bert, precision, method):
    model = new_model(tiny_bert, dropout=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rng = np.random.default_rng(0)
    chosen = methods(model).get(method) or {
        "rand_uniform": uniform_positions(model, 3000, rng),
        "rand_row_col": row_column_positions(model, rng),
    }.get(method)
    stack = Stack(model, chosen, [Run(1e-2, 0)])
    plan = make_plan(model, tokens_of(tiny_bert))
    with precision_of(model, precision, CPU):
        whole_epoch(plan, stack, make_optimizers("adamw", stack), 0)
    stack.release()
    for name, parameter in model.named_parameters():
        moved = (parameter != before[name]).flatten()
        if name not in chosen:
            assert not moved.any(), name
        elif chosen[name] is not None:
            allowed = torch.zeros_like(moved)
            allowed[torch.from_numpy(chosen[name])] = True
            assert not (moved & ~allowed).any(), name
        assert parameter.dtype == torch.float32
    assert (stack.values != stack.start).float().mean() > 0.5


def test_the_optimizer_holds_state_only_for_what_trains(tiny_bert):
    model = new_model(tiny_bert)
    stack = Stack(model, uniform_positions(model, 500, np.random.default_rng(0)), [Run(1e-3, 0)])
    (optimizer,) = make_optimizers("adamw", stack)
    plan = make_plan(model, tokens_of(tiny_bert))
    whole_epoch(plan, stack, [optimizer], 0)
    (state,) = optimizer.state.values()
    head = model.classifier.weight.numel() + 2
    assert state["exp_avg"].numel() == state["exp_avg_sq"].numel() == 500 + head


def test_bf16_follows_fp32(tiny_bert):
    def run(precision):
        model = new_model(tiny_bert)
        stack = Stack(model, methods(model)["bitfit"], [Run(1e-3, 0)])
        plan = make_plan(model, tokens_of(tiny_bert))
        with precision_of(model, precision, CPU):
            loss = whole_epoch(plan, stack, make_optimizers("adamw", stack), 0)
            return loss[0], predict(model, plan.tokens, LIMIT), stack

    loss, logits, _ = run("fp32")
    half_loss, half_logits, stack = run("bf16")
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert np.abs(half_logits - logits).max() < 0.1
    assert stack.values.dtype == stack.grads.dtype == torch.float32


@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen", "full_ft"])
def test_bf16_trains_on_the_values_of_now(tiny_bert, method):
    """No cast of a trained value outlives the step that changes it."""
    model, tokens = new_model(tiny_bert), tokens_of(tiny_bert, rows=8)
    stack = Stack(model, methods(model)[method], [Run(1e-3, 0)])
    rows = np.arange(8)
    with precision_of(model, "bf16", CPU):
        first = forward(model, gather(tokens, rows)[0]).detach()
        stack.values += 0.05 * torch.randn(stack.values.shape)
        second = forward(model, gather(tokens, rows)[0]).detach()
        assert np.allclose(second.numpy(), predict(model, tokens, LIMIT), atol=0.02)
    assert (first - second).abs().max() > 0.05


def test_predictions_come_in_the_order_of_the_rows(folder):
    model, tokens = new_model(folder), tokens_of(folder)
    texts = sources.read_split(COLA, "train", GLUE).take(range(44))
    tokenizer = models.load_tokenizer(folder)
    model.eval()
    with torch.no_grad():
        single = [
            model(**tokenizer(s, return_tensors="pt")).logits[0].numpy() for s in texts.columns[0]
        ]
    assert np.allclose(predict(model, tokens, LIMIT), np.stack(single), atol=1e-5)
    assert np.allclose(
        predict(model, tokens, LIMIT, np.array([7, 3])), np.stack(single)[[7, 3]], atol=1e-5
    )


def test_schedules():
    constant = Schedule("constant", 2, 10)
    assert [constant.factor(s) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    linear = Schedule("linear", 2, 10)
    assert [linear.factor(s) for s in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]


def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(tiny_bert, monkeypatch):
    model, tokens = new_model(tiny_bert), tokens_of(tiny_bert)
    stack = Stack(model, methods(model)["bitfit"], [Run(1e-3, 0)])
    kept = []
    calls = iter(range(100))

    def losses(task, logits, labels):
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        call = next(calls)
        if call == 1:
            kept.append(stack.values.clone())  # after the first step, before the bad one
        return each * float("nan") if call == 1 else each

    monkeypatch.setattr(training, "row_losses", losses)
    monkeypatch.setitem(data.OVERHEAD, "cpu", 1e18)  # one micro-batch a step
    plan = make_plan(model, tokens)
    (loss,) = whole_epoch(plan, stack, make_optimizers("adamw", stack), 0)
    assert np.isnan(loss)
    assert stack.bad_step.tolist() == [1]
    assert not len(stack.alive())
    assert not torch.equal(kept[0], stack.start)
    assert torch.equal(stack.values, kept[0])


def test_regression_trains(tiny_bert):
    task = TASKS["stsb"]
    model = new_model(tiny_bert, task=task)
    tokens = tokens_of(tiny_bert, task=task)
    _, losses = train(model, tokens, methods(model)["bitfit"], 4, task=task, rate=3e-3)
    assert losses[-1] < losses[0]


def stack_of(folder, method, runs, optimizer="adamw", epochs=2, rows=44, precision="fp32"):
    """(logits of each run, losses by epoch, the stack) after training `runs` together."""
    model, needs_head = models.load(folder, COLA)
    assert needs_head
    set_dropout(model, 0.0)
    stack = Stack(model, methods(model)[method], runs, models.draw_head)
    tokens = tokens_of(folder, rows)
    plan = make_plan(model, tokens, seeds={run.seed for run in runs})
    optimizers = make_optimizers(optimizer, stack)
    with precision_of(model, precision, CPU):
        losses = [whole_epoch(plan, stack, optimizers, e) for e in range(epochs)]
        every = {k: np.arange(rows) for k in range(len(runs))}
        logits = [lg for _, lg in predict_runs(model, stack, tokens, LIMIT, every)]
    stack.release()
    return np.stack(logits), np.array(losses), stack


GRID = [Run(rate, seed) for rate in (3e-4, 2e-3) for seed in (0, 7)]
ALONE = {}


def alone(folder, method, run, optimizer):
    """One run by itself, remembered."""
    key = (folder, method, run, optimizer)
    if key not in ALONE:
        ALONE[key] = stack_of(folder, method, [run], optimizer, epochs=3)
    return ALONE[key]


def assert_same_values(stack, k, one):
    """Run k's trained values are those of its single run, but for rounding."""
    wanted = one.named_values()
    for name, values in stack.named_values(k).items():
        if not name.endswith("key.bias"):  # gradient 0: Adam magnifies the rounding noise
            assert torch.allclose(values, wanted[name], rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen"])
def test_each_run_of_a_stack_is_its_single_run(folder, method, optimizer):
    """44 ragged rows in batches of 16: the last one is smaller."""
    logits, losses, stack = stack_of(folder, method, GRID, optimizer, epochs=3)
    for k, run in enumerate(GRID):
        one_logits, one_losses, one = alone(folder, method, run, optimizer)
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


def test_permuted_runs_give_permuted_results(folder):
    logits, losses, stack = stack_of(folder, "bitfit", GRID)
    order = [2, 0, 3, 1]
    again, again_losses, again_stack = stack_of(folder, "bitfit", [GRID[k] for k in order])
    assert np.allclose(again, logits[order], atol=2e-4)
    assert np.allclose(again_losses, losses[:, order], rtol=1e-4)
    assert torch.allclose(again_stack.start, stack.start[order])


def test_a_run_that_diverges_cannot_touch_the_others(folder, monkeypatch):
    """Run 1's rows turn to infinity inside the model at its third step, and it stays as it was."""
    model, _ = models.load(folder, COLA)
    set_dropout(model, 0.0)
    stack = Stack(model, methods(model)["bitfit"], GRID, models.draw_head)
    plan = make_plan(model, tokens_of(folder), seeds=(0, 7))
    optimizers = make_optimizers("adamw", stack)
    kept, steps = [], iter(range(100))
    plain = training.forward_backward

    def sometimes_infinite(plan, stack, alive, rows):
        number = next(steps)
        if number == 2:
            kept.append(stack.values.clone())
            stack.values[1] *= float("inf")  # NaN and infinite biases: all it computes is bad
        try:
            return plain(plan, stack, alive, rows)
        finally:
            if number == 2:
                stack.values[1] = kept[0][1]

    monkeypatch.setattr(training, "forward_backward", sometimes_infinite)
    losses = [whole_epoch(plan, stack, optimizers, e) for e in range(3)]
    assert stack.bad_step.tolist() == [-1, 2, -1, -1]
    assert stack.alive().tolist() == [0, 2, 3]
    assert torch.equal(stack.values[1], kept[0][1])
    assert np.isnan(np.array(losses)[:, 1]).all()
    for k in (0, 2, 3):
        _, one_losses, one = alone(folder, "bitfit", GRID[k], "adamw")
        assert np.allclose(np.array(losses)[:, k], one_losses[:, 0], rtol=1e-4)
        assert_same_values(stack, k, one)


def test_frozen_runs_share_the_encoder_when_scored(folder, monkeypatch):
    """Three runs, one pass: the same logits as run by run."""
    model, _ = models.load(folder, COLA)
    stack = Stack(model, methods(model)["frozen"], GRID, models.draw_head)
    tokens = tokens_of(folder)
    rows = {k: np.arange(44) for k in range(4)}
    together = dict(predict_runs(model, stack, tokens, LIMIT, rows))
    for k in rows:
        stack.put(k)
        assert np.allclose(together[k], predict(model, tokens, LIMIT), atol=1e-5)
    passes = []
    plain = type(model.base_model).forward
    monkeypatch.setattr(
        type(model.base_model), "forward", lambda *a, **k: passes.append(1) or plain(*a, **k)
    )
    list(predict_runs(model, stack, tokens, LIMIT, rows))
    shared = len(passes)
    rows[0] = rows[0][::-1]  # other rows: no sharing
    list(predict_runs(model, stack, tokens, LIMIT, rows))
    assert len(passes) - shared == 4 * shared


def test_out_of_memory_halves_the_cap_and_repeats_the_step(tiny_bert, monkeypatch):
    """A device that takes 300 tokens at most gives what a cap of that size gives."""

    def run(cap, room):
        limit, model = Limit(cap), new_model(tiny_bert, dropout=0.1)
        stack = Stack(model, methods(model)["bitfit"], GRID, models.draw_head)
        plan = replace(make_plan(model, tokens_of(tiny_bert), seeds=(0, 7)), limit=limit)

        def tight(model, inputs):
            torch.nn.functional.dropout(torch.ones(3))  # moves the generator before it fails
            if inputs["input_ids"].numel() > room:
                raise torch.OutOfMemoryError("no room")
            return forward(model, inputs)

        monkeypatch.setattr(training, "forward", tight)
        torch.manual_seed(0)
        losses = whole_epoch(plan, stack, make_optimizers("adamw", stack), 0)
        return losses, stack.values, limit.tokens

    losses, values, cap = run(2048, room=300)
    assert cap == 256
    expected, expected_values, _ = run(256, room=1e9)
    assert losses == expected
    assert torch.equal(values, expected_values)
    with pytest.raises(torch.OutOfMemoryError):
        run(2048, room=0)
