import numpy as np
import pytest
import torch
import transformers
from conftest import GLUE, forward_of, load_model, set_dropout
from torch.utils._python_dispatch import TorchDispatchMode

from bitfit.data import splits
from bitfit.data import tokens as data
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split, tokenize
from bitfit.model import batching, loading, packing
from bitfit.model import forward as models_forward
from bitfit.model.precision import DTYPES, cast_parameters
from bitfit.model.predict import predict, predict_runs
from bitfit.model.run_stack import Run, RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.options import FINE_TUNE_TYPES
from bitfit.training import loop, memory
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.loop import train_epoch
from bitfit.training.plan import Plan, TrainOptions, learning_rate_factors
from bitfit.training.progress import Progress
from bitfit.training.state import init_state
from utils import make_generator

COLA = TASKS["cola"]
CPU = torch.device("cpu")
BUDGET = TokenBudget(2048)
ONE = [Run(1e-3, 0)]


@pytest.fixture(params=["tiny_bert", "tiny_roberta"])
def folder(request):
    return request.getfixturevalue(request.param)


def tokens_of(folder, rows=44, task=COLA):
    texts = splits.read_split(task, "train", GLUE).take(range(rows))
    return tokenize(texts, loading.load_tokenizer(folder), 48)


def new_model(folder, dropout=0.0, task=COLA):
    model = load_model(folder, task)
    set_dropout(model, dropout)
    return model


def new_state(model, tokens, trainable, runs=ONE, optimizer="adamw", task=COLA,
              draw=None, token_budget=BUDGET, packed=True, **options):  # fmt: skip
    stack = RunStack(model, trainable, list(runs), draw)
    rows = dict.fromkeys((run.seed for run in runs), np.arange(len(tokens.lengths)))
    forward = forward_of(model, packed)
    train_options = TrainOptions(16, **{"epochs": 9} | options)
    plan = Plan(task, forward, Split(tokens, rows), {}, token_budget, train_options)
    return init_state(plan, stack, optimizer)


def next_epoch(state, precision="fp32"):
    """Train an epoch; the mean losses of the runs, NaN where one is bad."""
    with state.stack.patched(DTYPES[precision]):
        train_epoch(state, CheckpointManager(), Progress(state.plan, shows=False))
    losses = state.loss_sum / state.plan.rows_per_run
    state.loss_sum = torch.zeros_like(losses)
    state.epoch, state.step = state.epoch + 1, 0
    return losses.where(state.stack.bad_step < 0, torch.nan).tolist()


def trained(model, tokens, trainable, epochs=2, optimizer="adamw", task=COLA, rate=1e-3, **options):
    torch.manual_seed(0)
    state = new_state(model, tokens, trainable, [Run(rate, 0)], optimizer, task, **options)
    losses = [next_epoch(state)[0] for _ in range(epochs)]
    return state.stack, losses


def plain_loop(model, folder, names, epochs, optimizer, rate=1e-3, factor=lambda step: 1.0):
    """The obvious loop: the tokenizer pads each batch, one forward a step, no flat rows."""
    texts = splits.read_split(COLA, "train", GLUE).take(range(44))
    tokenizer = loading.load_tokenizer(folder)
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


def choose(model, method):
    if method == "partial":
        return select_trainable(model, "bitfit", ["intermediate.dense.bias"])
    components = ["bias"] if method == "bitfit" else []
    return select_trainable(model, method, components, 3000, np.random.default_rng(0))


@pytest.mark.parametrize("method", ["bitfit", "partial", "frozen", "full_ft"])
@pytest.mark.parametrize(
    ("optimizer", "packed", "cap"),
    [("adamw", True, 2048), ("adam", True, 100), ("adamw", False, 2048), ("adam", False, 100)],
)
def test_the_loop_is_the_plain_one(folder, method, optimizer, packed, cap):
    """Packed rows, passes, flat rows and fused steps change no value beyond rounding."""
    expected, model = new_model(folder), new_model(folder)
    trainable, options = choose(model, method), {"packed": packed, "token_budget": TokenBudget(cap)}
    expected_losses = plain_loop(expected, folder, set(trainable), 2, optimizer)
    _, losses = trained(model, tokens_of(folder), trainable, 2, optimizer, **options)
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
    (own,) = state.optimizer.state.values()
    head = model.classifier.weight.numel() + 2
    assert own["exp_avg"].numel() == own["exp_avg_sq"].numel() == 500 + head


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


