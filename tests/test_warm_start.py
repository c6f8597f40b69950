"""Warm starts: the first values, predictions after saving, deltas, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import GLUE, TINY_BERT
from safetensors.torch import load_file

from bitfit.model.trainable import in_encoder
from bitfit.tools import multi_task
from bitfit.training.result import new_result
from glue_evaluator import GLUEvaluator
from utils import UserError

KINDS = {  # fine-tune type and components
    "bitfit": ("bitfit", ["bias"]),
    "query": ("bitfit", ["attention.self.query.bias"]),
    "frozen": ("frozen", []),
    "rand_uniform": ("rand_uniform", []),
    "rand_row_col": ("rand_row_col", []),
    "full_ft": ("full_ft", []),
}


def prepared(
    task, kind="bitfit", start=None, seeds=(0,), model=TINY_BERT, rates=(1e-3,), **options
):
    """An evaluator on the toy data, before its first step."""
    evaluator = GLUEvaluator(task, str(model), None, list(seeds), GLUE, **options)
    evaluator.preprocess_dataset("longest", 64, 8, train_size=24)
    kind, components = KINDS[kind]
    evaluator.prepare(
        kind, list(rates), components=components, mask_size=500, verbose=False, start_from=start
    )
    return evaluator


def save_random(folder, task, kind="bitfit", **options):
    """Save an evaluator whose values differ from the base model's by chance, not by training."""
    evaluator = prepared(task, kind, **options)
    stack = evaluator.prepared.new_stack()
    stack.params += 0.1 * torch.randn(
        stack.params.shape, generator=torch.Generator().manual_seed(1)
    )
    stack.load_run(0)
    evaluator.with_parts(result=new_result(stack)).save(folder / "evaluator")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{name: folder} of evaluators to start from."""
    out = tmp_path_factory.mktemp("sources")
    made = {name: save_random(out / name, "mnli", name) for name in KINDS}
    made["rte"] = save_random(out / "rte", "rte")
    made["random"] = save_random(out / "random", "mnli", random_encoder=True)
    return made


def delta(folder):
    return load_file(folder / "evaluator/delta.safetensors")


def parameters(evaluator):
    return {name: p.detach().clone() for name, p in evaluator.model.named_parameters()}


@pytest.fixture(scope="module")
def base():
    """The parameters of the toy BERT under its own names."""
    model = transformers.AutoModel.from_pretrained(TINY_BERT)
    return {f"bert.{name}": p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_all_runs_start_from_the_saved_values(sources, base, kind):
    """Encoder values are the source's or the base model's; heads are those of a cold start."""
    warm = prepared("rte", kind, sources["bitfit"], seeds=(0, 7), rates=(1e-3, 2e-3))
    cold = prepared("rte", kind, seeds=(0, 7), rates=(1e-3, 2e-3))
    saved, stack, plain = (
        delta(sources["bitfit"]),
        warm.prepared.new_stack(),
        cold.prepared.new_stack(),
    )
    assert len(stack.runs) == 4
    for run in range(4):
        stack.load_run(run)
        plain.load_run(run)
        expected = parameters(cold) | {n: v for n, v in saved.items() if n in base}
        values = parameters(warm)
        assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_the_classifier_is_used_if_the_labels_are_the_same(sources):
    """WNLI has the labels of RTE in the other order; they are matched by name for all runs."""
    warm = prepared("wnli", start=sources["rte"], seeds=(0, 7))
    saved, stack = delta(sources["rte"]), warm.prepared.new_stack()
    for run in range(2):
        values = stack.named_params(run)
        assert torch.equal(values["classifier.weight"], saved["classifier.weight"].flip(0))
        assert torch.equal(values["classifier.bias"], saved["classifier.bias"].flip(0))
    assert warm.prepared.method.start.record["classifier"] is True
    source = GLUEvaluator.load(sources["rte"] / "evaluator", None)
    same = prepared("rte", start=sources["rte"])
    assert np.array_equal(same.predict("validation"), source.predict("validation"))


@pytest.mark.parametrize("source", ["bitfit", "rand_uniform", "rand_row_col"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_evaluator_has_all_that_differs_from_the_base_model(
    tmp_path, sources, source, kind
):
    evaluator = prepared("rte", kind, sources[source])
    evaluator.train_and_evaluate(1, tmp_path)
    evaluator.save(tmp_path / "evaluator")
    evaluator.export_model(tmp_path / "model")
    loaded = GLUEvaluator.load(tmp_path / "evaluator", None)
    values, plain = parameters(evaluator), transformers.AutoModelForSequenceClassification
    for other in (loaded.model, plain.from_pretrained(tmp_path / "model")):
        assert all(torch.equal(values[name], p) for name, p in other.named_parameters())
    assert np.array_equal(loaded.predict("test"), evaluator.predict("test"))
    start = json.loads((tmp_path / "evaluator/evaluator.json").read_text())["started_from"]
    assert start == json.loads((tmp_path / "metrics.json").read_text())["started_from"]
    assert (start["task"], start["classifier"]) == ("mnli", False)
    assert loaded.caption == evaluator.caption
    assert "started from mnli" in loaded.caption


@pytest.mark.parametrize("kind", ["bitfit", "query"])
def test_changes_are_relative_to_the_base_model(tmp_path, sources, base, kind):
    """The trained bias terms and those that the warm start set; also from the saved evaluator."""
    evaluator = prepared("rte", kind, sources["bitfit"])
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path)
    changes = evaluator.terms_changes()
    assert len(changes) == 8
    values = parameters(evaluator)
    for term, row in changes.iterrows():
        fixed = term == "attention.self.key.bias" and kind == "bitfit"
        for layer, change in enumerate(row):
            name = f"bert.encoder.layer.{layer}.{term}"
            expected = (values[name] - base[name]).abs().mean()
            assert np.isnan(change) if fixed else change == pytest.approx(expected.item())
    assert GLUEvaluator.load(tmp_path, None).terms_changes().equals(changes)


def test_everything_that_trained_can_start_full_fine_tuning(tmp_path, sources):
    evaluator = prepared("rte", "full_ft", sources["full_ft"])
    source = GLUEvaluator.load(sources["full_ft"] / "evaluator", None)
    values = parameters(source)
    assert all(
        torch.equal(values[name], p)
        for name, p in evaluator.model.named_parameters()
        if in_encoder(evaluator.model, name)
    )
    with pytest.raises(
        UserError, match=r"only full_ft can start from it: give --model-name .*model"
    ):
        prepared("rte", "bitfit", sources["full_ft"])


def test_several_tasks_are_predicted_together(tmp_path, sources):
    """A frozen encoder that a warm start changed differs from the others in its biases."""
    folders = [sources["bitfit"] / "evaluator", tmp_path / "frozen", tmp_path / "query"]
    for folder in folders[1:]:
        evaluator = prepared("rte", folder.name, sources["bitfit"])
        evaluator.train_and_evaluate(1)
        evaluator.save(folder)
    rows = [("the glad wug grows", "the wug does not swell"), ("a", "b")]
    predicted = []
    for group in (folders, *([folder] for folder in folders)):
        found = multi_task.read_evaluators(group)
        predictor = multi_task.load_predictor(found, torch.device("cpu"))
        with predictor.stack.patched():
            predicted += multi_task.predict_logits(predictor, rows)
    for together, alone in zip(predicted[:3], predicted[3:], strict=True):
        np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(predicted[1] - predicted[2]).max() > 1e-4


def test_another_base_model_is_refused(tmp_path, sources, tiny_roberta):
    with pytest.raises(UserError, match=r"was trained on another base model than .*: its config"):
        prepared("rte", start=sources["bitfit"], model=tiny_roberta)
    with pytest.raises(UserError, match="was trained on another base model than"):
        prepared("rte", start=sources["random"])


def test_the_source_is_one_saved_evaluator(tmp_path, sources):
    with pytest.raises(UserError, match=r"there is no saved evaluator in .*nowhere"):
        prepared("rte", start=tmp_path / "nowhere")
    for seed in range(5):
        (tmp_path / f"sweep/lr0.1_seed{seed}").symlink_to(sources["bitfit"]) if seed else (
            tmp_path / "sweep/lr0.1_seed0"
        ).mkdir(parents=True)
    message = r"has 4 saved evaluators: give one of .*seed1/evaluator, .*seed3/evaluator and 1 more"
    with pytest.raises(UserError, match=message):
        prepared("rte", start=tmp_path / "sweep")
    for seed in range(2, 5):
        (tmp_path / f"sweep/lr0.1_seed{seed}").unlink()
    assert prepared("rte", start=tmp_path / "sweep").prepared.method.start
