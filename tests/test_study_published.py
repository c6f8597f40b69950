"""The paper's scores, and how a study's scores are compared with them."""

import numpy as np
import pytest

from bitfit.study import protocol, published, results


@pytest.mark.parametrize(
    ("low", "high", "mean", "std", "off"),
    [(1, 2, 3, 1, False), (1, 2, 3, 0.5, True), (4, 5, 3, 1, False), (4.1, 5, 3, 1, True),
     (1, 2, 3, None, True), (np.nan, np.nan, 3, 1, None), (1, 2, None, None, None)],
)  # fmt: skip
def test_the_flag(low, high, mean, std, off):
    assert results.differs_from_paper(low, high, mean, std) is off


def test_published_numbers_add_up():
    """The averages of the paper's Table 2 and 3 are those of its rows."""
    expected = {("bert-base-cased", "full_ft"): 82.3, ("bert-base-cased", "bitfit"): 82.4,
                ("bert-base-cased", "b_q"): 76.6, ("bert-base-cased", "frozen"): 62.1,
                ("bert-base-cased", "rand_row_col"): 79.5}  # fmt: skip
    for (model, row), average in expected.items():
        scores = {c: published.PUBLISHED[model, row, c][0] for c in published.COLUMNS}
        assert published.average(scores) == pytest.approx(average, abs=0.06)
    assert published.average({"CoLA": 1.0}) is None
    assert {task for task, _ in published.COLUMNS.values()} == set(protocol.PAPER_TASKS)
    assert {row for _, row, _ in published.PUBLISHED} == set(protocol.ROWS) - {"b_v"}


def test_the_papers_models_whoever_publishes_them():
    for name in ("roberta-base", "FacebookAI/roberta-base", "/models/roberta-base"):
        assert protocol.paper_learning_rates(name, "bitfit") == (1e-4,)
        assert (protocol.paper_model_name(name), "bitfit", "RTE") in published.PUBLISHED
