"""Attention of packed sequences, computed in the plain way, for the GPU's checks and the tests."""

from itertools import pairwise

import torch
from torch.nn import functional as F


def plain_varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: tuple[int, int],
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Compute `attention.varlen_kernel` sequence by sequence, as a reference implementation."""
    out, bounds = torch.empty_like(query), [tensor.tolist() for tensor in cu_seqlens]
    for (a, b), (c, d) in zip(*map(pairwise, bounds), strict=True):
        if not (1 <= b - a <= max_seqlen[0] and 1 <= d - c <= max_seqlen[1]):
            raise ValueError("a sequence is empty, or longer than max_seqlen")
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        out[a:b] = attended.transpose(0, 1)
    return out
