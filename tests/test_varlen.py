"""Packed sequences for a GPU's kernels, with a plain kernel in their place: layout and gradients.

`benchmarks/gpu_checks.py` compares the kernels themselves.
"""

import numpy as np
import pytest
import torch
from plain_attention import plain_varlen_kernel
from test_models import random_model, tokens
from test_packing import plain_logits
from torch.nn import functional as F

from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split
from bitfit.model import attention
from bitfit.model.attention import CHUNK, QUERY_BLOCK, pack_sequences, round_up_size
from bitfit.model.batching import to_device
from bitfit.model.forward import Forward
from bitfit.model.forward_trials import select_forward
from bitfit.model.packed_encoder import packed_encoders
from bitfit.model.predict import predict, predict_together
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.options import FINE_TUNE_TYPES
from bitfit.training import loop
from bitfit.training.graphs import USES_BEFORE_CAPTURE, StepGraphs
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.state import init_state

LENGTHS = (9, 4, 40, 17, 6, 16)
ROWS = np.arange(len(LENGTHS))


@pytest.fixture(autouse=True)
def plain_kernel(monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", plain_varlen_kernel)
    monkeypatch.setattr(attention, "supports_flash_attention", lambda *_: True)


def gradient(forward, split_rows, trainable, runs, owner, dtype=torch.float32):
    """(logits, the gradients (K, n)) of a pass of all rows."""
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    stack = RunStack(forward.model, trainable, runs)
    noise = torch.Generator().manual_seed(0)
    stack.params += 0.02 * torch.randn(stack.params.shape, generator=noise)
    forward.model.eval()
    batch, rows = to_device(forward.make_routed_batch(split_rows, ROWS, owner, len(runs)), "cpu")
    with stack.patched(dtype):
        with stack.routing(rows):
            logits = forward(split_rows, batch)
        F.cross_entropy(logits, labels).backward()
        stack.accumulate_grads()
    stack.set_params(stack.initial_params)
    return logits.detach(), stack.grads


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize(
    ("method", "runs"), [*((m, 1) for m in FINE_TUNE_TYPES), ("bitfit", 3), ("frozen", 3)]
)
def test_logits_and_gradients_are_those_of_padded_rows(name, method, runs):
    model, rows = random_model(name), tokens(*LENGTHS)
    forward = select_forward(model, name, rows)
    assert forward.uses_varlen and forward.packed_encoder.after_attention
    trainable = select_trainable(model, method, ["bias"] if method == "bitfit" else [], 3000,
                    np.random.default_rng(0))  # fmt: skip
    owner = np.repeat(np.arange(runs), len(LENGTHS) // runs)
    grid = [Run(1e-3, seed) for seed in range(runs)]
    expected = gradient(Forward(model), rows, trainable, grid, owner)
    found = gradient(forward, rows, trainable, grid, owner)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert (expected[1] != 0).any(dim=1).all()


def test_prediction_has_no_fillers():
    model, rows = random_model("bert"), tokens(*LENGTHS)
    forward = select_forward(model, "bert", rows)
    assert forward.make_batch(rows, ROWS).token_index.size == sum(LENGTHS)
    assert torch.allclose(forward.logits(rows, ROWS), plain_logits(model, rows), atol=1e-6)


@pytest.mark.parametrize("stacked", [True, False])
def test_fillers_let_runs_fill_chunks_and_batches_have_few_sizes(stacked):
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 60, rng.integers(1, 400))
        owner = np.sort(rng.integers(0, 5, len(lengths))) * 2
        sequences, row, chunks = pack_sequences(lengths, owner, stacked)
        assert len(row) == round_up_size(len(row)) and len(row) % CHUNK == 0
        assert np.array_equal(np.bincount(row[row >= 0]), lengths)
        assert np.array_equal(row[sequences.first_token], np.arange(len(lengths)))
        sizes = np.diff(sequences.cu_seqlens)
        assert sizes.sum() == len(row) and sizes.min() >= 1 and sizes.max() <= sequences.max_seqlen
        assert np.array_equal(
            sizes[np.isin(sequences.sequence_starts, sequences.first_token)], lengths
        )
        assert (
            sizes[~np.isin(sequences.sequence_starts, sequences.first_token)].max()
            <= QUERY_BLOCK + 1
        )
        assert np.array_equal(sequences.sequence_starts, sequences.cu_seqlens[:-1])
        assert np.array_equal(sequences.first_cu_seqlens, np.arange(len(sizes) + 1))
        assert (sequences.position_ids[row < 0] == 0).all()
        for begin in range(0, len(row), CHUNK) if stacked else ():
            inside = row[begin : begin + CHUNK]
            assert (owner[inside[inside >= 0]] == chunks[begin // CHUNK]).all()
    assert len({round_up_size(n) for n in range(1, 8192)}) < 100


@pytest.mark.parametrize(("max_tokens", "passes"), [(400, 1), (184, 2)])
def test_runs_predict_together_what_each_predicts_alone(max_tokens, passes):
    """Three of four runs, 92 tokens each, in another order: the same logits as run by run."""
    model, split = random_model("bert"), tokens(*LENGTHS)
    forward, budget = Forward(model, packed_encoders(model)[0]), TokenBudget(max_tokens)
    stack = RunStack(
        model, select_trainable(model, "bitfit", ["bias"]), [Run(0.1, s) for s in range(4)]
    )
    stack.params += 0.02 * torch.randn(stack.params.shape, generator=torch.manual_seed(0))
    rows = {0: ROWS, 2: ROWS[::-1].copy(), 3: ROWS}
    counted = []
    with stack.patched():
        hook = model.base_model.register_forward_pre_hook(lambda *_: counted.append(1))
        together = predict_together(forward, stack, split, budget, rows)
        hook.remove()
        for logits, (run, of_run) in zip(together, rows.items(), strict=True):
            stack.load_run(run)
            assert np.allclose(logits, predict(forward, split, budget, of_run), atol=1e-6)
    assert len(counted) == passes
    assert np.abs(together[0] - together[1][::-1]).max() > 1e-3


def new_state(graphs):
    model, rows = random_model("bert"), tokens(*LENGTHS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    forward = Forward(model, packed_encoders(model)[0])
    trainable = select_trainable(model, "bitfit", ["bias"])
    stack = RunStack(model, trainable, [Run(1e-3, 0), Run(3e-3, 1)])
    split = Split(rows._replace(labels=torch.tensor([0, 1, 1, 0, 1, 0])), {0: ROWS, 1: ROWS})
    plan = Plan(TASKS["cola"], forward, split, {}, TokenBudget(1000), TrainOptions(3, 20, "linear"))
    state = init_state(plan, stack)
    if graphs:  # what CUDA repeats is the same work on the same tensors
        state.graphs = StepGraphs(
            lambda step: loop.whole_step(state, step), torch.device("cpu"), fake_capture
        )
    return state


def fake_capture(work):
    result = torch.zeros(2)
    return lambda: result.copy_(work()), result


def test_steps_from_graphs_are_the_steps_without(monkeypatch):
    def train_epochs(graphs):
        torch.manual_seed(0)
        state = new_state(graphs)
        orders, losses = np.random.default_rng(0), []
        state.plan.forward.model.train()
        with state.stack.patched():
            for step in range(12):
                state.epoch, state.step = divmod(step, 2)
                rows = np.stack([orders.permutation(6)[:3] for _ in range(2)])
                losses.append(loop.train_step(state, np.arange(2), rows).tolist())
        return state, losses

    plain, expected = train_epochs(graphs=False)
    state, losses = train_epochs(graphs=True)
    assert state.graphs.graphs  # some shape came more often than it takes
    assert sum(state.graphs.uses.values()) == 12 > USES_BEFORE_CAPTURE
    assert losses == expected
    assert torch.equal(state.stack.params, plain.stack.params)
    assert torch.equal(state.loss_sum, plain.loss_sum)


def test_without_graphs_where_they_cannot_be_captured(caplog):
    def refuse(work):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graphs = StepGraphs(lambda step: step, torch.device("cpu"), refuse)
    graphs.graphs[("another shape",)] = ("its memory",)
    step = (np.zeros(3),)
    assert [graphs.find(step) for _ in range(9)] == [None] * 9
    assert [r.message for r in caplog.records] == [
        "training without CUDA graphs: operation not permitted"
    ]
    assert not graphs.graphs