def test_predictions_come_in_the_order_of_the_rows(folder):
    model, tokens = new_model(folder), tokens_of(folder)
    texts = splits.read_split(COLA, "train", GLUE).take(range(44))
    tokenizer = loading.load_tokenizer(folder)
    model.eval()
    with torch.no_grad():
        single = [
            model(**tokenizer(s, return_tensors="pt")).logits[0].numpy() for s in texts.columns[0]
        ]
    forward, single = forward_of(model), np.stack(single)
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


def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(tiny_bert, monkeypatch):
    model, tokens = new_model(tiny_bert), tokens_of(tiny_bert)
    state = new_state(model, tokens, choose(model, "bitfit"))
    stack, kept = state.stack, []
    calls = iter(range(100))

    def losses(task, logits, labels):
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        call = next(calls)
        if call == 1:
            kept.append(stack.params.clone())  # after the first step, before the bad one
        return each * float("nan") if call == 1 else each

    monkeypatch.setattr(loop, "row_losses", losses)
    (loss,) = next_epoch(state)
    assert np.isnan(loss)
    assert stack.bad_step.tolist() == [1]
    assert not len(stack.finite_runs())
    assert not torch.equal(kept[0], stack.initial_params)
    assert torch.equal(stack.params, kept[0])


def test_regression_trains(tiny_bert):
    task = TASKS["stsb"]
    model = new_model(tiny_bert, task=task)
    tokens = tokens_of(tiny_bert, task=task)
    _, losses = trained(model, tokens, choose(model, "bitfit"), 4, task=task, rate=3e-3)
    assert losses[-1] < losses[0]


def stack_of(folder, method, runs, optimizer="adamw", epochs=2, rows=44, precision="fp32"):
    """(logits of each run, losses by epoch, the stack) after training `runs` together."""
    model, needs_head = loading.load_model(folder, COLA)
    assert needs_head
    set_dropout(model, 0.0)
    tokens = tokens_of(folder, rows)
    state = new_state(model, tokens, choose(model, method), runs, optimizer, draw=loading.init_head)
    losses = [next_epoch(state, precision) for _ in range(epochs)]
    with state.stack.patched(DTYPES[precision]):
        every = {k: np.arange(rows) for k in range(len(runs))}
        of_run = predict_runs(state.plan.forward, state.stack, tokens, BUDGET, every)
        logits = [own for _, own in of_run]
    return np.stack(logits), np.array(losses), state.stack


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
    wanted = one.named_params()
    for name, values in stack.named_params(k).items():
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
    assert torch.allclose(again_stack.initial_params, stack.initial_params[order])


@pytest.mark.parametrize(("packed", "cap"), [(True, 2048), (True, 60), (False, 100), (True, 1)])
def test_a_run_that_diverges_cannot_touch_the_others(folder, monkeypatch, packed, cap):
    """Run 1's rows turn to infinity inside the model at its third step, and it stays as it was.

    In one pass or in many, which then hold rows of some runs only, the last of a single row.
    """
    model, _ = loading.load_model(folder, COLA)
    set_dropout(model, 0.0)
    trainable = choose(model, "bitfit")
    options = {"draw": loading.init_head, "packed": packed, "token_budget": TokenBudget(cap)}
    state = new_state(model, tokens_of(folder), trainable, GRID, **options)
    stack, kept, steps = state.stack, [], iter(range(100))
    plain = loop.forward_backward

    def sometimes_infinite(plan, stack, step):
        number = next(steps)
        if number == 2:
            kept.append(stack.params.clone())
            stack.params[1] *= float("inf")  # NaN and infinite biases: all it computes is bad
        try:
            return plain(plan, stack, step)
        finally:
            if number == 2:
                stack.params[1] = kept[0][1]

    monkeypatch.setattr(loop, "forward_backward", sometimes_infinite)
    losses = [next_epoch(state) for _ in range(3)]
    assert stack.bad_step.tolist() == [-1, 2, -1, -1]
    assert stack.finite_runs().tolist() == [0, 2, 3]
    assert torch.equal(stack.params[1], kept[0][1])
    assert np.isnan(np.array(losses)[:, 1]).all()
    for k in (0, 2, 3):
        _, one_losses, one = alone(folder, "bitfit", GRID[k], "adamw")
        assert np.allclose(np.array(losses)[:, k], one_losses[:, 0], rtol=1e-4)
        assert_same_values(stack, k, one)


