"""The precision in which a model computes: float32, with or without TF32, or bfloat16."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the values of --precision


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Let all parameters have another dtype within the context, so that the model computes in it.

    LayerNorm and softmax sum in float32 inside their kernels.
    """
    return replaced_data(model.parameters(), lambda parameter: parameter.data.to(dtype))


@contextmanager
def replaced_data(
    parameters: Iterable[torch.nn.Parameter],
    replace: Callable[[torch.nn.Parameter], torch.Tensor],
) -> Iterator[None]:
    """Let parameters have the values of `replace` in the context, then their old storage again."""
    saved = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, _ in saved:
            parameter.data = replace(parameter)
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
