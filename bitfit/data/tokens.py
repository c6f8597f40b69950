"""Tokenized splits: all tokens of a split are one flat array with offsets."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch

from bitfit.data.splits import TextColumns, read_split
from bitfit.data.tasks import Task
from utils import UserError, make_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger("bitfit")
# Of a larger training set, evenly spaced rows are scored: all would cost a third of an epoch.
# All rows of validation splits are scored: the largest has 40,430.
MAX_ROWS_SCORED = 50_000


class TokenizedSplit(NamedTuple):
    """The tokenized examples (rows) of one split; tensors on the device, arrays on the host."""

    ids: torch.Tensor  # (all tokens,) int32
    types: torch.Tensor | None  # (all tokens,) int32, for models that take token types
    starts: np.ndarray  # (rows,) int64, where each row begins
    labels: torch.Tensor | None  # (rows,) int64, or float32 for a regression
    lengths: np.ndarray  # (rows,) int64 tokens in each row
    pad_id: int
    pad_left: bool = False  # which side of a padded row the padding is on

    def to(self, device: torch.device) -> Self:
        moved = {k: v.to(device) for k, v in self._asdict().items() if torch.is_tensor(v)}
        return self._replace(**moved)


class Split(NamedTuple):
    """A tokenized split and the rows of it that each seed trains on or scores."""

    tokens: TokenizedSplit
    rows_of_seed: dict[int, np.ndarray]  # {seed: its rows of `tokens`, as many for each}


def tokenize(
    texts: TextColumns, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedSplit:
    """Return texts as a `TokenizedSplit` on the CPU.

    Rows over `max_length` tokens are cut, the longest sentence first.

    Raises:
        UserError: if `max_length` leaves no room for text.
    """
    specials = tokenizer.num_special_tokens_to_add(pair=len(texts.columns) > 1)
    if max_length <= specials:
        what = f"leaves no room for text: this tokenizer adds {specials} special tokens a row"
        raise UserError(f"--max-seq-length {max_length} {what}; give more")
    rows = tokenizer(*texts.columns, truncation=True, max_length=max_length)
    lengths = np.fromiter(map(len, rows["input_ids"]), np.int64)
    if not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0])
        message = f"the text of example {row + 1} has no tokens, not even special ones"
        raise UserError(f"{message}: give it a text, or another --model-name")
    cut = int((lengths >= max_length).sum())
    if cut:
        LOGGER.info("%d of %d rows fill %d tokens; what was longer is cut", cut, len(lengths),
                    max_length)  # fmt: skip
    return TokenizedSplit(
        ids=flat(rows["input_ids"]),
        types=flat(rows["token_type_ids"]) if "token_type_ids" in rows else None,
        starts=np.cumsum(lengths) - lengths,
        labels=None if texts.labels is None else torch.from_numpy(texts.labels),
        lengths=lengths,
        pad_id=tokenizer.pad_token_id,
        pad_left=tokenizer.padding_side == "left",
    )


def concatenate(parts: list[TokenizedSplit]) -> TokenizedSplit:
    """Return the rows of several `TokenizedSplit` as one `TokenizedSplit` without labels."""
    lengths = np.concatenate([part.lengths for part in parts])
    types = None if parts[0].types is None else torch.cat([part.types for part in parts])
    return parts[0]._replace(
        ids=torch.cat([part.ids for part in parts]), types=types, labels=None,
        starts=lengths.cumsum() - lengths, lengths=lengths,
    )  # fmt: skip


def flat(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, np.int32) for row in rows]))


class Dataset:
    """The splits of one task, read and tokenized when they are first used."""

    def __init__(
        self,
        task: Task,
        data_dir: str | Path | None,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        seeds: list[int],
        train_size: int | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            data_dir, max_length: as in `splits.read_split` and `tokenize`.
            train_size: the number of rows that each seed draws to train on; None is all.
        """
        self.task, self.data_dir, self.tokenizer = task, data_dir, tokenizer
        self.max_length, self.seeds, self.train_size = max_length, seeds, train_size
        self.device = device
        self.splits: dict[str, Split] = {}
        self.row_hashes: dict[str, np.ndarray] = {}  # {split: (rows,) int64 of each row's texts}

    def split(self, name: str) -> Split:
        """Return a `Split`; its tokens are None if an optional split does not exist."""
        if name not in self.splits:
            texts = read_split(self.task, name, self.data_dir)
            rows = np.arange(len(texts or ()))
            of_seed = dict.fromkeys(self.seeds, rows)
            if name == "train" and self.train_size is not None:
                rows, of_seed = sample_training_rows(self.seeds, len(texts), self.train_size)
                texts = texts.take(rows)
            if texts is not None:
                hashes = map(hash, zip(*texts.columns, strict=True))
                self.row_hashes[name] = np.fromiter(hashes, np.int64, len(texts))
            tokens = texts and tokenize(texts, self.tokenizer, self.max_length).to(self.device)
            self.splits[name] = Split(tokens, of_seed)
        return self.splits[name]

    def report_overlap(self) -> None:
        """Log how many training rows occur in other splits that have been read."""
        others = dict(self.row_hashes)
        train = others.pop("train")
        counts = {name: int(np.isin(train, hashes).sum()) for name, hashes in others.items()}
        found = ", ".join(
            f"{count} also occur in {name}" for name, count in counts.items() if count
        )
        if found:
            LOGGER.warning("of %d training examples %s", len(train), found)
        else:
            LOGGER.info("no training example occurs in %s", " or ".join(others))

    def scored(self) -> dict[str, Split]:
        """Return {name: Split} of the labelled splits, with a sample of a large training set."""
        tokens, rows = self.split("train")
        train = Split(tokens, {seed: subsample_evenly(own) for seed, own in rows.items()})
        return {"train": train} | {name: self.split(name) for name in self.task.validation_splits}


def sample_training_rows(
    seeds: list[int], total: int, size: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Draw `size` of `total` rows for each seed.

    Returns:
        (kept, rows): the rows that any seed has drawn, and {seed: positions of its rows in `kept`}.
    """
    drawn = {s: make_generator(s, "training rows").permutation(total)[:size] for s in seeds}
    kept = np.unique(np.concatenate([*drawn.values()]))
    return kept, {seed: np.searchsorted(kept, rows) for seed, rows in drawn.items()}


def subsample_evenly(rows: np.ndarray) -> np.ndarray:
    """Return at most MAX_ROWS_SCORED of the given rows, evenly spaced."""
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS_SCORED))
    return rows[picked.astype(np.int64)]
