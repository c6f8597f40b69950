"""Tokenized splits: all tokens of a split are one flat array with offsets."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from bitfit.data.splits import TextColumns, find_split, word_positions
from bitfit.data.tasks import Task
from bitfit.data.word_tokens import first_tokens, split_long_sentences, tokens_for_text
from utils import LOGGER, UserError, make_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Larger training sets are scored on this many evenly spaced rows, because all rows would take a
# third of an epoch. Validation splits are scored completely: the largest has 40,430 rows.
MAX_ROWS_SCORED = 50_000


class TokenizedSplit(NamedTuple):
    """The tokenized examples (rows) of one split; tensors on the device, arrays on the host."""

    ids: torch.Tensor  # (all tokens,) int32
    types: torch.Tensor | None  # (all tokens,) int32, for models that take token types
    starts: np.ndarray  # (rows,) int64, where each row begins
    labels: torch.Tensor | None  # (rows,) int64, or float32 for a regression; of tagging (words,)
    lengths: np.ndarray  # (rows,) int64 tokens in each row
    pad_id: int
    pad_left: bool = False  # which side of a padded row the padding is on
    # Only for tagging: the words of a row begin where their first sub-tokens are.
    word_index: np.ndarray | None = None  # (all words,) int64 positions in `ids`, in order
    word_counts: np.ndarray | None = None  # (rows,) int64 words in each row
    continues: np.ndarray | None = None  # (rows,) bool: goes on with the previous row's sentence

    def hashed(self) -> tuple[torch.Tensor | np.ndarray | None, ...]:
        """Return the arrays that identify the data."""
        return self[:5] if self.word_index is None else self[:5] + self[-3:]

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the labels of some rows (or of their words) in order, on the host."""
        if self.word_counts is not None:
            rows = word_positions(self.word_counts, rows)
        return self.require_labels().cpu().numpy()[rows]

    def sentences_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the number of words of each sentence in some rows; None unless it is tagging.

        Rows that continue a sentence are joined with the row before, if that is there.
        """
        if self.word_counts is None or self.continues is None:
            return None
        joined = self.continues[rows] & (np.diff(rows, prepend=-2) == 1)
        return np.add.reduceat(self.word_counts[rows], np.flatnonzero(~joined))

    def require_labels(self) -> torch.Tensor:
        """Return the labels; raise ValueError for a split without labels."""
        if self.labels is None:
            raise ValueError("a split without labels cannot be trained on or scored")
        return self.labels

    def to(self, device: torch.device) -> Self:
        moved = {k: v.to(device) for k, v in self._asdict().items() if torch.is_tensor(v)}
        return self._replace(**moved)


class Split(NamedTuple):
    """A tokenized split, and the numbers of the rows that each data seed trains on or scores."""

    tokens: TokenizedSplit
    rows_of_seed: dict[int, np.ndarray]  # {seed: row numbers in `tokens`}, equally many


def tokenize(
    texts: TextColumns, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedSplit:
    """Return texts as a `TokenizedSplit` on the CPU; UserError if `max_length` leaves no room.

    Rows over `max_length` tokens are cut, the longest sentence first. Sentences of words are split
    into several rows before, so that no word is cut off.
    """
    tokens_for_text(tokenizer, max_length, pair=len(texts.columns) > 1)
    if texts.word_counts is not None and texts.continues is None:
        texts = split_long_sentences(texts, tokenizer, max_length)
    counts = texts.word_counts
    rows = tokenizer(
        *texts.columns, truncation=True, max_length=max_length,
        is_split_into_words=counts is not None,
    )  # fmt: skip
    lengths = np.fromiter(map(len, rows["input_ids"]), np.int64)
    if not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0])
        message = f"the text of example {row + 1} has no tokens, not even special ones"
        raise UserError(f"{message}: give it a text, or another --model-name")
    is_cut = counts is None or counts == 1  # Sentences of several words have been split.
    if cut := int(((lengths >= max_length) & is_cut).sum()):
        LOGGER.info("%d of %d examples fill %d tokens; longer ones are cut", cut, len(lengths),
                    max_length)  # fmt: skip
    return TokenizedSplit(
        ids=flat(rows["input_ids"]),
        types=flat(rows["token_type_ids"]) if "token_type_ids" in rows else None,
        starts=np.cumsum(lengths) - lengths,
        labels=None if texts.labels is None else torch.from_numpy(texts.labels),
        lengths=lengths,
        pad_id=tokenizer.pad_token_id,
        pad_left=tokenizer.padding_side == "left",
        word_index=None if counts is None else first_tokens(rows, counts),
        word_counts=counts,
        continues=texts.continues,
    )


def concatenate(parts: list[TokenizedSplit]) -> TokenizedSplit:
    """Return the rows of several `TokenizedSplit` as one `TokenizedSplit` without labels."""
    lengths = np.concatenate([part.lengths for part in parts])
    types = None if parts[0].types is None else torch.cat([part.types for part in parts])
    begins = accumulate((len(part.ids) for part in parts), initial=0)
    index = [None if part.word_index is None else part.word_index + begin
             for part, begin in zip(parts, begins, strict=False)]  # fmt: skip
    return parts[0]._replace(
        ids=torch.cat([part.ids for part in parts]), types=types, labels=None,
        starts=lengths.cumsum() - lengths, lengths=lengths, word_index=concatenate_known(index),
        word_counts=concatenate_known(part.word_counts for part in parts),
        continues=concatenate_known(part.continues for part in parts),
    )  # fmt: skip


def concatenate_known(arrays: Iterable[np.ndarray | None]) -> np.ndarray | None:
    """Return the arrays that are not None as one, or None if all are None."""
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if known else None


def describe_split(task: Task, tokens: TokenizedSplit) -> dict[str, Any]:
    """Return the number of examples (of sentences, rows and words for tagging) and the labels.

    Of labels and tags it is how often each occurs; of scores their mean, minimum and maximum.
    """
    rows = len(tokens.lengths)
    sentences = tokens.sentences_of(np.arange(rows))
    counts: dict[str, Any] = {"examples": rows}
    if sentences is not None:
        counts = {"sentences": len(sentences), "rows": rows, "words": int(sentences.sum())}
    if tokens.labels is None:
        return counts
    labels = tokens.labels.cpu().numpy()
    if task.is_regression:
        scores = {"mean": labels.mean(), "min": labels.min(), "max": labels.max()}
        return counts | {"scores": {name: round(float(v), 4) for name, v in scores.items()}}
    of_label = np.bincount(labels, minlength=task.num_labels).tolist()
    name = "tags" if task.is_tagging else "labels"
    return counts | {name: dict(zip(task.labels, of_label, strict=True))}


def flat(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, np.int32) for row in rows]))


@dataclass
class Dataset:
    """The splits of one task, read and tokenized when they are first used."""

    task: Task
    data_dir: str | Path | None  # as in `splits.find_split`
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int  # as in `tokenize`
    seeds: list[int]  # the data seeds of the runs
    train_size: int | None  # the number of training rows that each seed draws; None: all
    device: torch.device
    # Of these, the number of rows that each seed draws to score; 0: none; None: all, or
    # MAX_ROWS_SCORED evenly spaced ones.
    train_score_rows: int | None = None
    splits: dict[str, Split] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)  # optional splits that do not exist
    row_hashes: dict[str, np.ndarray] = field(default_factory=dict)  # (rows,) int64 of texts

    def split(self, name: str) -> Split:
        """Return a `Split`; UserError if it does not exist."""
        if not self.has_split(name):
            raise UserError(f"there is no {name} split of {self.task.name}")
        return self.splits[name]

    def has_split(self, name: str) -> bool:
        """Read a split if that has not been tried, and return whether it exists."""
        if name not in self.splits and name not in self.missing:
            texts = find_split(self.task, name, self.data_dir)
            if texts is None:
                self.missing.add(name)
            else:
                self.splits[name] = self._tokenized(name, texts)
        return name in self.splits

    def _tokenized(self, name: str, texts: TextColumns) -> Split:
        if self.task.is_tagging:
            texts = split_long_sentences(texts, self.tokenizer, self.max_length)
        rows = np.arange(len(texts))
        of_seed = dict.fromkeys(self.seeds, rows)
        if name == "train" and self.train_size is not None:
            rows, of_seed = sample_training_rows(self.seeds, len(texts), self.train_size)
            texts = texts.take(rows)
        hashes = (hash(str(row)) for row in zip(*texts.columns, strict=True))
        self.row_hashes[name] = np.fromiter(hashes, np.int64, len(texts))
        tokens = tokenize(texts, self.tokenizer, self.max_length).to(self.device)
        return Split(tokens, of_seed)

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
        """Return {name: Split} of the splits to score."""
        scored = {name: self.split(name) for name in self.task.validation_splits}
        if self.train_score_rows == 0:
            return scored
        tokens, rows = self.split("train")
        size = self.train_score_rows
        picked = {s: sample_scored_rows(s, drawn, size) for s, drawn in rows.items()}
        return {"train": Split(tokens, picked)} | scored


def sample_training_rows(
    seeds: list[int], total: int, size: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return the rows that any seed draws, `size` of `total`, and {seed: positions among them}."""
    drawn = {s: make_generator(s, "training rows").permutation(total)[:size] for s in seeds}
    kept = np.unique(np.concatenate([*drawn.values()]))
    return kept, {seed: np.searchsorted(kept, rows) for seed, rows in drawn.items()}


def sample_scored_rows(seed: int, rows: np.ndarray, size: int | None) -> np.ndarray:
    """Draw `size` of the training rows for a seed; None: take MAX_ROWS_SCORED, evenly spaced."""
    if size is not None:
        # In order, so that the rows of one sentence stay together.
        return rows[np.sort(make_generator(seed, "scored rows").permutation(len(rows))[:size])]
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS_SCORED))
    return rows[picked.astype(np.int64)]
