"""What a step costs: no waiting for the device, few kernels, and the limit of tokens in memory."""

import numpy as np
import pytest
import torch
import transformers
from moments import at_passes
from small_training import GRID, choose, new_model, new_state, next_epoch, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from bitfit.data import tokens as data
from bitfit.model import batching, loading, packing
from bitfit.model.run import Run
from bitfit.model.token_budget import TokenBudget
from bitfit.options import FINE_TUNE_TYPES
from bitfit.training import loop, memory

CPU = torch.device("cpu")


def test_out_of_memory_halves_the_cap_and_repeats_the_step(tiny_bert):
    """A device that takes 300 tokens at most gives what a cap of that size gives."""

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

        def tight(number, ids):
            torch.nn.functional.dropout(torch.ones(3))  # moves the generator before it fails
            if ids.numel() > room:
                raise torch.OutOfMemoryError("no room")

        torch.manual_seed(0)
        with at_passes(tight):
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
def test_nothing_in_a_step_waits_for_the_device(model_path, method, runs, dtype, monkeypatch):
    """The second step, so that the optimizer has its state; ragged rows in several passes."""
    # Each micro-batch has several buckets of the attention.
    monkeypatch.setitem(packing.MAX_BUCKET_PADDING, "cpu", 0)
    model = new_model(model_path, dropout=0.1)
    trainable = choose(model, method)
    grid = [Run(1e-3, seed) for seed in range(runs if method in ("bitfit", "frozen") else 1)]
    options = {"lr_schedule": "linear", "token_budget": TokenBudget(100)}
    state = new_state(model, tokens_of(model_path), trainable, grid, **options)
    rows = np.tile(np.arange(16), (len(grid), 1))
    assert len(loop.prepare_step(state, state.stack.active_runs(), rows).parts) > 1
    model.train()
    alive = state.stack.active_runs()
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

    data = step._replace(parts=[part[:2] for part in step.parts])  # without the group's number
    assert all(leaf is None or isinstance(leaf, np.ndarray) for leaf in leaves(data))
    assert len(step.parts) > 1
    moved = leaves(batching.to_device(data, CPU))
    assert all(leaf is None or torch.is_tensor(leaf) for leaf in moved)
    numbers = np.concatenate([batch.label_index for batch, *_ in step.parts])
    owners = np.concatenate([of.rows.run_ids for _, of, _ in step.parts])
    found = {(run, row) for run, row in zip(owners.tolist(), numbers.tolist(), strict=True)}
    assert found == {(run, row) for run in range(4) for row in rows[run].tolist()}
    assert (step.number, step.labels.tolist()) == (0, [16] * 4)
    assert step.rates.tolist() == [r.learning_rate for r in GRID]


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
