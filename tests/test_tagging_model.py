"""Token classification: all tokens are read, and every path equals the plain Hugging Face model."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import set_dropout
from plain_attention import plain_varlen_kernel
from torch.nn import functional as F

from bitfit.data.splits import word_positions
from bitfit.data.tasks import Task
from bitfit.data.tokens import Split, TokenizedSplit
from bitfit.distributed import Group
from bitfit.model import attention
from bitfit.model.batching import count_labels
from bitfit.model.forward import Forward
from bitfit.model.forward_trials import reason_not_stackable, select_forward
from bitfit.model.packing import MAX_BUCKET_PADDING
from bitfit.model.predict import predict, predict_runs
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import head_names, select_trainable
from bitfit.options import FINE_TUNE_TYPES
from bitfit.training import loop, train
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.graphs import StepGraphs
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.state import init_state

TAGS = ("DET", "NOUN", "VERB", "ADJ", "ADV")
POS = Task("pos", "POS", ("words",), TAGS, record={"words": "words", "tags": "tags"})
FAMILY = ["bert", "roberta", "electra", "distilbert", "modernbert"]
LENGTHS = (9, 4, 40, 17, 6, 16)
ROWS = np.arange(len(LENGTHS))


def tagger(name, seed=0, **more):
    """A random token classifier without dropout."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = transformers.AutoConfig.for_model(
        name, vocab_size=60, pad_token_id=1, num_labels=len(TAGS), **sizes, **more
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForTokenClassification.from_config(config)
    set_dropout(model, 0.0)
    model.start = {name: values.clone() for name, values in model.state_dict().items()}
    return model


def tagged(lengths=LENGTHS, seed=0):
    """Rows of random tokens and words. The first and last token of a row begin no word."""
    rng, lengths = np.random.default_rng(seed), np.array(lengths)
    starts = lengths.cumsum() - lengths
    words = [
        start + np.sort(rng.permutation(np.arange(1, n - 1))[: rng.integers(1, n - 1)])
        for start, n in zip(starts, lengths, strict=True)
    ]
    labels = torch.from_numpy(rng.integers(0, len(TAGS), sum(map(len, words))))
    return TokenizedSplit(
        ids=torch.from_numpy(rng.integers(5, 60, lengths.sum())), types=None, starts=starts,
        labels=labels, lengths=lengths, pad_id=1, word_index=np.concatenate(words),
        word_counts=np.array([len(of) for of in words]),
    )  # fmt: skip


def plain_inputs(split, rows):
    """The batch of a plain loop: padded, with the label -100 where no word begins."""
    width = split.lengths[rows].max()
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (1, -100, 0))
    of_token = torch.full((len(split.ids),), -100)
    of_token[torch.from_numpy(split.word_index)] = split.labels
    for i, row in enumerate(rows):
        part = slice(split.starts[row], split.starts[row] + split.lengths[row])
        count = split.lengths[row]
        ids[i, :count], labels[i, :count], mask[i, :count] = split.ids[part], of_token[part], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def forward_of(kind, model, split, monkeypatch):
    """The forward pass on packed rows (several buckets), for FlashAttention, or on padded rows."""
    if kind == "padded":
        return Forward(model)
    monkeypatch.setitem(MAX_BUCKET_PADDING, "cpu", 500)
    if kind == "varlen":
        monkeypatch.setattr(attention, "varlen_kernel", plain_varlen_kernel)
        monkeypatch.setattr(attention, "supports_flash_attention", lambda *_: True)
    forward = select_forward(model, "it", split)
    assert forward.batching_kind == "packed" and forward.uses_varlen == (kind == "varlen")
    assert not forward.packed_encoder.layers  # nothing is left out
    return forward


def choose(model, method):
    components = ["bias"] if method == "bitfit" else []
    return select_trainable(model, method, components, 3000, np.random.default_rng(0))


def new_state(forward, split, method="bitfit", runs=1, max_tokens=2048, group=None, **options):
    """A state whose runs differ in all that trains; each of them trains on all rows."""
    forward.model.load_state_dict(forward.model.start)
    grid = [Run(1e-3 * (k + 1), k) for k in range(runs)] if isinstance(runs, int) else runs
    stack = RunStack(forward.model, choose(forward.model, method), grid)
    noise = torch.Generator().manual_seed(0)
    stack.set_params(stack.params + 0.02 * torch.randn(stack.params.shape, generator=noise))
    rows = {run.seed: np.arange(len(split.lengths)) for run in grid}
    splits = Split(split, rows)
    plan = Plan(
        POS, forward, splits, {"train": splits, "validation": splits}, TokenBudget(max_tokens),
        TrainOptions(**{"batch_size": 3, "epochs": 2} | options),
        **({"group": group} if group else {}),
    )  # fmt: skip
    return init_state(plan, stack)


