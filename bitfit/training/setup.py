"""The setup of an evaluator and its data: values that do not change once they are created."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from bitfit.data import task_files
from bitfit.data.tasks import Task, score
from bitfit.data.tokens import Dataset, Split, TokenizedSplit, concatenate, describe_split
from bitfit.model import fingerprints, hub, loading
from bitfit.model.bias_terms import add_biases, select_components
from bitfit.model.precision import DTYPES
from bitfit.model.trainable import components_to_terms
from bitfit.model.warm_start import WarmStart
from bitfit.options import NO_TERMS
from bitfit.parsing import COUNT, POSITIVE, SEED, check_values
from bitfit.results.scores import training_caption
from utils import UserError, choose_device, choose_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Seeds = int | Sequence[int] | None  # one or several; None: a default


@dataclass(frozen=True)
class Setup:
    """The task, the base model and the machine of an evaluator."""

    task: Task
    model_name: str
    revision: str | None  # commit to read the model from; None: a local folder
    model_commit: str | None
    base_name: str  # for captions
    data_dir: str | Path | None
    random_encoder: bool
    add_biases: bool  # zeros, through the switches of the model's config
    device: torch.device
    seeds: list[int]
    data_seeds: list[int] | None  # None: the data seed of each run is its seed
    precision: str
    max_tokens: int | None

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that the model computes in."""
        return DTYPES[self.precision]

    def caption(self, method: "Method") -> str:
        """Return one line with task, model and method."""
        terms = components_to_terms(method.components)
        trained = {"fine_tune_type": method.fine_tune_type, "bias_terms": terms}
        metadata = vars(self) | trained | method.start_record | {"model": self.base_name}
        return training_caption(self.task, metadata)


def make_setup(
    task_name: str | dict[str, Any], model_name: str, device: int | None, *, seed: Seeds,
    data_seed: Seeds, data_dir: str | Path | None, precision: str | None, random_encoder: bool,
    max_tokens: int | None, model_revision: str | None, add_biases: bool,
) -> Setup:  # fmt: skip
    """Return the setup of `GLUEvaluator`'s arguments; raise UserError if one is wrong.

    Args:
        task_name: a name in `bitfit.data.tasks.TASKS`, the path or the content of a task file.
        model_name: a name on the Hub, or a folder.
        device: GPU number; None for the CPU.
        seed: of classifier, masks and data, or a list; None: the seed of `set_seed`.
        data_seed: of training rows, their order and dropout, or a list; None: as `seed`.
        data_dir: GLUE's TSV folders or Parquet files; None: the Hub, or beside the task file.
        precision: "fp32" or "bf16"; None: bf16 on a GPU that supports it, else fp32.
        random_encoder: draw the encoder's weights at random (a control).
        max_tokens: in one forward pass; None: the default of the device.
        model_revision: tag, branch or commit of a model on the Hub; None: its main branch.
        add_biases: add zero biases to the encoder, see `bitfit.model.bias_terms`.
    """
    check_values("max_tokens", max_tokens, POSITIVE)
    if precision not in (None, *DTYPES):
        raise UserError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
    task, data_dir = task_files.resolve_task(task_name, data_dir)
    revision, commit = hub.resolve_revision(model_name, model_revision)
    torch_device = choose_device(device)
    return Setup(
        task=task, model_name=model_name, revision=revision, model_commit=commit,
        base_name=Path(model_name).name, data_dir=data_dir, random_encoder=random_encoder,
        add_biases=add_biases, device=torch_device,
        seeds=check_values("seed", seed, SEED) or [torch.initial_seed()], max_tokens=max_tokens,
        data_seeds=check_values("data_seed", data_seed, SEED) or None,
        precision=choose_precision(precision, torch_device),
    )  # fmt: skip


