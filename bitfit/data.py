"""Token arrays, made once, and the batches cut from them by length.

All tokens of a split lie in one flat array with offsets; a batch is a gather on the device.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch

from bitfit.sources import read_split
from utils import UserError, generator

LOGGER = logging.getLogger("bitfit")
# What one micro-batch costs beside its tokens (launching its kernels), in multiplications per
# layer and by device; divided by a layer's size it is a number of tokens.
OVERHEAD = {"cpu": 35e6, "cuda": 14e9}
# Of a larger training set, evenly spaced rows are scored: all would cost a third of an epoch.
# No validation split is left short: the largest has 40,430 rows.
MOST_ROWS_SCORED = 50_000
# The most tokens in one micro-batch: activations stay in cache on a CPU, in memory on a GPU.
MAX_TOKENS = {"cpu": 2048, "cuda": 65536}


class Tokens(NamedTuple):
    """The tokenized rows of one split; tensors on the device, arrays on the host."""

    ids: torch.Tensor  # (all tokens,) int32
    types: torch.Tensor | None  # (all tokens,) int32, for models that take token types
    starts: torch.Tensor  # (rows,) int64
    labels: torch.Tensor | None  # (rows,) int64, or float32 for a regression
    lengths: np.ndarray  # (rows,) int64 tokens in each row
    pad_id: int

    def to(self, device):
        moved = {k: v.to(device) for k, v in self._asdict().items() if torch.is_tensor(v)}
        return self._replace(**moved)


class Split(NamedTuple):
    """Rows to train on, or to score."""

    tokens: Tokens
    rows_of_seed: dict  # {seed: its rows of `tokens`, as many for each}


class Batch(NamedTuple):
    """Some rows and their width: arrays as the host plans them, then tensors on the device."""

    rows: np.ndarray  # (B,) int64
    column: np.ndarray  # (T,) int64: 0, 1, ... T - 1
    lengths: np.ndarray | None  # (B,) int64 tokens in each row; None: no row is padded


def batch_of(tokens, rows):
    """What the host knows of a batch of rows (B,), padded to the longest of them."""
    lengths = tokens.lengths[rows]
    width = int(lengths.max())
    return Batch(rows, np.arange(width), lengths if lengths.min() < width else None)


def to_device(value, device):
    """The same (named) tuple or list, its arrays as tensors; nothing waits for the device."""
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(device, non_blocking=True)
    make = getattr(type(value), "_make", type(value))
    return make(to_device(inside, device) for inside in value)


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
    cut = int((lengths >= max_length).sum())
    if cut:
        LOGGER.info("%d of %d rows fill %d tokens; what was longer is cut", cut, len(lengths),
                    max_length)  # fmt: skip
    return Tokens(
        ids=flat(rows["input_ids"]),
        types=flat(rows["token_type_ids"]) if "token_type_ids" in rows else None,
        starts=torch.from_numpy(np.cumsum(lengths) - lengths),
        labels=None if texts.labels is None else torch.from_numpy(texts.labels),
        lengths=lengths,
        pad_id=tokenizer.pad_token_id,
    )


def flat(rows):
    return torch.from_numpy(np.concatenate([np.asarray(row, np.int32) for row in rows]))


def gather(tokens, batch):
    """The model's inputs for a `Batch` on the device, padded to its width.

    Returns:
        {"input_ids", "attention_mask", "token_type_ids"}, each (B, T). Without padding the mask is
        None: attention can skip it.
    """
    index, mask = tokens.starts[batch.rows, None] + batch.column, None  # (B, T)
    if batch.lengths is not None:
        mask = batch.column < batch.lengths[:, None]
        index = index.clamp(max=len(tokens.ids) - 1)
    inputs = {"attention_mask": mask}
    for name, flat, padding in (("input_ids", tokens.ids, tokens.pad_id),
                                ("token_type_ids", tokens.types, 0)):  # fmt: skip
        if flat is not None:
            inputs[name] = flat[index] if mask is None else flat[index].where(mask, padding)
    return inputs


def gather_rows(tokens, rows):
    """The same for row numbers (B,) on the host."""
    return gather(tokens, to_device(batch_of(tokens, rows), tokens.ids.device))


def micro_batches(lengths, overhead, max_tokens):
    """Cut a step's rows, sorted by length, into the micro-batches that cost least.

    A micro-batch costs its padded tokens plus `overhead` tokens. Dynamic programming over the
    sorted lengths: best[end] is the least cost of the rows before `end`.

    Args:
        lengths: (rows,) tokens in each row.

    Returns:
        A list of position arrays; together they hold each position once.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    best, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
    for end in range(1, len(order) + 1):
        padded = np.arange(end, 0, -1) * ordered[end - 1]  # tokens of rows [start, end)
        cost = best[:end] + padded + overhead
        cost[:-1][padded[:-1] > max_tokens] = np.inf  # one row always fits
        cut[end] = cost.argmin()
        best[end] = cost[cut[end]]
    parts, end = [], len(order)
    while end:
        parts.append(order[cut[end] : end])
        end = cut[end]
    return parts[::-1]


def evaluation_batches(lengths, max_tokens):
    """All rows, the longest first, in batches of at most `max_tokens` padded tokens."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, int(max_tokens // lengths[order[start]]))
        yield order[start:stop]
        start = stop


def overhead_tokens(model, device):
    """What a micro-batch costs beside its tokens, in tokens of this model on this device."""
    layers = getattr(model.config, "num_hidden_layers", 1)
    sizes = (p.numel() for n, p in model.named_parameters() if ".embeddings." not in n)
    return OVERHEAD[device.type] * layers / sum(sizes)


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

    def split(self, name):
        """A `Split`; its tokens are None for an optional one that is not there."""
        if name not in self.splits:
            texts = read_split(self.task, name, self.data_dir)
            rows = np.arange(len(texts or ()))
            of_seed = dict.fromkeys(self.seeds, rows)
            if name == "train" and self.train_size is not None:
                rows, of_seed = draw_rows(self.seeds, len(texts), self.train_size)
                texts = texts.take(rows)
            tokens = texts and tokenize(texts, self.tokenizer, self.max_length).to(self.device)
            self.splits[name] = Split(tokens, of_seed)
        return self.splits[name]

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