def test_frozen_runs_share_the_encoder_when_scored(folder, monkeypatch):
    """Three runs, one pass: the same logits as run by run."""
    model, _ = loading.load_model(folder, COLA)
    stack = RunStack(model, choose(model, "frozen"), GRID, loading.init_head)
    forward, tokens = forward_of(model), tokens_of(folder)
    rows = {k: np.arange(44) for k in range(4)}
    passes, plain = [], type(model.base_model).forward

    def watched(*args, **options):
        passes.append(1)
        return plain(*args, **options)

    with stack.patched():
        together = dict(predict_runs(forward, stack, tokens, BUDGET, rows))
        for k in rows:
            stack.load_run(k)
            assert np.allclose(together[k], predict(forward, tokens, BUDGET), atol=1e-5)
        monkeypatch.setattr(type(model.base_model), "forward", watched)
        list(predict_runs(forward, stack, tokens, BUDGET, rows))
        shared = len(passes)
        rows[0] = rows[0][::-1].copy()  # other rows: no sharing
        list(predict_runs(forward, stack, tokens, BUDGET, rows))
    assert len(passes) - shared == 4 * shared


def test_out_of_memory_halves_the_cap_and_repeats_the_step(tiny_bert, monkeypatch):
    """A device that takes 300 tokens at most gives what a cap of that size gives."""
    plain = models_forward.Forward.__call__

    def run(cap, room):
        budget, model = TokenBudget(cap), new_model(tiny_bert, dropout=0.1)
        trainable = choose(model, "bitfit")
        state = new_state(
            model,
            tokens_of(tiny_bert),
            trainable,
            GRID,
            draw=loading.init_head,
            token_budget=budget,
        )

        def tight(forward, tokens, batch):
            torch.nn.functional.dropout(torch.ones(3))  # moves the generator before it fails
            if batch.token_index.numel() > room:
                raise torch.OutOfMemoryError("no room")
            return plain(forward, tokens, batch)

        monkeypatch.setattr(models_forward.Forward, "__call__", tight)
        torch.manual_seed(0)
        return next_epoch(state), state.stack.params, budget.max_tokens

    losses, values, cap = run(2048, room=300)
    assert cap == 256
    expected, expected_values, _ = run(256, room=1e9)
    assert losses == expected
    assert torch.equal(values, expected_values)
    with pytest.raises(torch.OutOfMemoryError):
        run(2048, room=0)


class NoWaiting(TorchDispatchMode):
    """Fails on whatever makes the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        assert function.overloadpacket.__name__ not in self.WAITS, function
        if function.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{function} with a mask asks how many there are"
        return function(*args, **(kwargs or {}))


def forbid(monkeypatch, *names):
    """What takes a tensor to the host without any operation that a dispatch mode sees."""

    def taken(self, *args, **options):
        raise AssertionError("a tensor is taken to the host")

    for name in names:
        monkeypatch.setattr(torch.Tensor, name, taken)


@pytest.mark.parametrize("runs", [1, 5])
@pytest.mark.parametrize("method", FINE_TUNE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_step_waits_for_the_device(folder, method, runs, dtype, monkeypatch):
    """The second step, so that the optimizer has its state; ragged rows in several passes."""
    # Each micro-batch has several buckets of the attention.
    monkeypatch.setitem(packing.MAX_BUCKET_PADDING, "cpu", 0)
    model = new_model(folder, dropout=0.1)
    trainable = choose(model, method)
    grid = [Run(1e-3, seed) for seed in range(runs if method in ("bitfit", "frozen") else 1)]
    options = {"lr_schedule": "linear", "token_budget": TokenBudget(100)}
    state = new_state(model, tokens_of(folder), trainable, grid, **options)
    assert len(loop.prepare_step(state, state.stack.finite_runs(), np.arange(16)[None]).parts) > 1
    model.train()
    alive = state.stack.finite_runs()
    rows = np.stack([np.random.default_rng(k).permutation(44)[:16] for k in alive])
    with state.stack.patched(dtype):
        loop.train_step(state, alive, rows)
        state.step += 1
        before = state.stack.params.clone()
        with monkeypatch.context() as patch, NoWaiting() as mode:
            forbid(patch, "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__")
            loop.train_step(state, alive, rows)
    assert mode.calls > 100
    assert (state.stack.params != before).any(dim=1).all()


def test_the_watch_sees_what_waits():
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero, lambda x: bool(x[0])):
        with pytest.raises(AssertionError), NoWaiting():
            wait(torch.ones(3))


class Kernels(TorchDispatchMode):
    """Counts what a GPU would launch: all operations but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [value.alias_info for value in function._schema.returns]
        name = function.overloadpacket.__name__
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and not name.removeprefix("new_").startswith("empty"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def kernels_of_a_step(runs, dtype):
    """A second step at bert-base's depth; how many kernels does not depend on sizes."""
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=24, intermediate_size=48, max_position_embeddings=64
    )
    model = transformers.BertForSequenceClassification(config)
    lengths = np.random.default_rng(0).integers(5, 40, 6)
    tokens = data.TokenizedSplit(
        ids=torch.randint(100, (lengths.sum(),)), types=None, labels=torch.arange(6) % 2,
        starts=lengths.cumsum() - lengths, lengths=lengths, pad_id=0,
    )  # fmt: skip
    grid = [Run(1e-3, seed) for seed in range(runs)]
    budget = TokenBudget(batching.MAX_TOKENS["cuda"])
    state = new_state(model, tokens, choose(model, "bitfit"), grid, token_budget=budget)
    model.train()
    rows = np.stack([np.random.default_rng(k).permutation(6)[:4] for k in range(runs)])
    with state.stack.patched(dtype):
        loop.train_step(state, np.arange(runs), rows)
        with Kernels() as mode:
            loop.train_step(state, np.arange(runs), rows)
    return mode.names


