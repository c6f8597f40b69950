"""FlashAttention on packed sequences, on a GPU.

PyTorch's fused kernels read queries, keys and values (N, heads, d) and the bounds of the sequences
(`cu_seqlens`), so nothing is padded and no attention weights are stored. FlashAttention computes
in bf16. PyTorch's kernel for float32 is not used: its dropout masks repeat (on an H100 with torch
2.11). `packing` has the plain implementation, for float32 and for other devices.

Some sequences of a batch are fillers: their outputs are not used, and their gradient is 0. Fillers
let each run's tokens fill whole chunks and give batches of similar size the same shape. No filler
is empty, because the kernels do not allow a sequence with keys and without queries.
"""

from typing import NamedTuple

import numpy as np
import torch

CHUNK = 16  # the tokens of a run fill chunks of this size, so that its bias is added per chunk
QUERY_BLOCK = 128  # `max_seqlen` is a multiple of this, so that few values need a CUDA graph
# Steps of up to this many tokens are rounded to few sizes, so that CUDA graphs can serve them (see
# `training.graphs`). Larger steps gain little from a graph, which stores activations twice.
MAX_ROUNDED_TOKENS = 32768


class VarlenBatch(NamedTuple):
    """The layout of S sequences, R rows and fillers, in N tokens: NumPy arrays, then tensors."""

    position_ids: torch.Tensor  # (N,) int64, the position of each token in its sequence
    first_token: torch.Tensor  # (R,) int64, the index of each row's first token
    sequence_starts: torch.Tensor  # (S,) int64, the first token of each sequence
    cu_seqlens: torch.Tensor  # (S + 1,) int32, where each sequence starts and ends
    first_cu_seqlens: torch.Tensor  # (S + 1,) int32, the same if only first tokens are queries
    max_seqlen: int  # at least the length of the longest sequence


class VarlenLayout(NamedTuple):
    """The arguments of the attention in one forward pass."""

    batch: VarlenBatch
    last_layer: frozenset[torch.nn.Module]  # modules in which only first tokens attend


def pack_sequences(
    lengths: np.ndarray, run_ids: np.ndarray | None = None, stacked: bool = False
) -> tuple[VarlenBatch, np.ndarray, np.ndarray | None]:
    """Lay out the rows of a batch, with fillers.

    Args:
        lengths: (R,) int64, the number of tokens of each row.
        run_ids: (R,) int64, the run of each row, rows of a run together; None: no fillers.
        stacked: whether each run's tokens have to fill whole chunks.

    Returns:
        (batch, row, chunk_run_ids): the `VarlenBatch`; (N,) the row of each token, -1 for
        fillers; (N / CHUNK,) the run of each chunk, or None if not `stacked`.
    """
    if run_ids is None:
        rows, sizes = np.arange(len(lengths)), lengths
    else:
        rows, sizes = add_fillers(lengths, run_ids, CHUNK if stacked else 1)
    starts = sizes.cumsum() - sizes
    row = np.repeat(rows, sizes)
    cu_seqlens = np.append(0, sizes.cumsum()).astype(np.int32)
    batch = VarlenBatch(
        position_ids=np.where(row < 0, 0, np.arange(len(row)) - np.repeat(starts, sizes)),
        first_token=starts[rows >= 0],
        sequence_starts=starts,
        cu_seqlens=cu_seqlens,
        first_cu_seqlens=np.arange(len(cu_seqlens), dtype=np.int32),
        max_seqlen=-(-int(sizes.max()) // QUERY_BLOCK) * QUERY_BLOCK,
    )
    # A filler belongs to the run of the last row before it.
    last_of_row = np.maximum.accumulate(np.where(row < 0, 0, np.arange(len(row))))
    if run_ids is None or not stacked:
        return batch, row, None
    return batch, row, run_ids[row[last_of_row[::CHUNK]]]


def add_fillers(
    lengths: np.ndarray, run_ids: np.ndarray, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add a filler after each run, up to a multiple of tokens, and short fillers at the end.

    Returns:
        (rows, sizes): (S,) the row of each sequence, -1 for fillers, and its tokens, at least 1.
    """
    ends = np.append(np.flatnonzero(np.diff(run_ids)) + 1, len(run_ids))
    totals = np.diff(np.append(0, lengths.cumsum()[ends - 1]))
    fill = multiple - totals % multiple
    count = int((totals + fill).sum())
    pieces = -(-size_step(count) // QUERY_BLOCK)  # The attention of one long filler is expensive.
    rest = round_up_size(count + pieces) - count
    fill = np.append(fill, np.diff(np.arange(pieces + 1) * rest // pieces))
    index = np.append(ends, np.full(pieces, len(run_ids)))
    return np.insert(np.arange(len(lengths)), index, -1), np.insert(lengths, index, fill)


def round_up_size(count: int) -> int:
    """Round up to one of few sizes: multiples of 64, or of about a sixteenth of the size."""
    return -(-count // size_step(count)) * size_step(count)


def size_step(count: int) -> int:
    """Return the difference between two sizes of batches near `count` tokens."""
    return CHUNK if count > MAX_ROUNDED_TOKENS else max(64, 2 ** (count.bit_length() - 5))


def supports_flash_attention(head_size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether FlashAttention can be tried; `select_forward` checks its results."""
    if device.type != "cuda" or dtype != torch.bfloat16 or head_size % 8 or head_size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
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

    In the last layer the result is 0 except for first tokens.
    """
    batch = layout.batch
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if len(query) != len(batch.position_ids) or key.shape != query.shape:
        raise ValueError("the heads do not have the shape of the packed sequences")
    bounds, longest = (batch.cu_seqlens, batch.cu_seqlens), (batch.max_seqlen, batch.max_seqlen)
    only_first = module in layout.last_layer
    if only_first:
        bounds, longest = (batch.first_cu_seqlens, batch.cu_seqlens), (1, batch.max_seqlen)
        query = query.index_select(0, batch.sequence_starts)
    out = varlen_kernel(
        query, key, value, cu_seqlens=bounds, max_seqlen=longest, dropout=dropout, scale=scaling
    )
    if only_first:
        out = torch.zeros_like(key).index_copy(0, batch.sequence_starts, out)
    return out[None], None


def varlen_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor], max_seqlen: tuple[int, int], dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attend within each sequence: (Q, heads, d), (N, heads, d), (N, heads, d) -> (Q, heads, d).

    Args:
        cu_seqlens, max_seqlen: of the queries, and of the keys.
        dropout: the probability that an attention weight is dropped.
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, *cu_seqlens, *max_seqlen, dropout, False, False, scale=scale
    )[0]
