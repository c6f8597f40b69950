"""Classifiers in checkpoints: which weights are kept, and in which order their outputs are."""

import pytest
import torch
from conftest import GLUE, load_model
from model_folders import MNLI, OLDER_DEBERTA, RTE, STSB, change, changed, model_with_head, set_json

from bitfit.model import loading
from glue_evaluator import GLUEvaluator
from utils import UserError


@OLDER_DEBERTA
@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("roberta", ["classifier.dense.weight", "classifier.dense.bias"]),
        ("deberta-v2", ["pooler.dense.weight", "pooler.dense.bias"]),
        ("modernbert", ["head.dense.weight", "head.norm.weight"]),
    ],
)
def test_what_a_checkpoint_has_of_a_head_is_kept(folder, kind, kept):
    """Three labels in the checkpoint, two in the task; each run draws the rest."""
    original = dict(model_with_head(folder, kind, 3).named_parameters())
    first, again, other = (dict(load_model(folder, RTE, s).named_parameters()) for s in (1, 1, 2))
    for name in kept:
        assert torch.equal(first[name], original[name])
        assert torch.equal(other[name], original[name])
    (output,) = (n for n in first if n.startswith("classifier.") and first[n].shape[:1] == (2,)
                 and first[n].dim() == 2)  # fmt: skip
    assert torch.equal(first[output], again[output])
    assert not torch.equal(first[output], other[output])
    _, initialized = loading.load_model(folder, RTE)
    assert initialized == {output, output.replace("weight", "bias")}


def test_each_run_of_a_sweep_draws_only_what_is_absent(folder):
    original = model_with_head(folder, "roberta", 3, type_vocab_size=2)
    evaluator = GLUEvaluator("rte", str(folder), None, [1, 2], GLUE)
    evaluator.preprocess_dataset("longest", 12, 8, train_size=16)
    evaluator.training_preparation(1e-30, "adamw", False, verbose=False)
    evaluator.train_and_evaluate(1)
    heads = []
    for number in range(2):
        evaluator.select(number)
        heads.append({n: p.detach().clone() for n, p in evaluator.model.named_parameters()})
    for seed, head in zip((1, 2), heads, strict=True):
        assert torch.equal(head["classifier.dense.weight"], original.classifier.dense.weight)
        alone = load_model(folder, RTE, seed)
        assert torch.equal(head["classifier.out_proj.weight"], alone.classifier.out_proj.weight)
    assert not torch.equal(*(head["classifier.out_proj.weight"] for head in heads))


ORDERS = [  # the checkpoint's labels; for each of the task's, which output it was; None: no match
    (MNLI, ["entailment", "neutral", "contradiction"], [0, 1, 2]),
    (MNLI, ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
    (MNLI, ["contradiction", "entailment", "neutral"], [1, 2, 0]),
    (MNLI, ["LABEL_0", "LABEL_1", "LABEL_2"], None),
    (MNLI, ["negative", "neutral", "positive"], None),
    (MNLI, ["neutral", "Neutral", "entailment"], None),
    (RTE, ["Not-Entailment", "entailment"], [1, 0]),
    (RTE, ["LABEL_0", "LABEL_1"], None),
    (STSB, ["score"], [0]),
    (STSB, ["LABEL_0"], None),
]


@pytest.mark.parametrize(("task", "names", "order"), ORDERS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_outputs_are_brought_into_the_tasks_order_by_name(folder, kind, task, names, order):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    original = model_with_head(folder, kind, len(names), **labels)
    output = original.classifier if kind == "bert" else original.classifier.out_proj
    torch.nn.init.normal_(output.bias)
    original.save_pretrained(folder)
    model = load_model(folder, task, seed=1)
    ours = model.classifier if kind == "bert" else model.classifier.out_proj
    if order is None:
        assert not ours.bias.any()
        assert not torch.equal(ours.weight, output.weight)
        other = load_model(folder, task, seed=2)
        other = other.classifier if kind == "bert" else other.classifier.out_proj
        assert not torch.equal(ours.weight, other.weight)
    else:
        assert torch.equal(ours.weight, output.weight[order])
        assert torch.equal(ours.bias, output.bias[order])
        ids = torch.tensor([[2, 9, 8, 3]])
        with torch.no_grad():
            expected = original.eval()(input_ids=ids).logits[:, order]
            assert torch.allclose(model.eval()(input_ids=ids).logits, expected, atol=1e-6)
    if kind == "roberta":
        assert torch.equal(model.classifier.dense.weight, original.classifier.dense.weight)


def test_a_head_that_is_not_used_may_be_damaged(folder):
    def bad_head(tensors):
        return tensors | {"classifier.weight": torch.full((2, 128), float("nan"))}

    change(folder, bad_head)  # no labels in config.json: drawn from the seed
    assert load_model(folder, RTE).classifier.weight.isfinite().all()
    set_json(folder, id2label={"0": "entailment", "1": "not_entailment"})
    with pytest.raises(UserError, match=r"NaN or infinite values .the first: classifier.weight"):
        loading.load_model(folder, RTE)


REPORTS = {
    "plain": (
        lambda f: None,
        "kept the encoder; initialized from the run's seed: classifier; not used: "
        "cls.predictions, cls.seq_relationship",
    ),
    "no-pooler": (
        changed(lambda t: {n: v for n, v in t.items() if ".pooler." not in n}),
        "kept the encoder; bert.pooler.dense is absent: initialized at random, alike in all runs; "
        "initialized from the run's seed: classifier; not used: cls.predictions, "
        "cls.seq_relationship",
    ),
    "reordered": (
        lambda f: model_with_head(f, "bert", 2, id2label={0: "not_entailment", 1: "entailment"}),
        "kept the encoder, classifier; outputs reordered from not_entailment, entailment "
        "to entailment, not_entailment",
    ),
    "partly": (
        lambda f: model_with_head(f, "roberta", 3),
        "kept the encoder, classifier.dense; initialized from the run's seed: classifier.out_proj",
    ),
    "other-labels": (
        lambda f: model_with_head(f, "bert", 2, id2label={0: "ham", 1: "spam"}),
        "kept the encoder; initialized from the run's seed: classifier; the head's labels were "
        "ham, spam, not the task's",
    ),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_one_line_says_which_weights_are_used(folder, caplog, kind):
    change_folder, expected = REPORTS[kind]
    change_folder(folder)
    evaluator = GLUEvaluator("rte", str(folder), None, [0, 1], GLUE)
    evaluator.preprocess_dataset("longest", 12, 8, train_size=16)
    caplog.set_level("INFO", logger="bitfit")
    for _ in range(2):  # as for runs one after the other
        evaluator.training_preparation(1e-3, "adamw", False, verbose=False)
    message = [m for m in caplog.messages if m.startswith("weights of ")]
    assert message == [f"weights of {folder}: {expected}"]
