"""Token arrays, made once, and the batches cut from them by length.

All tokens of a split lie in one flat array with offsets; a batch is a gather on the device.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch

from utils import UserError, generator

LOGGER = logging.getLogger("bitfit")
# What one micro-batch costs beside its tokens (launching its kernels), in multiplications per
# layer and by device; divided by a layer's size it is a number of tokens.
OVERHEAD = {"cpu": 35e6, "cuda": 14e9}
# The most tokens in one micro-batch: activations stay in cache on a CPU, in memory on a GPU.
MAX_TOKENS = {"cpu": 2048, "cuda": 65536}


class Tokens(NamedTuple):
    """The tokenized rows of one split; tensors on the device, arrays on the host."""

    ids: torch.Tensor  # (all tokens,) int32
    types: torch.Tensor | None  # (all tokens,) int32, for models that take token types
    starts: torch.Tensor  # (rows,) int64
    labels: torch.Tensor | None  # (rows,) int64, or float32 for a regression
    counts: np.ndarray  # (rows,) int64 tokens in each row
    lengths: np.ndarray  # (rows,) what each row costs: its tokens, or the fixed padded length
    pad_id: int

    def to(self, device):
        moved = {k: v.to(device) for k, v in self._asdict().items() if torch.is_tensor(v)}
        return self._replace(**moved)


class Batch(NamedTuple):
    """Some rows and their width: arrays as the host plans them, then tensors on the device."""

    rows: np.ndarray  # (B,) int64
    column: np.ndarray  # (T,) int64: 0, 1, ... T - 1
    counts: np.ndarray | None  # (B,) int64 tokens in each row; None: no row is padded


def batch_of(tokens, rows):
    """What the host knows of a batch of rows (B,), padded to the longest of them."""
    width, counts = int(tokens.lengths[rows].max()), tokens.counts[rows]
    return Batch(rows, np.arange(width), counts if counts.min() < width else None)


def to_device(value, device):
    """The same (named) tuple or list, its arrays as tensors; nothing waits for the device."""
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(device, non_blocking=True)
    make = getattr(type(value), "_make", type(value))
    return make(to_device(inside, device) for inside in value)


def tokenize(texts, tokenizer, max_length, pad_to_max=False):
    """Texts -> Tokens on the CPU. Rows over `max_length` tokens are cut, longest sentence first.

    Raises:
        UserError: if `max_length` leaves no room for text.
    """
    specials = tokenizer.num_special_tokens_to_add(pair=len(texts.columns) > 1)
    if max_length <= specials:
        raise UserError(
            f"--max-seq-length {max_length} leaves no room for text: "
            f"this tokenizer adds {specials} special tokens a row"
        )
    rows = tokenizer(*texts.columns, truncation=True, max_length=max_length)
    counts = np.fromiter(map(len, rows["input_ids"]), np.int64)
    cut = int((counts >= max_length).sum())
    if cut:
        LOGGER.info("%d of %d rows fill %d tokens; what was longer is cut", cut, len(counts),
                    max_length)  # fmt: skip
    types = flat(rows["token_type_ids"]) if "token_type_ids" in rows else None
    return Tokens(
        ids=flat(rows["input_ids"]),
        types=types,
        starts=torch.from_numpy(np.cumsum(counts) - counts),
        labels=None if texts.labels is None else torch.from_numpy(texts.labels),
        counts=counts,
        lengths=np.full_like(counts, max_length) if pad_to_max else counts,
        pad_id=tokenizer.pad_token_id,
    )


def draw_rows(seeds, total, size):
    """Each seed's own `size` of `total` rows; None: all of them, in one array for all seeds.

    Returns:
        (kept, rows): the rows that any seed has, and {seed: its rows, numbered among those}.
    """
    if size is None:
        every = np.arange(total)
        return every, dict.fromkeys(seeds, every)
    drawn = {s: generator(s, "training rows").permutation(total)[:size] for s in seeds}
    kept = np.unique(np.concatenate([*drawn.values()]))
    return kept, {seed: np.searchsorted(kept, rows) for seed, rows in drawn.items()}


def flat(rows):
    return torch.from_numpy(np.concatenate([np.asarray(row, np.int32) for row in rows]))


def gather(tokens, batch):
    """The model's inputs for a `Batch` on the device, padded to its width.

    Returns:
        {"input_ids", "attention_mask", "token_type_ids"}, each (B, T). Without padding the mask is
        None: attention can skip it.
    """
    index = tokens.starts[batch.rows, None] + batch.column  # (B, T)
    if batch.counts is None:
        inputs = {"input_ids": tokens.ids[index], "attention_mask": None}
        types = None if tokens.types is None else tokens.types[index]
    else:
        mask = batch.column < batch.counts[:, None]
        index = index.clamp(max=len(tokens.ids) - 1)
        inputs = {"input_ids": tokens.ids[index].where(mask, tokens.pad_id), "attention_mask": mask}
        types = None if tokens.types is None else tokens.types[index].where(mask, 0)
    return inputs | ({} if types is None else {"token_type_ids": types})


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
    layers = model.config.num_hidden_layers
    sizes = (p.numel() for n, p in model.named_parameters() if ".embeddings." not in n)
    return OVERHEAD[device.type] * layers / sum(sizes)