def test_a_step_is_few_kernels_however_many_runs(monkeypatch):
    """As on a GPU: there, launching them is what a step costs."""
    monkeypatch.setitem(packing.MAX_BUCKET_PADDING, "cpu", packing.MAX_BUCKET_PADDING["cuda"])
    count = {n: len(kernels_of_a_step(n, torch.bfloat16)) for n in (1, 5, 20, 50)}
    assert count[1] <= 1000
    assert count[5] == count[20] == count[50] <= 1300


@pytest.mark.parametrize("packed", [True, False])
def test_the_hosts_share_of_a_step_is_arrays(tiny_bert, packed):
    """And what changes from step to step reaches the device as tensors, no number as a constant."""
    model, budget = new_model(tiny_bert), TokenBudget(200)  # several passes
    options = {"token_budget": budget, "packed": packed}
    state = new_state(model, tokens_of(tiny_bert), choose(model, "bitfit"), GRID, **options)
    rows = np.stack([np.arange(16) + k for k in range(4)])
    step = loop.prepare_step(state, np.arange(4), rows)

    def leaves(value):
        if isinstance(value, (tuple, list)):
            return [leaf for inside in value for leaf in leaves(inside)]
        return [value]

    assert all(leaf is None or isinstance(leaf, np.ndarray) for leaf in leaves(step))
    assert len(step.parts) > 1
    moved = leaves(batching.to_device(step, CPU))
    assert all(leaf is None or torch.is_tensor(leaf) for leaf in moved)
    numbers = np.concatenate([batch.rows for batch, _ in step.parts])
    owners = np.concatenate([of.rows.run_ids for _, of in step.parts])
    found = {(run, row) for run, row in zip(owners.tolist(), numbers.tolist(), strict=True)}
    assert found == {(run, row) for run in range(4) for row in rows[run].tolist()}
    assert (step.number, step.count, step.rates.tolist()) == (
        0,
        16,
        [r.learning_rate for r in GRID],
    )


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
    value, first, second = start.copy(), 0.0, 0.0
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


def test_what_autograd_keeps_is_counted():
    """A Linear keeps its input and a GELU its own; weights are not counted, nor a storage twice."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with memory.count_kept_bytes(model) as kept:
        model(x).sum()
    assert sum(kept.values()) == 4 * 3 * (4 + 8 + 8)
    assert len(kept) == 3


@pytest.mark.parametrize("method", ["full_ft", "bitfit"])
def test_the_limit_fits_into_memory(tiny_bert, method):
    """It is a power of two, in proportion to what is free, and a step of it fits."""
    model, limits = new_model(tiny_bert, dropout=0.1), {}
    state = new_state(
        model, tokens_of(tiny_bert), choose(model, method), token_budget=TokenBudget(2**22)
    )
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with state.stack.patched():
        for free in (2**30, 2**28, 2**20):
            memory.fit_token_budget_to_memory(state, free)
            limits[free] = state.plan.token_budget.max_tokens
        assert torch.equal(torch.get_rng_state(), before)
        state.plan.token_budget.max_tokens = 100
        memory.fit_token_budget_to_memory(state, 2**30)  # what the user gave is not raised
    assert limits[2**30] == 4 * limits[2**28] and limits[2**30].bit_count() == 1
    assert state.plan.token_budget.max_tokens == 100
    # Each layer keeps at least the inputs of two LayerNorms (128) and of GELU (256), in float32.
    least = 3 * 4 * (2 * 128 + 256)
    assert least * limits[2**30] < 2**30 / 2 < 30 * least * limits[2**30]
    assert limits[2**20] >= 64