def losses_and_gradients(state, rows):
    """Our losses (K,) and gradients (K, n) of one batch (K, B)."""
    state.plan.forward.model.train()
    step = loop.to_device(loop.prepare_step(state, np.arange(len(rows)), rows), "cpu")
    with state.stack.patched():
        losses = loop.forward_backward(state.plan, state.stack, step)
    return losses, state.stack.grads


def plain_losses_and_gradients(state, rows):
    """Those of the plain model, run by run, by its own loss."""
    stack, model = state.stack, state.plan.forward.model
    losses, grads = [], []
    for run, of_run in enumerate(rows):
        stack.load_run(run)
        parameters = dict(model.named_parameters())
        loss = model(**plain_inputs(state.plan.train.tokens, of_run)).loss
        found = torch.autograd.grad(loss, [parameters[name] for name in stack.slices])
        flat = [
            g.flatten()[stack.positions[name]] if name in stack.positions else g.flatten()
            for name, g in zip(stack.slices, found, strict=True)
        ]
        losses.append(loss.detach())
        grads.append(torch.cat(flat))
    return torch.stack(losses), torch.stack(grads)


KINDS = ["packed", "varlen", "padded"]
CASES = [(name, kind) for name in FAMILY for kind in KINDS if name != "modernbert"]


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("modernbert", "padded")])
@pytest.mark.parametrize(
    ("method", "runs"), [*((m, 1) for m in FINE_TUNE_TYPES), ("bitfit", 3), ("frozen", 3)]
)
def test_loss_and_gradients_of_a_batch_are_the_plain_models(name, kind, method, runs, monkeypatch):
    """In one micro-batch and in several; the runs of a stack have different rows."""
    more = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "local_attention": 8}
    model, split = tagger(name, **more if name == "modernbert" else {}), tagged()
    forward = forward_of(kind, model, split, monkeypatch)
    rows = np.stack([np.roll(ROWS, k)[:4] for k in range(runs)])
    expected = plain_losses_and_gradients(new_state(forward, split, method, runs), rows)
    assert (expected[1] != 0).any(dim=1).all()
    for max_tokens in (2048, 45):
        state = new_state(forward, split, method, runs, max_tokens)
        losses, grads = losses_and_gradients(state, rows)
        assert torch.allclose(losses, expected[0], rtol=1e-5)
        assert torch.allclose(grads, expected[1], rtol=1e-3, atol=1e-6)


