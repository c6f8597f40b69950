"""Arguments of GLUEvaluator are checked like the values of flags, before any work begins."""

import numpy as np
import pytest
from conftest import GLUE, forbid_loading

from glue_evaluator import GLUEvaluator
from utils import UserError


def new_evaluator(folder, **options):
    return GLUEvaluator("cola", folder, None, data_dir=GLUE, **options)


def loaded(folder, **options):
    evaluator = new_evaluator(folder, **options)
    evaluator.preprocess_dataset("longest", 32, 16, train_size=16)
    return evaluator


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("seed", [0, "a"]),
        ("data_seed", [0, -3]),
        ("max_tokens", 0),
    ],
)
def test_settings_of_an_evaluator(tiny_bert, name, value):
    with pytest.raises(UserError, match=f"^{name}: '.*' is not a whole number at least"):
        new_evaluator(tiny_bert, **{name: value})


@pytest.mark.parametrize(
    "values",
    [{"train_size": 0}, {"train_size": -1}, {"train_score_rows": 1.5}, {"batch_size": 0}],
    ids=str,
)
def test_sizes_of_the_data(tiny_bert, monkeypatch, values):
    evaluator = new_evaluator(tiny_bert)
    forbid_loading(monkeypatch)
    (name,) = values
    arguments = {"max_sequence_len": 32, "batch_size": 16} | values
    with pytest.raises(UserError, match=f"{name}: '.*' is not a whole number at least"):
        evaluator.preprocess_dataset("longest", **arguments)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (-1, "learning_rate: '-1' is not a number at least 0"),
        (float("nan"), "learning_rate: 'nan' is not a number at least 0"),
        ([1e-3, float("inf")], "learning_rate: 'inf' is not a number at least 0"),
        ([], "learning_rate: give at least one"),
    ],
)
def test_learning_rates(tiny_bert, rates, message):
    with pytest.raises(UserError, match=message):
        loaded(tiny_bert, seed=0).prepare("bitfit", rates, components=["all"], verbose=False)


def test_mixed_components(tiny_bert):
    evaluator = loaded(tiny_bert, seed=0)
    with pytest.raises(UserError, match="components: give one list of bias terms, or a list of"):
        evaluator.prepare("bitfit", 1e-3, components=["all", ["query"]], verbose=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_epochs": 1.5}, "'1.5' is not a whole number at least 1"),
        ({"num_epochs": 0}, "'0' is not a whole number at least 1"),
        ({"evaluation_frequency": 0}, "'0' is not a whole number at least 1"),
        ({"warmup_ratio": 2}, "warmup_ratio: '2' is not a number at least 0 and below 1"),
        ({"warmup_ratio": float("nan")}, "warmup_ratio: 'nan' is not a number at least 0"),
        ({"halving": 0.5}, "halving: '0.5' is not a whole number at least 1"),
        ({"halving": 1}, "halving compares learning rates or sets of bias terms"),
    ],
    ids=str,
)
def test_settings_of_a_training(tiny_bert, values, message):
    evaluator = loaded(tiny_bert, seed=0)
    evaluator.prepare("bitfit", 1e-3, components="all", verbose=False)
    with pytest.raises(UserError, match=message):
        evaluator.train_and_evaluate(**{"num_epochs": 1} | values)
    assert evaluator.result is None


def test_sequences_of_python_and_numpy_are_lists(tiny_bert):
    evaluator = loaded(tiny_bert, seed=range(2), data_seed=np.arange(2))
    evaluator.prepare("bitfit", np.array([1e-3, 2e-3]), components=("query",), verbose=False)
    names = [run.name for run in evaluator.runs]
    grid = [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    pairs = [f"seed{a}" if a == b else f"init{a}_data{b}" for a, b in grid]
    assert names == [f"lr{rate}_{pair}" for rate in ("0.001", "0.002") for pair in pairs]
    evaluator.train_and_evaluate(1, halving=None)
    assert evaluator.score_table()
