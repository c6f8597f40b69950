"""The precision in which a model computes: float32, with or without TF32, or bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the values of --precision


@contextmanager
def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let all parameters have another dtype within the context, so that the model computes in it.

    LayerNorm and softmax sum in float32 inside their kernels. On exit the parameters get their
    former storage back, with the same bits.
    """
    saved = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in saved:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 matrices in full precision within the context, for exact comparisons."""
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)
