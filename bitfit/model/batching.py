"""Batches of examples as arrays on the host, and their single copy to the device."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.attention import Sequences, plan_sequences
from bitfit.model.packing import SPARE, Packing, packing_of

# The most tokens in one pass: activations stay in cache on a CPU, in memory on a GPU.
Nested = Any  # nested tuples and lists of arrays or tensors
MAX_TOKENS = {"cpu": 2048, "cuda": 65536}


class Batch(NamedTuple):
    """Some rows for one pass, packed or padded: arrays as the host plans them, then tensors."""

    rows: torch.Tensor  # (B,) int64
    index: torch.Tensor  # (1, N) or (B, T) int64, which of the split's tokens
    mask: torch.Tensor | None  # (B, T) bool; None: no row is padded
    packing: Packing | Sequences | None  # None: padded


def make_batch(tokens: TokenizedSplit, rows: np.ndarray, packed: bool) -> Batch:
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


def make_varlen_batch(
    tokens: TokenizedSplit, rows: np.ndarray, owner: np.ndarray | None = None, stacked: bool = False
) -> tuple[Batch, np.ndarray | None]:
    """Return (`Batch`, runs of its chunks) for the kernels of `varlen`; see `plan_sequences`."""
    sequences, row, chunks = plan_sequences(tokens.lengths[rows], owner, stacked)
    index = np.where(row < 0, 0, tokens.starts[rows][row]) + sequences.positions
    return Batch(rows, index[None], None, sequences), chunks


def to_device(value: Nested, device: torch.device) -> Nested:
    """Return the same (named) tuple or list with its arrays as tensors on the device.

    A GPU gets all arrays in one copy from pinned memory, so that the host never waits for it.
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
    inside = value if isinstance(value, (list, tuple)) else ()
    return [array for item in inside for array in list_arrays(item)]


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
    whole, begin = buffer.numpy(), 0
    for array in arrays:
        inside = whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        inside[...] = array
        begin += aligned_bytes(array)
    return buffer


def buffer_views(buffer: torch.Tensor, arrays: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yield a tensor in a copy of `pack_into_buffer(arrays)` for each of the arrays."""
    begin = 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        yield buffer[begin : begin + array.nbytes].view(dtype).view(array.shape)
        begin += aligned_bytes(array)


def aligned_bytes(array: np.ndarray) -> int:
    return -(-array.nbytes // 16) * 16


def gather_inputs(tokens: TokenizedSplit, batch: Batch) -> dict[str, torch.Tensor]:
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


def split_into_micro_batches(
    lengths: np.ndarray, max_tokens: int, packed: bool, equal_length: bool = False
) -> list[np.ndarray]:
    """Cut a step's rows into passes of at most `max_tokens` tokens; one row always fits.

    Packed rows stay in their order, run after run, in passes of like size; padded ones go by
    length, so that little is padding.

    Args:
        lengths: (rows,) tokens in each row.
        equal_length: put only rows of equal length into one pass.

    Returns:
        A list of position arrays; together they hold each position once.
    """
    if not packed:
        return list(batches_by_length(lengths, max_tokens, equal_length))
    ends, cuts = lengths.cumsum(), [0]
    like = int(ends[-1]) // -(-int(ends[-1]) // max_tokens) + int(lengths.max())
    while cuts[-1] < len(lengths):
        done = ends[cuts[-1] - 1] if cuts[-1] else 0
        stop = np.searchsorted(ends, done + min(like, max_tokens), "right")
        cuts.append(max(cuts[-1] + 1, int(stop)))
    return np.split(np.arange(len(lengths)), cuts[1:-1])


def batches_by_length(
    lengths: np.ndarray, max_tokens: int, equal_length: bool = False
) -> Iterator[np.ndarray]:
    """All rows, the longest first, in batches of at most `max_tokens` padded tokens.

    Args:
        equal_length: put only rows of equal length into one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start, falling = 0, -lengths[order]
    while start < len(order):
        stop = start + max(1, int(max_tokens // lengths[order[start]]))
        if equal_length:
            stop = min(stop, int(np.searchsorted(falling, falling[start], "right")))
        yield order[start:stop]
        start = stop