def test_the_mean_is_over_the_words_of_a_batch():
    """By hand: two rows with one and three words, of logits that do not depend on the encoder."""
    model, split = tagger("bert"), tagged((4, 6), seed=3)
    split = split._replace(word_index=np.array([1, 5, 6, 8]), labels=torch.tensor([0, 1, 1, 4]))
    bias, state = (
        torch.tensor([1.0, 2.0, 0.0, 0.0, -1.0]),
        new_state(Forward(model), split, "frozen"),
    )
    state.stack.set_params(torch.cat([torch.zeros(5 * 32), bias])[None])
    losses, _ = losses_and_gradients(state, np.array([[0, 1]]))
    below = bias.exp().sum().log().item()
    assert losses.item() == pytest.approx(below - (1 + 2 + 2 - 1) / 4, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_divide_the_words_of_a_step(kind, monkeypatch):
    """The losses and gradients of two ranks add up to those of one."""
    model, split = tagger("bert"), tagged()
    forward = forward_of(kind, model, split, monkeypatch)
    rows = np.stack([ROWS[:5], ROWS[1:]])
    whole = losses_and_gradients(new_state(forward, split, runs=2), rows)
    groups = [Group((0, 1), rank=rank) for rank in (0, 1)]
    states = [new_state(forward, split, runs=2, group=group) for group in groups]
    parts = [losses_and_gradients(state, rows) for state in states]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.allclose(sum(found), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["bitfit", "frozen"])
def test_predictions_are_the_plain_models_words_in_order(kind, method, monkeypatch):
    """For some rows in any order, in small batches, of one run and of all."""
    model, split = tagger("bert"), tagged()
    forward = forward_of(kind, model, split, monkeypatch)
    stack = new_state(forward, split, method, runs=3).stack
    rows, expected = np.array([3, 0, 5, 2]), []
    for run in range(3):
        stack.load_run(run)
        model.eval()
        inputs = plain_inputs(split, rows)
        with torch.no_grad():
            expected.append(model(**inputs).logits[inputs["labels"] >= 0].numpy())
    for max_tokens in (2048, 20):
        budget = TokenBudget(max_tokens)
        with stack.patched():
            found = dict(predict_runs(forward, stack, split, budget, dict.fromkeys(range(3), rows)))
        assert np.allclose([found[k] for k in range(3)], expected, atol=1e-5)
    alone = predict(forward, split, TokenBudget(20))
    assert alone.shape == (len(split.labels), len(TAGS))
    of_rows = alone[word_positions(split.word_counts, rows)]
    assert np.allclose(of_rows, predict(forward, split, TokenBudget(2048), rows), atol=1e-5)
    assert np.array_equal(count_labels(split, rows), split.word_counts[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_divide_the_words_of_a_prediction(kind, monkeypatch):
    """Each computes the words of some rows; their sum is the prediction of a single process."""
    model, split = tagger("bert"), tagged()
    forward, rows = forward_of(kind, model, split, monkeypatch), np.array([3, 0, 5, 2])
    monkeypatch.setattr(Group, "all_reduce_sum_", lambda group, *tensors: None)
    groups = [Group((0, 1), rank=rank) for rank in (0, 1)]
    parts = [predict(forward, split, TokenBudget(30), rows, group) for group in groups]
    assert all((part == 0).all(axis=1).any() for part in parts)
    assert np.allclose(sum(parts), predict(forward, split, TokenBudget(30), rows), atol=1e-5)


def test_cuda_graphs_serve_steps_with_any_number_of_words(monkeypatch):
    """The shapes of a step depend on its tokens alone, and the losses are those without graphs."""

    def capture(work):
        result = torch.zeros(2)
        return lambda: result.copy_(work()), result

    def train(graphs):
        model, split = tagger("bert"), tagged()
        state = new_state(forward_of("varlen", model, split, monkeypatch), split, runs=2, epochs=9)
        if graphs:
            state.graphs = StepGraphs(partial(loop.whole_step, state), torch.device("cpu"), capture)
        order, losses = np.random.default_rng(0), []
        with state.stack.patched():
            for step in range(12):
                state.epoch, state.step = divmod(step, 2)
                rows = np.stack([order.permutation(len(ROWS))[:3] for _ in range(2)])
                losses.append(loop.train_step(state, np.arange(2), rows).tolist())
                counts.add(tuple(count_labels(split, rows).sum(axis=1)))
        return state, losses

    counts: set[tuple] = set()
    (plain, expected), (state, losses) = train(graphs=False), train(graphs=True)
    assert state.graphs and len(state.graphs.uses) < len(counts)
    assert state.graphs.graphs and losses == expected
    assert torch.equal(state.stack.params, plain.stack.params)


@pytest.mark.parametrize("name", FAMILY)
def test_the_forward_pass_is_found_by_trial(name):
    """Also if all rows are equally long: half a row keeps its words."""
    model = tagger(name)
    for lengths in (LENGTHS, (8, 8, 8)):
        split = tagged(lengths)
        forward = select_forward(model, name, split)
        assert (forward.packed_encoder is None) == (name == "modernbert")
        rows = np.arange(len(lengths))
        model.eval()
        inputs = plain_inputs(split, rows)
        with torch.no_grad():
            expected = model(**inputs).logits[inputs["labels"] >= 0]
            assert torch.allclose(forward.logits(split, rows), expected, atol=1e-5)


def test_a_model_that_mixes_tokens_along_the_padding_is_found_out():
    split = tagged()
    assert select_forward(tagger("fnet", intermediate_size=64), "fnet", split).equal_length
    deberta = tagger("deberta-v2", pos_att_type=["c2p", "p2c"], relative_attention=True)
    assert select_forward(deberta, "deberta", split).batching_kind == "padded"


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_which_runs_share_a_pass(name, kind):
    model, split = tagger(name), tagged()
    forward = Forward(model) if kind == "padded" else select_forward(model, name, split)
    assert reason_not_stackable(forward, choose(model, "frozen"), split) is None
    reason = reason_not_stackable(forward, choose(model, "full_ft"), split)
    assert reason and "matrices train" in reason


def test_a_run_that_diverges_leaves_the_others_alone(monkeypatch):
    """Neither its words nor the fillers of a batch reach another run."""
    for kind in KINDS:
        model, split = tagger("bert"), tagged()
        state = new_state(forward_of(kind, model, split, monkeypatch), split, runs=3)
        rows = np.stack([np.roll(ROWS, k)[:4] for k in range(3)])
        expected = losses_and_gradients(state, rows)[1].clone()
        state.stack.params[1] = torch.nan
        losses, grads = losses_and_gradients(state, rows)
        assert losses.isnan().tolist() == [False, True, False]
        assert torch.allclose(grads[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-6)


def fit(state, checkpoints=None):
    torch.manual_seed(0)
    with state.stack.patched():
        train.fit(state, lambda: None, checkpoints or CheckpointManager())
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_several_runs_train_as_each_does_alone(kind, monkeypatch):
    """They start with other values, and keep the logits of all words at each evaluation."""
    model, split = tagger("bert"), tagged()
    forward = forward_of(kind, model, split, monkeypatch)
    together = new_state(forward, split, runs=2)
    start = together.stack.params.clone()
    fit(together)
    for k, run in enumerate(together.stack.runs):
        state = new_state(forward, split, runs=[run])
        state.stack.set_params(start[k : k + 1])
        fit(state)
        assert state.records[0].train_loss == pytest.approx(together.records[k].train_loss, 1e-4)
        found = together.logits["validation"][:, k].astype(float)
        assert found.shape == (2, len(split.labels), len(TAGS))
        assert np.allclose(found, state.logits["validation"][:, 0], atol=5e-3)


def test_the_loss_of_an_epoch_is_the_mean_over_words():
    """At a rate of 0 it is the loss of all words, though the last batch has fewer."""
    model, split = tagger("bert"), tagged((9, 4, 40, 17))
    state = new_state(Forward(model), split, runs=[Run(0.0, 0)])
    logits = predict(state.plan.forward, split, TokenBudget(2048))
    fit(state)
    expected = F.cross_entropy(torch.from_numpy(logits), split.labels).item()
    assert state.records[0].train_loss == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_has_the_same_bits(kind, monkeypatch):
    """With dropout, keeping the best epoch, from the end of the first of two epochs."""

    def start():
        model = tagger("bert")
        set_dropout(model, 0.1)
        return new_state(forward_of(kind, model, split, monkeypatch), split, runs=2, keep="best")

    class Stop(CheckpointManager):
        def after_epoch(self, state, last):
            if not last:
                saved.append(deepcopy(state.state_dict()))

    saved: list[tuple] = []
    split = tagged()
    whole, resumed = fit(start(), Stop()), start()
    resumed.load_state_dict(*saved[0])
    with resumed.stack.patched():
        train.fit(resumed, lambda: None, CheckpointManager())
    assert resumed.scores == whole.scores and len(whole.scores) == 8
    assert torch.equal(resumed.stack.params, whole.stack.params)
    assert torch.equal(resumed.best, whole.best)
    assert [r.train_loss for r in resumed.records] == [r.train_loss for r in whole.records]
    assert np.array_equal(resumed.logits["validation"], whole.logits["validation"])


def test_out_of_memory_halves_the_micro_batches(monkeypatch):
    """And repeats the step: with the losses of one micro-batch."""
    model, split = tagger("bert"), tagged()
    state, plain = new_state(Forward(model), split), Forward.__call__
    expected = new_state(Forward(model), split)
    model.train()
    with expected.stack.patched():
        wanted = loop.train_step(expected, np.arange(1), ROWS[None]).clone()
    expected.stack.set_params(expected.stack.initial_params)

    def tight(forward, tokens, batch):
        if batch.token_index.numel() > 60:
            raise torch.OutOfMemoryError("no room")
        return plain(forward, tokens, batch)

    monkeypatch.setattr(Forward, "__call__", tight)
    with state.stack.patched():
        losses = loop.train_step(state, np.arange(1), ROWS[None])
    assert torch.allclose(losses, wanted, rtol=1e-5) and state.plan.token_budget.max_tokens == 64


def test_the_head_is_the_classifier():
    """Token classifiers have no pooler."""
    for name in FAMILY:
        model = tagger(name)
        assert "classifier.weight" in head_names(model)
        assert not any("pooler" in n for n, _ in model.named_parameters())
