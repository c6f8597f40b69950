"""Token arrays, made once, and the batches cut from them by length.

All tokens of a split lie in one flat array with offsets; a batch is a gather on the device.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch

from bitfit.packing import SPARE, Packing, packing_of
from bitfit.sources import read_split
from bitfit.varlen import Sequences, plan_sequences
from utils import UserError, generator

LOGGER = logging.getLogger("bitfit")
# Of a larger training set, evenly spaced rows are scored: all would cost a third of an epoch.
# No validation split is left short: the largest has 40,430 rows.
MOST_ROWS_SCORED = 50_000
# The most tokens in one pass: activations stay in cache on a CPU, in memory on a GPU.
MAX_TOKENS = {"cpu": 2048, "cuda": 65536}


class Tokens(NamedTuple):
    """The tokenized rows of one split; tensors on the device, arrays on the host."""

    ids: torch.Tensor  # (all tokens,) int32
    types: torch.Tensor | None  # (all tokens,) int32, for models that take token types
    starts: np.ndarray  # (rows,) int64, where each row begins
    labels: torch.Tensor | None  # (rows,) int64, or float32 for a regression
    lengths: np.ndarray  # (rows,) int64 tokens in each row
    pad_id: int
    pad_left: bool = False  # which side of a padded row the padding is on

    def to(self, device):
        moved = {k: v.to(device) for k, v in self._asdict().items() if torch.is_tensor(v)}
        return self._replace(**moved)


class Split(NamedTuple):
    """Rows to train on, or to score."""

    tokens: Tokens
    rows_of_seed: dict  # {seed: its rows of `tokens`, as many for each}


class Batch(NamedTuple):
    """Some rows for one pass, packed or padded: arrays as the host plans them, then tensors."""

    rows: np.ndarray  # (B,) int64
    index: np.ndarray  # (1, N) or (B, T) int64, which of the split's tokens
    mask: np.ndarray | None  # (B, T) bool; None: no row is padded
    packing: Packing | Sequences | None  # None: padded


def batch_of(tokens, rows, packed):
    """What the host knows of a batch of rows (B,)."""
    lengths, starts = tokens.lengths[rows], tokens.starts[rows]
    if packed:
        packing = packing_of(lengths, SPARE[tokens.ids.device.type])
        index = np.repeat(starts, lengths) + packing.positions
        return Batch(rows, index[None], None, packing)
    shift = lengths.max() - lengths[:, None] if tokens.pad_left else 0
    column = np.arange(lengths.max()) - shift
    real = (column >= 0) & (column < lengths[:, None])
    index = starts[:, None] + np.where(real, column, 0)
    return Batch(rows, index, None if real.all() else real, None)


def varlen_batch(tokens, rows, owner=None, stacked=False):
    """Return (`Batch`, runs of its chunks) for the kernels of `varlen`; see `plan_sequences`."""
    sequences, row, chunks = plan_sequences(tokens.lengths[rows], owner, stacked)
    index = np.where(row < 0, 0, tokens.starts[rows][row]) + sequences.positions
    return Batch(rows, index[None], None, sequences), chunks


def to_device(value, device):
    """Return the same (named) tuple or list with its arrays as tensors on the device.

    A GPU gets all arrays in one copy from pinned memory, so that the host never waits for it.
    """
    arrays = arrays_of(value)
    if torch.device(device).type == "cpu" or not arrays:
        return with_arrays(value, map(torch.from_numpy, arrays))
    buffer = host_buffer(arrays, pin=True).to(device, non_blocking=True)
    return with_arrays(value, views_of(buffer, arrays))


def arrays_of(value):
    """Return the arrays in nested tuples and lists, in order."""
    if isinstance(value, np.ndarray):
        return [value]
    inside = value if isinstance(value, (list, tuple)) else ()
    return [array for item in inside for array in arrays_of(item)]


def with_arrays(value, replacements):
    """Return nested tuples and lists with each array replaced by the next of `replacements`."""
    replacements = iter(replacements)

    def replace(value):
        if isinstance(value, np.ndarray):
            return next(replacements)
        if not isinstance(value, (list, tuple)):
            return value
        return getattr(type(value), "_make", type(value))(replace(item) for item in value)

    return replace(value)


def host_buffer(arrays, pin):
    """Return one uint8 tensor with the bytes of all arrays, each at a multiple of 16."""
    buffer = torch.empty(sum(map(aligned_bytes, arrays)), dtype=torch.uint8, pin_memory=pin)
    whole, begin = buffer.numpy(), 0
    for array in arrays:
        inside = whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        inside[...] = array
        begin += aligned_bytes(array)
    return buffer


def views_of(buffer, arrays):
    """Yield a tensor in a copy of `host_buffer(arrays)` for each of the arrays."""
    begin = 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        yield buffer[begin : begin + array.nbytes].view(dtype).view(array.shape)
        begin += aligned_bytes(array)


def aligned_bytes(array):
    return -(-array.nbytes // 16) * 16


def tokenize(texts, tokenizer, max_length):
    """Texts -> Tokens on the CPU. Rows over `max_length` tokens are cut, longest sentence first.

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
        message = f"the text of row {row}, counted from 0, has no tokens, not even special ones"
        raise UserError(f"{message}: give it a text, or another --model-name")
    cut = int((lengths >= max_length).sum())
    if cut:
        LOGGER.info("%d of %d rows fill %d tokens; what was longer is cut", cut, len(lengths),
                    max_length)  # fmt: skip
    return Tokens(
        ids=flat(rows["input_ids"]),
        types=flat(rows["token_type_ids"]) if "token_type_ids" in rows else None,
        starts=np.cumsum(lengths) - lengths,
        labels=None if texts.labels is None else torch.from_numpy(texts.labels),
        lengths=lengths,
        pad_id=tokenizer.pad_token_id,
        pad_left=tokenizer.padding_side == "left",
    )


