"""Tagging through the evaluator: fine-tune types, saved evaluators, exported models, deltas."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY_BERT, set_dropout
from safetensors.numpy import load_file

from bitfit.artifacts.metrics_files import LOGITS
from bitfit.data.tasks import score
from bitfit.model.loading import load_config
from bitfit.options import FINE_TUNE_TYPES
from bitfit.tools import deltas, saved_evaluators
from glue_evaluator import GLUEvaluator
from utils import UserError

TOY = ROOT / "examples" / "tagging"


def prepared(kind="bitfit", rates=(3e-3,), seeds=0, task="toy-pos", max_tokens=None):
    evaluator = GLUEvaluator(
        str(TOY / f"{task}.json"), str(TINY_BERT), None, seed=seeds, max_tokens=max_tokens
    )
    evaluator.preprocess_dataset("longest", 64, 8, train_size=40)
    components = ["bias"] if kind == "bitfit" else None
    evaluator.prepare(kind, list(rates), components=components, verbose=False)
    return evaluator


@pytest.mark.parametrize("kind", FINE_TUNE_TYPES)
def test_every_type_is_trained_saved_and_exported(tmp_path, kind):
    evaluator = prepared(kind, [1e-4 if kind == "full_ft" else 3e-3])
    before = evaluator.predict("validation")
    evaluator.train_and_evaluate(2, tmp_path)
    logits, tokens = evaluator.predict("validation"), evaluator.tokens("validation")
    assert logits.shape == (len(tokens.word_index), evaluator.num_labels)
    assert not np.allclose(logits, before)
    evaluator.save(tmp_path / "evaluator")
    loaded = GLUEvaluator.load(tmp_path / "evaluator", None)
    assert np.array_equal(loaded.predict("validation"), logits)
    assert loaded.evaluate("validation") == evaluator.evaluate("validation")
    last = {name: values[-1] for name, values in evaluator.evaluations["validation"].items()}
    assert evaluator.evaluate("validation") == pytest.approx(last)
    evaluator.export_model(tmp_path / "model")
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert list(model.config.id2label.values()) == list(evaluator.task.labels)
    row = int(tokens.lengths.argmax())
    part = slice(tokens.starts[row], tokens.starts[row] + tokens.lengths[row])
    with torch.no_grad():
        found = model.eval()(input_ids=tokens.ids[None, part].long()).logits[0].numpy()
    words = (tokens.word_index >= part.start) & (tokens.word_index < part.stop)
    assert np.allclose(found[tokens.word_index[words] - part.start], logits[words], atol=1e-5)


def test_a_sweep_in_one_pass_keeps_its_best_epochs_and_the_logits_of_all_words(tmp_path):
    evaluator = prepared(rates=[1e-3, 5e-3], seeds=[0, 1], task="toy-phrases")
    assert evaluator.passes() == [evaluator.runs]
    evaluator.train_and_evaluate(3, tmp_path, keep="best")
    assert evaluator.task.metrics[0] == "Entity-F1"
    for k, run in enumerate(evaluator.runs):
        evaluator.select(k)
        values = evaluator.evaluations["validation"]
        assert evaluator.evaluate("validation")["Entity-F1"] == max(values["Entity-F1"])
        kept = load_file(tmp_path / run.name / LOGITS)
        logits, labels = kept["validation"], kept["validation.labels"]
        assert logits.dtype == np.float16
        assert logits.shape == (3, len(labels), evaluator.num_labels)
        again = [
            score(evaluator.task, epoch_logits, labels, kept["validation.sentences"])
            for epoch_logits in logits
        ]
        for metric in values:
            assert [of[metric] for of in again] == pytest.approx(values[metric], abs=1e-6)


@pytest.mark.parametrize("kind", ["bitfit", "frozen"])
def test_runs_of_a_sweep_equal_single_runs(kind):
    """Each draws its own training sentences. Small micro-batches change nothing either."""

    def losses(seeds, max_tokens=None):
        evaluator = prepared(kind, [1e-3], seeds, max_tokens=max_tokens)
        set_dropout(evaluator.model, 0.0)
        evaluator.train_and_evaluate(2)
        return [record.train_loss for record in evaluator.result.records]

    together = losses([0, 1])
    assert together == [pytest.approx(losses(seed)[0], rel=1e-4) for seed in (0, 1)]
    assert losses([0, 1], max_tokens=70) == [pytest.approx(loss, rel=1e-4) for loss in together]


def test_deltas_of_taggers_are_compared_and_averaged(tmp_path):
    evaluator = prepared(seeds=[0, 1])
    evaluator.train_and_evaluate(1)
    for k in range(2):
        evaluator.select(k)
        evaluator.save(tmp_path / str(k))
    found = saved_evaluators.read_evaluators([tmp_path / "0", tmp_path / "1"])
    first = GLUEvaluator.load(tmp_path / "0", None)
    cosine = deltas.compare_deltas(found, first).cosine.to_numpy()
    assert 0 < cosine[0, 1] < 1
    average, table = deltas.average_evaluators(found, [1.0, 1.0], first)
    scores = table["validation Accuracy"]
    assert scores.iloc[2] == average.evaluate("validation")["Accuracy"]


def test_an_architecture_without_a_token_classifier_is_refused(tmp_path):
    config = transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    task = prepared().task
    with pytest.raises(UserError, match="transformers has no token classifier of the architecture"):
        load_config(tmp_path, task)


def test_the_head_of_a_tagger_is_kept_if_its_tags_are_the_tasks(tmp_path):
    """In another order they are reordered, as for other tasks."""
    evaluator = prepared("frozen")
    evaluator.train_and_evaluate(1)
    evaluator.export_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    again = GLUEvaluator(str(TOY / "toy-pos.json"), str(tmp_path), None, seed=5)
    again.preprocess_dataset("longest", 64, 8, train_size=40)
    again.prepare("frozen", [1e-3], verbose=False)
    assert torch.equal(again.model.classifier.weight, evaluator.model.classifier.weight)
    names = list(reversed(config["id2label"].values()))
    config |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again.prepare("frozen", [1e-3], verbose=False)
    expected = evaluator.model.classifier.weight.flip(0)
    assert torch.equal(again.model.classifier.weight, expected)
