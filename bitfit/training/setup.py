"""The setup of an evaluator and its data: values that do not change once they are created."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfit.data import task_files
from bitfit.data.tasks import Task
from bitfit.data.tokens import Dataset, Split, TokenizedSplit, concatenate
from bitfit.model import fingerprints, hub, loading
from bitfit.model.precision import DTYPES
from utils import UserError, as_list, choose_device, choose_precision


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
    device: torch.device
    seeds: list[int]
    precision: str
    max_tokens: int | None

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that the model computes in."""
        return DTYPES[self.precision]


def make_setup(
    task_name: str | dict[str, Any],
    model_name: str,
    device: int | None,
    *,
    seed: int | Sequence[int] | None,
    data_dir: str | Path | None,
    precision: str | None,
    random_encoder: bool,
    max_tokens: int | None,
    model_revision: str | None,
) -> Setup:
    """Return the setup of `GLUEvaluator`'s arguments; raise UserError if one is wrong."""
    if precision not in (None, *DTYPES):
        raise UserError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
    task, data_dir = task_files.resolve_task(task_name, data_dir)
    revision, commit = hub.resolve_revision(model_name, model_revision)
    torch_device = choose_device(device)
    return Setup(
        task=task,
        model_name=model_name,
        revision=revision,
        model_commit=commit,
        base_name=Path(model_name).name,
        data_dir=data_dir,
        random_encoder=random_encoder,
        device=torch_device,
        seeds=as_list(torch.initial_seed() if seed is None else seed),
        precision=choose_precision(precision, torch_device),
        max_tokens=max_tokens,
    )


@dataclass(frozen=True)
class LoadedData:
    """The tokenized data of a task; splits are read when they are first needed."""

    dataset: Dataset
    tokenizer: Any
    base_fingerprints: dict[str, Any]  # of the base model's config and tokenizer
    max_sequence_len: int
    batch_size: int
    train_size: int | None

    def tokens(self, split: str) -> TokenizedSplit | None:
        """Return the tokens of a split, or None for an optional split that does not exist."""
        return self.dataset.split(split).tokens

    def all_tokens(self) -> TokenizedSplit:
        """Return the tokens of all splits read so far."""
        return concatenate([s.tokens for s in self.dataset.splits.values() if s.tokens])

    def hashes(self) -> dict[str, str]:
        """Return the hashes of the scored splits and of the test splits read so far."""
        scored = self.dataset.scored()
        tests = [split for name, split in self.dataset.splits.items() if name not in scored]
        return {
            "data_sha256": hash_splits(scored.values()),
            "test_sha256": hash_splits(split for split in tests if split.tokens),
        }


def hash_splits(splits: Iterable[Split]) -> str:
    """Return one hash of the tokens and labels of some splits."""
    return fingerprints.sha256(array for split in splits for array in split.tokens[:5])


def load_data(
    setup: Setup, max_sequence_len: int, batch_size: int, train_size: int | None
) -> LoadedData:
    """Load the tokenizer; no split is read yet."""
    tokenizer = loading.load_tokenizer(setup.model_name, setup.revision)
    dataset = Dataset(
        task=setup.task,
        data_dir=setup.data_dir,
        tokenizer=tokenizer,
        max_length=max_sequence_len,
        seeds=setup.seeds,
        train_size=train_size,
        device=setup.device,
    )
    return LoadedData(
        dataset=dataset,
        tokenizer=tokenizer,
        base_fingerprints=loading.base_fingerprints(
            setup.model_name, setup.task, tokenizer, setup.revision
        ),
        max_sequence_len=max_sequence_len,
        batch_size=batch_size,
        train_size=train_size,
    )


@dataclass(frozen=True)
class Method:
    """How to fine-tune, as `GLUEvaluator.prepare` describes it."""

    fine_tune_type: str = "bitfit"
    components: tuple[str, ...] = ()  # bias names relative to their layer
    mask_size: int | None = None
    optimizer: str = "adamw"
