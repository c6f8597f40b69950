"""The tasks, and the functions that depend on a task: loss, predictions, scores, saved logits.

This file lists the GLUE tasks. Columns, label order and metrics are those of the data set
`nyu-mll/glue` and of the released BitFit code. TSV columns and server files are those of
gluebenchmark.com. `bitfit.data.task_files` makes a `Task` from a user's task file.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # -h imports this module and must not import torch
    import torch

METRICS = {  # {predicted values: metrics}; F1 is the F1 of the second of two labels
    "labels": ("Accuracy", "F1", "Macro-F1", "MCC"),
    "scores": ("Spearman", "Pearson"),
    "tags": ("Accuracy", "Entity-F1", "Macro-F1", "MCC"),  # of words; of entities
}


@dataclass(frozen=True)
class Task:
    """Everything that is specific to one task; no other code depends on task names."""

    name: str
    folder: str  # the name of GLUE's folder, and of the server's file without its suffix
    texts: tuple[str, ...]  # columns of nyu-mll/glue: one sentence, or two
    labels: tuple[str, ...]  # in nyu-mll/glue's order; empty for a regression
    metrics: tuple[str, ...] = ("Accuracy",)  # the main metric first
    tsv_texts: tuple[str, ...] = ()  # names of these columns in GLUE's TSV files; (): the same
    tsv_label: str = "label"
    tsv_names: tuple[str, ...] = ()  # the columns of a train or dev file that has no header line
    labels_by_name: bool = False  # TSV and server files hold names, not numbers
    skips_short_rows: bool = False  # the published train file has broken rows, which are skipped
    splits: dict[str, str] = field(default_factory=lambda: {"validation": "dev", "test": "test"})
    validation_rows: tuple[int, ...] = ()  # numbers of examples in GLUE's validation splits
    score_range: tuple[float, float] = (0.0, 5.0)  # of a regression; the default is STS-B's
    excluded_labels: tuple = ()  # None, or as files write them: labels of rows to leave out
    record: dict[str, Any] | None = None  # of a custom task: the content of the task file

    @property
    def tsv_columns(self) -> tuple[str, ...]:
        return self.tsv_texts or self.texts

    @property
    def is_tagging(self) -> bool:
        """Whether words have labels (tags), not texts; then `texts` is the column of words."""
        return self.record is not None and "words" in self.record

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def written_labels(self) -> tuple[str, ...]:
        """The labels as TSV and server files write them, in order."""
        return self.labels if self.labels_by_name else tuple(map(str, range(len(self.labels))))

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """The scored splits; the first holds the main score."""
        return tuple(name for name in self.splits if name.startswith("validation"))

    @property
    def server_files(self) -> dict[str, str]:
        """The files of test predictions, {test split: name}; GLUE's server expects these names."""
        if self.record:
            tests = [split for split in self.splits if split.startswith("test")]
            names = {s: self.name + s.removeprefix("test").replace("_", "-") for s in tests}
            if self.is_tagging and "files" in self.record:  # Tags have the format of the input.
                return {s: name + PurePath(self.splits[s]).suffix for s, name in names.items()}
            suffix = ".jsonl" if self.is_tagging else ".tsv"
            return {s: name + suffix for s, name in names.items()}
        suffixes = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
        files = {s: f"{self.folder}{suffixes[s]}.tsv" for s in self.splits if s in suffixes}
        return files | ({"ax": "AX.tsv"} if "ax" in self.splits else {})


MNLI_SPLITS = {
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
    "ax": "AX",  # the diagnostic set, in a separate folder, predicted by the MNLI model
}
ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
QUESTIONS = ("question1", "question2")

