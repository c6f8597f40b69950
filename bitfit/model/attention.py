"""Attention of packed sequences on a GPU, by PyTorch's fused kernels for sequences of any length.

The kernels read queries, keys and values as they lie, (N, heads, d), and the bounds of the
sequences ("cu_seqlens"), so nothing is padded and no matrix of weights is kept. It is
FlashAttention, for bf16. Its float32 counterpart, the memory-efficient kernel, serves comparisons
alone: its dropout masks repeat (on an H100 with torch 2.11, `benchmarks/gpu.py` found two that were
the same). `packing` has the plain implementation, for float32 and for other devices.

Some tokens of a batch are fillers: extra sequences that nobody reads, whose gradient is 0. They
let each run's tokens fill whole chunks, and give batches of similar size one shape. No filler is
empty: the kernels never meet a sequence that has keys and no query.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

CHUNK = 16  # the tokens of a run fill chunks of this many, so that its bias is added per chunk
QUERY_BLOCK = 128  # `longest` is rounded up to a multiple, so that few values capture a graph
# Steps of up to this many tokens are rounded to few sizes, so that CUDA graphs can serve them (see
# `graphs`). Larger steps gain little from a graph, which holds their activations a second time.
MAX_ROUNDED_TOKENS = 32768


class Sequences(NamedTuple):
    """The layout of sequences in one row of N tokens: arrays, then tensors on the device."""

    positions: torch.Tensor  # (N,) int64, of each token in its sequence
    first: torch.Tensor  # (R,) int64, the first token of each row
    starts: torch.Tensor  # (S,) int64, the first token of each sequence, fillers included
    bounds: torch.Tensor  # (S + 1,) int32, where each sequence begins and ends
    start_bounds: torch.Tensor  # (S + 1,) int32, the same among the first tokens alone
    longest: int  # at least the tokens of the longest sequence


class VarlenLayout(NamedTuple):
    """The arguments of the attention in one forward pass."""

    sequences: Sequences
    last: frozenset  # modules within which only first tokens attend


def plan_sequences(
    lengths: np.ndarray, owner: np.ndarray | None = None, stacked: bool = False
) -> tuple[Sequences, np.ndarray, np.ndarray | None]:
    """Lay out rows of a batch with fillers.

    Args:
        lengths: (R,) tokens of each row.
        owner: (R,) the run of each row, rows of a run together; None: no fillers are needed.
        stacked: whether each run's tokens have to fill whole chunks.

    Returns:
        (sequences, row, chunk_owner): the `Sequences`; (N,) the row of each token, -1 for fillers;
        (chunks,) the run of each chunk, or None where they are not stacked.
    """
    if owner is None:
        kept, sizes = np.arange(len(lengths)), lengths
    else:
        kept, sizes = add_fillers(lengths, owner, CHUNK if stacked else 1)
    begins = sizes.cumsum() - sizes
    row = np.repeat(kept, sizes)
    positions = np.where(row < 0, 0, np.arange(len(row)) - np.repeat(begins, sizes))
    bounds = np.append(0, sizes.cumsum()).astype(np.int32)
    start_bounds = np.arange(len(bounds), dtype=np.int32)
    longest = -(-int(sizes.max()) // QUERY_BLOCK) * QUERY_BLOCK
    sequences = Sequences(positions, begins[kept >= 0], begins, bounds, start_bounds, longest)
    last_row = np.maximum.accumulate(np.where(row < 0, 0, np.arange(len(row))))
    chunk_owner = None if owner is None or not stacked else owner[row[last_row[::CHUNK]]]
    return sequences, row, chunk_owner


def add_fillers(lengths: np.ndarray, owner: np.ndarray, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Add a filler after each run, up to a multiple of `unit`, and short ones at the end.

    Returns:
        (kept, sizes): (S,) the row of each sequence, -1 for fillers, and its tokens, at least 1.
    """
    ends = np.append(np.flatnonzero(np.diff(owner)) + 1, len(owner))
    totals = np.diff(np.append(0, lengths.cumsum()[ends - 1]))
    fill = unit - totals % unit
    count = int((totals + fill).sum())
    pieces = -(-size_step(count) // QUERY_BLOCK)  # one long filler would cost much attention
    rest = rounded(count + pieces) - count
    fill = np.append(fill, np.diff(np.arange(pieces + 1) * rest // pieces))
    where = np.append(ends, np.full(pieces, len(owner)))
    return np.insert(np.arange(len(lengths)), where, -1), np.insert(lengths, where, fill)


def rounded(count: int) -> int:
    """Round up to one of few sizes: multiples of 64, or of about a sixteenth of the size."""
    return -(-count // size_step(count)) * size_step(count)


def size_step(count: int) -> int:
    """Return the difference between two sizes of batches near `count` tokens."""
    return CHUNK if count > MAX_ROUNDED_TOKENS else max(64, 2 ** (count.bit_length() - 5))


def supports(head_size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention can be tried: `forward.select_forward` compares its results."""
    if device.type != "cuda" or dtype != torch.bfloat16 or head_size % 8 or head_size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: VarlenLayout,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence, (1, heads, N, d) -> (1, N, heads, d), for transformers.

    In the last layer the result is 0 but for first tokens, if no other token is read.
    """
    sequences = layout.sequences
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if len(query) != len(sequences.positions) or key.shape != query.shape:
        raise ValueError("these are not the heads of the packed sequences")
    ends, longest = (sequences.bounds, sequences.bounds), (sequences.longest, sequences.longest)
    if module not in layout.last:
        return kernel(query, key, value, ends, longest, dropout, scaling)[None], None
    ends, longest = (sequences.start_bounds, sequences.bounds), (1, sequences.longest)
    first = query.index_select(0, sequences.starts)
    out = kernel(first, key, value, ends, longest, dropout, scaling)
    return torch.zeros_like(query).index_copy(0, sequences.starts, out)[None], None


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """(Q, heads, d), (N, heads, d), (N, heads, d) -> (Q, heads, d), each sequence by itself.

    Args:
        bounds, longest: of the queries' sequences, and of the keys'.
        dropout: the rate, 0.0 for none.

    Raises:
        ValueError: for dropout in float32.
    """
    if query.dtype == torch.float32:
        if dropout:
            raise ValueError("the float32 kernel repeats its dropout masks")
        out = torch.ops.aten._efficient_attention_forward(
            query[None], key[None], value[None], None, *bounds, *longest, dropout, 0, True,
            scale=scale,
        )  # fmt: skip
        return out[0][0]
    return torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, *longest, dropout, False, False, scale=scale
    )[0]


def plain_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """The reference implementation of `kernel`, sequence by sequence."""
    out, begins = torch.empty_like(query), [tensor.tolist() for tensor in bounds]
    for (a, b), (c, d) in zip(*map(pairwise, begins), strict=True):
        if not (1 <= b - a <= longest[0] and 1 <= d - c <= longest[1]):
            raise ValueError("a sequence is empty, or longer than the longest")
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        out[a:b] = attended.transpose(0, 1)
    return out
