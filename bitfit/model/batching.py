"""Batches: planned as arrays on the host, copied to the device at once, gathered there.

A row is one training example, a sequence of tokens. A micro-batch is a part of a step's rows that
fits into the token budget.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.attention import VarlenBatch, pack_sequences
from bitfit.model.packing import MAX_BUCKET_PADDING, PackedBatch, pack_rows

Nested = Any  # nested tuples and lists of arrays or tensors
# The default maximum of tokens in a micro-batch, whose activations then fit into a CPU's cache or a
# GPU's memory.
MAX_TOKENS = {"cpu": 2048, "cuda": 65536}


class Batch(NamedTuple):
    """B rows of a split, packed or padded: NumPy arrays, then tensors on the device."""

    # (B,) int64, the number of each row's label in the split; for tagging in the shape of
    # `token_index`, the number of the word that begins at a token, -1 for all other tokens. So the
    # shapes of a step do not depend on the number of words, and few CUDA graphs serve all steps.
    label_index: torch.Tensor
    token_index: torch.Tensor  # (1, N) packed or (B, T) padded, int64, among the split's tokens
    mask: torch.Tensor | None  # (B, T) bool, False at padding; None: nothing is padded
    packed: PackedBatch | VarlenBatch | None  # None: padded


def make_batch(tokens: TokenizedSplit, rows: np.ndarray, packed: bool) -> Batch:
    """Return the `Batch` of the rows (B,) int64 as arrays."""
    lengths, starts = tokens.lengths[rows], tokens.starts[rows]
    if packed:
        layout = pack_rows(lengths, MAX_BUCKET_PADDING[tokens.ids.device.type])
        token_index = (np.repeat(starts, lengths) + layout.position_ids)[None]
        return Batch(index_labels(tokens, rows, token_index), token_index, None, packed=layout)
    shift = lengths.max() - lengths[:, None] if tokens.pad_left else 0
    column = np.arange(lengths.max()) - shift
    valid = (column >= 0) & (column < lengths[:, None])
    token_index = starts[:, None] + np.where(valid, column, 0)
    label_index = index_labels(tokens, rows, token_index, valid=valid)
    return Batch(label_index, token_index, None if valid.all() else valid, packed=None)


def make_varlen_batch(
    tokens: TokenizedSplit,
    rows: np.ndarray,
    run_ids: np.ndarray | None = None,
    stacked: bool = False,
) -> tuple[Batch, np.ndarray | None]:
    """Return the `Batch` for FlashAttention and the runs of chunks; see `pack_sequences`."""
    layout, row, chunk_run_ids = pack_sequences(tokens.lengths[rows], run_ids, stacked)
    token_index = (np.where(row < 0, 0, tokens.starts[rows][row]) + layout.position_ids)[None]
    label_index = index_labels(tokens, rows, token_index, valid=row >= 0)
    return Batch(label_index, token_index, None, packed=layout), chunk_run_ids


def index_labels(
    tokens: TokenizedSplit,
    rows: np.ndarray,
    token_index: np.ndarray,
    valid: np.ndarray | bool = True,
) -> np.ndarray:
    """Return `Batch.label_index`; `valid` is False for padding and fillers."""
    if tokens.word_index is None:
        return rows
    word = np.searchsorted(tokens.word_index, token_index)
    begins = tokens.word_index.take(word, mode="clip") == token_index
    return np.where(begins & valid, word, -1)


def count_labels(tokens: TokenizedSplit, rows: np.ndarray) -> np.ndarray:
    """Return the number of labels of each of some rows: 1, or for tagging of their words."""
    if tokens.word_index is None:
        return np.ones_like(rows)
    begin = tokens.starts[rows]
    first, stop = np.searchsorted(tokens.word_index, [begin, begin + tokens.lengths[rows]])
    return stop - first


def gather_labels(tokens: TokenizedSplit, batch: Batch) -> torch.Tensor:
    """Return the labels in the shape of `label_index`, -100 for tokens without one."""
    labels = tokens.require_labels()[batch.label_index]
    return labels if tokens.word_index is None else labels.where(batch.label_index >= 0, -100)


def to_device(value: Nested, device: torch.device) -> Nested:
    """Return nested tuples and lists with all arrays as tensors on the device.

    A GPU gets all arrays in one copy from pinned memory, so that the host need not wait.
    """
    arrays = list_arrays(value)
    if torch.device(device).type == "cpu" or not arrays:
        return replace_arrays(value, map(torch.from_numpy, arrays))
    buffer = pack_into_buffer(arrays, pin=True).to(device, non_blocking=True)
    return replace_arrays(value, buffer_views(buffer, arrays))


def list_arrays(value: Nested) -> list[np.ndarray]:
    """Return the arrays in nested tuples and lists, in order."""
    if isinstance(value, np.ndarray):
        return [value]
    items = value if isinstance(value, (list, tuple)) else ()
    return [array for item in items for array in list_arrays(item)]


def replace_arrays(value: Nested, replacements: Iterable) -> Nested:
    """Return nested tuples and lists with each array replaced by the next of `replacements`."""
    replacements = iter(replacements)

    def replace(value: Nested) -> Nested:
        if isinstance(value, np.ndarray):
            return next(replacements)
        if not isinstance(value, (list, tuple)):
            return value
        return getattr(type(value), "_make", type(value))(replace(item) for item in value)

    return replace(value)


def pack_into_buffer(arrays: list[np.ndarray], pin: bool) -> torch.Tensor:
    """Return one uint8 tensor with the bytes of all arrays, each at a multiple of 16."""
    buffer = torch.empty(sum(map(aligned_bytes, arrays)), dtype=torch.uint8, pin_memory=pin)
    content, start = buffer.numpy(), 0
    for array in arrays:
        target = content[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        target[...] = array
        start += aligned_bytes(array)
    return buffer


def buffer_views(buffer: torch.Tensor, arrays: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yield the arrays as views of a buffer with the bytes of `pack_into_buffer(arrays)`."""
    start = 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        yield buffer[start : start + array.nbytes].view(dtype).view(array.shape)
        start += aligned_bytes(array)