GLUE_TASKS = (
    Task("cola", "CoLA", ("sentence",), labels=("unacceptable", "acceptable"), metrics=("MCC",),
         tsv_names=("source", "label", "annotation", "sentence"),
         validation_rows=(1043,)),
    Task("mnli", "MNLI", ("premise", "hypothesis"),
         labels=("entailment", "neutral", "contradiction"),
         tsv_texts=PAIR, tsv_label="gold_label", splits=MNLI_SPLITS, labels_by_name=True,
         validation_rows=(9815, 9832)),
    Task("mrpc", "MRPC", PAIR, labels=("not_equivalent", "equivalent"), metrics=("F1", "Accuracy"),
         tsv_texts=("#1 String", "#2 String"), tsv_label="Quality",
         validation_rows=(408,)),
    Task("qnli", "QNLI", ("question", "sentence"), labels=ENTAILMENT, labels_by_name=True,
         validation_rows=(5463,)),
    Task("qqp", "QQP", QUESTIONS, labels=("not_duplicate", "duplicate"), metrics=("F1", "Accuracy"),
         tsv_label="is_duplicate", skips_short_rows=True,
         validation_rows=(40430,)),
    Task("rte", "RTE", PAIR, labels=ENTAILMENT, labels_by_name=True,
         validation_rows=(277,)),
    Task("sst2", "SST-2", ("sentence",), labels=("negative", "positive"),
         validation_rows=(872,)),
    Task("stsb", "STS-B", PAIR, labels=(), metrics=("Spearman", "Pearson"), tsv_label="score",
         validation_rows=(1500,)),
    Task("wnli", "WNLI", PAIR, labels=("not_entailment", "entailment"),
         validation_rows=(71,)),
)  # fmt: skip
TASKS = {task.name: task for task in GLUE_TASKS}


def label_text(value: object) -> str | None:
    """Return a label as text: words, "true" or "false", "1" for 1.0; None for other values."""
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real) and math.isfinite(value):
        whole = int(float(value))
        return str(whole if value == whole else value)
    return value if isinstance(value, str) else None


def row_losses(task: Task, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Return the cross-entropy or squared error of each label, (..., C), (...) -> (...).

    It is 0 for the label -100, as in transformers.
    """
    import torch.nn.functional as F

    if task.is_regression:
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """Return label numbers, or scores clipped to the task's range, (rows, C) -> (rows,)."""
    if task.is_regression:
        return np.clip(logits[:, 0], *task.score_range)
    return logits.argmax(axis=1)


def compact(task: Task, logits: np.ndarray) -> np.ndarray:
    """Return logits (examples, C) as they are saved, in half precision.

    The largest logit of each example becomes 0, so that rounding cannot change the prediction.
    The scores of a regression keep full precision, because their ranks need all digits.
    """
    if task.is_regression:
        return logits
    below = logits - logits.max(axis=1, keepdims=True)
    half = np.finfo(np.float16)  # Values below 0 stay below 0, and finite.
    return np.where(below < 0, below.clip(half.min, -half.smallest_subnormal), below).astype(
        half.dtype
    )


def score(
    task: Task, logits: np.ndarray, labels: np.ndarray, sentences: np.ndarray | None = None
) -> dict[str, float]:
    """Return {metric: value} of float logits (rows, C) against labels (rows,).

    A correlation with a constant is 0, without a warning, as scikit-learn does for Matthews'.

    Args:
        sentences: for tagging, where rows are words: the number of words of each sentence, in
            order. Entities end with their sentence.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    def correlation(function: Callable) -> float:
        constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
        return 0.0 if constant else function(labels, predicted).statistic

    def entity_f1() -> float:
        from seqeval.metrics import f1_score as f1_of_entities

        if sentences is None:
            raise ValueError("entities need the number of words of each sentence")
        gold, found = (tags_of_sentences(task, tags, sentences) for tags in (labels, predicted))
        return f1_of_entities(gold, found, zero_division=0)

    predicted = logits[:, 0] if task.is_regression else predictions(task, logits)
    compute = {
        "MCC": lambda: matthews_corrcoef(labels, predicted),
        "Accuracy": lambda: accuracy_score(labels, predicted),
        "F1": lambda: f1_score(labels, predicted, zero_division=0.0),
        "Macro-F1": lambda: f1_score(labels, predicted, average="macro", zero_division=0.0),
        "Spearman": lambda: correlation(spearmanr),
        "Pearson": lambda: correlation(pearsonr),
        "Entity-F1": entity_f1,
    }
    return {metric: float(compute[metric]()) for metric in task.metrics}


def tags_of_sentences(
    task: Task, labels: np.ndarray, word_counts: np.ndarray | list[int]
) -> list[list[str]]:
    """Return the tags of each sentence, for label numbers (words,) and the words of sentences."""
    parts = np.split(np.array(task.labels)[labels], np.cumsum(word_counts)[:-1])
    return [part.tolist() for part in parts]
