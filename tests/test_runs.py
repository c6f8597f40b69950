import numpy as np
import pytest
import torch
from conftest import forward_of
from transformers import AutoModelForSequenceClassification

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.forward_trials import reason_not_stackable, stacked_logits_differ
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack, clip_grad_norms_
from bitfit.model.trainable import select_trainable
from bitfit.options import FINE_TUNE_TYPES

RUN = Run(1e-3, 0)


@pytest.fixture
def model(tiny_bert):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()


def gradients(model):
    """Plain autograd on a fresh copy, everything trainable: the oracle."""
    model.requires_grad_(True).zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def loss(model):
    ids = torch.arange(24).view(2, 12) + 5
    return model(input_ids=ids).logits.square().sum()


def masks(model):
    rng = np.random.default_rng(0)
    components = dict.fromkeys(FINE_TUNE_TYPES, ()) | {"bitfit": ["bias"]}
    return {
        kind: select_trainable(model, kind, components[kind], 5_000, rng)
        for kind in FINE_TUNE_TYPES
    }


TOKENS = TokenizedSplit(
    ids=torch.arange(30, dtype=torch.int32) + 5, types=None, starts=np.array([0, 10]),
    labels=torch.tensor([0, 1]), lengths=np.array([10, 20]), pad_id=0,
)  # fmt: skip


@pytest.mark.parametrize("method", ["bitfit", "full_ft", "rand_uniform", "rand_row_col"])
def test_the_flat_gradient_is_autograds(model, method):
    expected, trainable = gradients(model), masks(model)[method]
    model.zero_grad()
    stack = RunStack(model, trainable, [RUN])
    with stack.patched():
        loss(model).backward()
        stack.accumulate_grads()
    for name, (start, stop) in stack.slices.items():
        wanted = expected[name].flatten()
        wanted = wanted if trainable[name] is None else wanted[torch.from_numpy(trainable[name])]
        assert torch.allclose(stack.grads[0, start:stop], wanted, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("method", ["bitfit", "full_ft", "rand_uniform", "rand_row_col"])
def test_only_what_is_chosen_moves(model, method):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = masks(model)[method]
    stack = RunStack(model, trainable, [RUN])
    with stack.patched():
        stack.params += 1.0
    for name, parameter in model.named_parameters():
        expected = before[name].clone().view(-1)
        if name in trainable:
            expected[slice(None) if trainable[name] is None else trainable[name]] += 1.0
        assert torch.equal(parameter.detach().view(-1), expected), name


@pytest.mark.parametrize(("method", "runs"), [("rand_uniform", 1), ("bitfit", 1), ("bitfit", 2)])
def test_a_model_is_plain_afterwards(model, tmp_path, method, runs):
    stack = RunStack(model, masks(model)[method], [Run(1e-3, seed) for seed in range(runs)])
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    with stack.patched(torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == storage
    assert not any("forward" in vars(module) for module in model.modules())
    loss(model).backward()  # no hook gathers any more
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    stack.params.zero_()
    assert model.classifier.weight.abs().sum() > 0  # no storage is shared any more
    model.save_pretrained(tmp_path)


def test_the_key_bias_gets_no_gradient(model):
    """q.(k + b_k) adds one number to all scores of a row, and softmax removes it."""
    stack = RunStack(model, masks(model)["bitfit"], [RUN])
    with stack.patched():
        loss(model).backward()
        stack.accumulate_grads()
    scale = stack.grads.abs().max()
    for name, (start, stop) in stack.slices.items():
        largest = stack.grads[0, start:stop].abs().max() / scale
        assert (largest < 1e-6) == name.endswith("key.bias"), (name, largest)


def test_clipping_is_per_run():
    grads = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    alone = [row.clone() for row in grads]
    for row in alone:
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = row
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert torch.allclose(clip_grad_norms_(grads, 1.0), torch.tensor([5.0, 0.5, 0.0]))
    assert torch.allclose(grads, torch.stack(alone))


def test_no_memory_in_the_middle_of_a_gradient_leaves_nothing_behind(model, monkeypatch):
    """The step is tried again: what the first try left must not count twice."""
    trainable = masks(model)["rand_uniform"]
    stack = RunStack(model, trainable, [RUN])
    with stack.patched():
        loss(model).backward()
        stack.accumulate_grads()
        wanted = stack.grads.clone()
        stack.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", lambda *a, **o: (_ for _ in ()).throw(MemoryError()))
            loss(model).backward()
            with pytest.raises(MemoryError):
                stack.accumulate_grads()
        assert any(p.grad is not None for p in model.parameters())
        stack.zero_grad()
        loss(model).backward()
        stack.accumulate_grads()
    assert torch.allclose(stack.grads, wanted)


def test_what_can_be_stacked(model):
    trainable, forward = masks(model), forward_of(model)
    assert reason_not_stackable(forward, trainable["bitfit"], TOKENS) is None
    assert reason_not_stackable(forward, trainable["frozen"], TOKENS) is None
    reason = reason_not_stackable(forward, trainable["full_ft"], TOKENS)
    assert reason and "the encoder's matrices train" in reason
    for method in ("rand_uniform", "rand_row_col"):
        reason = reason_not_stackable(forward, trainable[method], TOKENS)
        assert reason and "other randomly chosen parameters" in reason


def test_a_model_of_other_modules_is_not_stacked(model):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = model.bert.encoder.layer[1].output
    layer.dense.__class__ = Scaled
    reason = reason_not_stackable(forward_of(model), masks(model)["bitfit"], TOKENS)
    assert reason and "bert.encoder.layer.1.output.dense.bias belongs to a Scaled" in reason


def test_a_model_that_goes_around_its_modules_is_found_out(model):
    """Its Linear is a plain one, but is not what computes."""
    trainable = masks(model)["bitfit"]
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert not stacked_logits_differ(forward_of(model), trainable, TOKENS)
    output = model.bert.encoder.layer[0].intermediate

    def around(x):
        x = torch.nn.functional.linear(x, output.dense.weight, output.dense.bias)
        return torch.nn.functional.gelu(x)

    output.forward = around
    reason = reason_not_stackable(forward_of(model), trainable, TOKENS)
    assert reason and "does not compute with its Linear and LayerNorm modules alone" in reason
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