def aligned_bytes(array: np.ndarray) -> int:
    return -(-array.nbytes // 16) * 16


def gather_inputs(tokens: TokenizedSplit, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the model's inputs for a `Batch` of tensors on the device.

    Returns:
        {"input_ids", "token_type_ids", "attention_mask"}, all (1, N) or (B, T); without padding
        there is no mask, so that attention needs no masking.
    """
    inputs = {}
    for name, flat, padding in (("input_ids", tokens.ids, tokens.pad_id),
                                ("token_type_ids", tokens.types, 0)):  # fmt: skip
        if flat is not None:
            ids = flat[batch.token_index]
            inputs[name] = ids if batch.mask is None else ids.where(batch.mask, padding)
    return inputs if batch.mask is None else inputs | {"attention_mask": batch.mask.long()}


def split_into_micro_batches(
    lengths: np.ndarray, max_tokens: int, packed: bool, equal_length: bool = False
) -> list[np.ndarray]:
    """Split rows into micro-batches of at most `max_tokens` tokens, at least one row.

    Packed rows stay in their order, run after run, in micro-batches of similar size. Padded rows
    are sorted by length, the longest first, to keep padding small.

    Args:
        lengths: (B,) int64, the number of tokens of each row; if not `packed`, padding counts.
        equal_length: put only rows of equal length into one micro-batch.

    Returns:
        Arrays of positions in `lengths`; every position is in exactly one of them.
    """
    ends, cuts = lengths.cumsum(), [0]
    if packed:
        size = int(ends[-1]) // -(-int(ends[-1]) // max_tokens) + int(lengths.max())
        while cuts[-1] < len(lengths):
            done = ends[cuts[-1] - 1] if cuts[-1] else 0
            stop = np.searchsorted(ends, done + min(size, max_tokens), "right")
            cuts.append(max(cuts[-1] + 1, int(stop)))
        return np.split(np.arange(len(lengths)), cuts[1:-1])
    order = np.argsort(-lengths, kind="stable")
    falling = -lengths[order]
    while cuts[-1] < len(order):
        stop = cuts[-1] + max(1, int(max_tokens // -falling[cuts[-1]]))
        if equal_length:
            stop = min(stop, int(np.searchsorted(falling, falling[cuts[-1]], "right")))
        cuts.append(stop)
    return np.split(order, cuts[1:-1])