def concatenate(parts):
    """Return the rows of several `Tokens` as one `Tokens` without labels."""
    lengths = np.concatenate([part.lengths for part in parts])
    types = None if parts[0].types is None else torch.cat([part.types for part in parts])
    return parts[0]._replace(
        ids=torch.cat([part.ids for part in parts]), types=types, labels=None,
        starts=lengths.cumsum() - lengths, lengths=lengths,
    )  # fmt: skip


def flat(rows):
    return torch.from_numpy(np.concatenate([np.asarray(row, np.int32) for row in rows]))


def gather(tokens, batch):
    """The model's inputs for a `Batch` on the device.

    Returns:
        {"input_ids", "token_type_ids", "attention_mask"}, each (1, N) or (B, T); without padding
        there is no mask: attention can skip it.
    """
    inputs = {}
    for name, flat, padding in (("input_ids", tokens.ids, tokens.pad_id),
                                ("token_type_ids", tokens.types, 0)):  # fmt: skip
        if flat is not None:
            own = flat[batch.index]
            inputs[name] = own if batch.mask is None else own.where(batch.mask, padding)
    return inputs if batch.mask is None else inputs | {"attention_mask": batch.mask.long()}


def passes_of(lengths, max_tokens, packed, equal=False):
    """Cut a step's rows into passes of at most `max_tokens` tokens; one row always fits.

    Packed rows stay in their order, run after run, in passes of like size; padded ones go by
    length, so that little is padding.

    Args:
        lengths: (rows,) tokens in each row.
        equal: put only rows of equal length into one pass.

    Returns:
        A list of position arrays; together they hold each position once.
    """
    if not packed:
        return list(batches_by_length(lengths, max_tokens, equal))
    ends, cuts = lengths.cumsum(), [0]
    like = int(ends[-1]) // -(-int(ends[-1]) // max_tokens) + int(lengths.max())
    while cuts[-1] < len(lengths):
        done = ends[cuts[-1] - 1] if cuts[-1] else 0
        stop = np.searchsorted(ends, done + min(like, max_tokens), "right")
        cuts.append(max(cuts[-1] + 1, int(stop)))
    return np.split(np.arange(len(lengths)), cuts[1:-1])


def batches_by_length(lengths, max_tokens, equal=False):
    """All rows, the longest first, in batches of at most `max_tokens` padded tokens.

    Args:
        equal: put only rows of equal length into one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start, falling = 0, -lengths[order]
    while start < len(order):
        stop = start + max(1, int(max_tokens // lengths[order[start]]))
        if equal:
            stop = min(stop, int(np.searchsorted(falling, falling[start], "right")))
        yield order[start:stop]
        start = stop


class Dataset:
    """The splits of one task, read and tokenized when they are first needed."""

    def __init__(self, task, data_dir, tokenizer, max_length, seeds, train_size, device):
        """
        Args:
            data_dir, max_length: as in `sources.read_split` and `tokenize`.
            train_size: each of the seeds trains on so many rows of its own; None: on all.
        """
        self.task, self.data_dir, self.tokenizer = task, data_dir, tokenizer
        self.max_length, self.seeds, self.train_size = max_length, seeds, train_size
        self.device, self.splits = device, {}
        self.row_hashes = {}  # {split: (rows,) int64 of each row's texts}

    def split(self, name):
        """A `Split`; its tokens are None for an optional one that is not there."""
        if name not in self.splits:
            texts = read_split(self.task, name, self.data_dir)
            rows = np.arange(len(texts or ()))
            of_seed = dict.fromkeys(self.seeds, rows)
            if name == "train" and self.train_size is not None:
                rows, of_seed = draw_rows(self.seeds, len(texts), self.train_size)
                texts = texts.take(rows)
            if texts is not None:
                hashes = map(hash, zip(*texts.columns, strict=True))
                self.row_hashes[name] = np.fromiter(hashes, np.int64, len(texts))
            tokens = texts and tokenize(texts, self.tokenizer, self.max_length).to(self.device)
            self.splits[name] = Split(tokens, of_seed)
        return self.splits[name]

    def report_overlap(self):
        """Log how many training rows occur in other splits that have been read."""
        others = dict(self.row_hashes)
        train = others.pop("train")
        counts = {name: int(np.isin(train, hashes).sum()) for name, hashes in others.items()}
        found = ", ".join(
            f"{count} also occur in {name}" for name, count in counts.items() if count
        )
        if found:
            LOGGER.warning("of %d training rows %s", len(train), found)
        else:
            LOGGER.info("no training row occurs in %s", " or ".join(others))

    def scored(self):
        """{name: Split} of those with labels, of a large training set some rows."""
        tokens, rows = self.split("train")
        train = Split(tokens, {seed: thin(own) for seed, own in rows.items()})
        return {"train": train} | {name: self.split(name) for name in self.task.validation_splits}


def draw_rows(seeds, total, size):
    """Each seed's own `size` of `total` rows.

    Returns:
        (kept, rows): the rows that any seed has, and {seed: its rows, numbered among those}.
    """
    drawn = {s: generator(s, "training rows").permutation(total)[:size] for s in seeds}
    kept = np.unique(np.concatenate([*drawn.values()]))
    return kept, {seed: np.searchsorted(kept, rows) for seed, rows in drawn.items()}


def thin(rows):
    """At most 50,000 of some rows, evenly spaced."""
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS_SCORED))
    return rows[picked.astype(np.int64)]