def load_base(setup: Setup, report: bool = False) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Return the base model on the device, and fields of `PreparedModel` that depend on it.

    Args:
        report: log which weights of the checkpoint are used, and which biases are added.
    """
    model, initialized = loading.load_model(
        setup.model_name, setup.task, setup.random_encoder, revision=setup.revision, report=report
    )
    draw = partial(loading.init_head, names=initialized) if initialized else None
    fields = {"encoder_sha256": fingerprints.fingerprint(model), "init_head": draw}
    if setup.add_biases:
        add_biases(model, report)
    return model.to(setup.device), fields


@dataclass(frozen=True)
class LoadedData:
    """The tokenized data of a task; splits are read when they are first needed."""

    dataset: Dataset
    tokenizer: Any
    base_fingerprints: dict[str, Any]  # of the base model's config and tokenizer
    max_sequence_len: int  # in tokens; longer examples are cut
    batch_size: int  # examples in an optimizer step
    train_size: int | None  # training examples drawn by each data seed; None: all

    def tokens(self, split: str) -> TokenizedSplit:
        """Return the tokens of a split; UserError if it does not exist."""
        return self.dataset.split(split).tokens

    def all_tokens(self) -> TokenizedSplit:
        """Return the tokens of all splits read so far."""
        return concatenate([split.tokens for split in self.dataset.splits.values()])

    def read_splits(self, test_splits: bool) -> None:
        """Read the training and validation splits, and the test splits if asked to."""
        tests = self.test_files() if test_splits else ()
        for split in ("train", *self.dataset.task.validation_splits, *tests):
            self.dataset.has_split(split)
        self.dataset.report_overlap()

    def test_files(self) -> dict[str, str]:
        """Return {test split: name of its file of predictions}; UserError if there is none."""
        task = self.dataset.task
        if not task.server_files:
            raise UserError(f"the task file of {task.name} names no test split to predict")
        return task.server_files

    def describe_splits(self) -> dict[str, dict[str, Any]]:
        """Return the number of examples and the labels of each split read so far."""
        splits = self.dataset.splits.items()
        return {n: describe_split(self.dataset.task, s.tokens) for n, s in splits if s.tokens}

    def score(self, split: str, predict: Callable[[str], np.ndarray]) -> dict[str, float]:
        """Return {metric: value} of all rows of a split with labels.

        Args:
            predict: a function of the split that returns the logits of all rows.
        """
        if split not in ("train", *self.dataset.task.validation_splits):
            raise UserError(f"{split!r} has no labels: give train or a validation split")
        tokens = self.tokens(split)
        rows = np.arange(len(tokens.lengths))
        labels, sentences = tokens.labels_of(rows), tokens.sentences_of(rows)
        return score(self.dataset.task, predict(split), labels, sentences=sentences)

    def hashes(self) -> dict[str, str]:
        """Return the hashes of the scored splits and of the test splits read so far."""
        names = ("train", *self.dataset.task.validation_splits)
        tests = [split for name, split in self.dataset.splits.items() if name not in names]
        return {
            "data_sha256": hash_splits(self.dataset.split(name) for name in names),
            "test_sha256": hash_splits(tests),
        }


def hash_splits(splits: Iterable[Split]) -> str:
    """Return one hash of the tokens and labels of some splits."""
    return fingerprints.sha256(array for split in splits for array in split.tokens.hashed())


def load_data(
    setup: Setup, max_sequence_len: int, batch_size: int, train_size: int | None,
    train_score_rows: int | None = None,
) -> LoadedData:  # fmt: skip
    """Load the tokenizer; no split is read yet.

    Args:
        train_size, train_score_rows: as in `Dataset`.
    """
    check_values("max_sequence_len, batch_size", [max_sequence_len, batch_size], POSITIVE)
    check_values("train_size", train_size, POSITIVE)
    check_values("train_score_rows", train_score_rows, COUNT)
    tokenizer = loading.load_tokenizer(setup.model_name, setup.revision, setup.task.is_tagging)
    config = loading.load_config(setup.model_name, setup.task, setup.revision)
    dataset = Dataset(
        task=setup.task, data_dir=setup.data_dir, tokenizer=tokenizer, max_length=max_sequence_len,
        seeds=setup.data_seeds or setup.seeds, train_size=train_size, device=setup.device,
        train_score_rows=train_score_rows,
    )  # fmt: skip
    return LoadedData(
        dataset=dataset, tokenizer=tokenizer, max_sequence_len=max_sequence_len,
        base_fingerprints=fingerprints.fingerprints_of(config, tokenizer), batch_size=batch_size,
        train_size=train_size,
    )  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How to fine-tune, as `GLUEvaluator.prepare` describes it."""

    fine_tune_type: str = "bitfit"  # one of `options.FINE_TUNE_TYPES`
    components: tuple[str, ...] = ()  # bias names relative to a layer
    # The number of parameters of rand_uniform; None: the paper's number for its three models, else
    # as many as bitfit trains.
    mask_size: int | None = None
    optimizer: str = "adamw"
    start: WarmStart | None = None  # None: from the base model

    def __post_init__(self) -> None:
        """Raise UserError if the optimizer is unknown."""
        if self.optimizer not in ("adamw", "adam"):
            raise UserError(f"unknown optimizer {self.optimizer!r}; known: adamw, adam")

    @property
    def start_record(self) -> dict[str, Any]:
        """Return the warm start for metadata files, {} if there is none."""
        return {"started_from": self.start.record} if self.start else {}

    @staticmethod
    def released_type(encoder_trainable: bool, components: Sequence[str] | None) -> str:
        """Return the fine-tune type of the released arguments of `training_preparation`."""
        if encoder_trainable and components:
            raise UserError("encoder_trainable trains everything: give no trainable_components")
        return "full_ft" if encoder_trainable else "bitfit" if components else "frozen"


def method_for_terms(
    method: Method, terms: str | None, model: "PreTrainedModel", report: bool
) -> Method:
    """Return the method of the runs with these `Run.terms`, with the model's names of biases."""
    if terms is not None and method.fine_tune_type != "bitfit":
        raise UserError(f"only bitfit has sets of bias terms, not {method.fine_tune_type}")
    if terms == NO_TERMS:
        return replace(method, fine_tune_type="frozen")
    if method.fine_tune_type != "bitfit":
        return method
    words = method.components if terms is None else terms.split()
    return replace(method, components=select_components(model, words, report=report))


def need(value: T | None, call: str) -> T:
    """Return a value, or raise UserError if the call that creates it is missing."""
    if value is None:
        raise UserError(f"call {call} first")
    return value
