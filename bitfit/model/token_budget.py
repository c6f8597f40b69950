"""The number of tokens that fit into memory; repeating a step that ran out of memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from utils import LOGGER, is_out_of_memory

Result = TypeVar("Result")


class TokenBudget:
    """The maximum of tokens in a micro-batch, at least 1; it is halved when memory runs out."""

    def __init__(self, max_tokens: int, device: torch.device | None = None) -> None:
        self.max_tokens = max_tokens
        self.device = device or torch.device("cpu")

    def retry_on_oom(self, work: Callable[[], Result]) -> Result:
        """Return `work()`; if memory runs out, halve `max_tokens` and call it again.

        The random generators are reset before each retry, so dropout is the same as if the
        smaller maximum had been used from the start.
        """
        state = random_state(self.device)
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.max_tokens < 2:
                    raise
                self.max_tokens //= 2
            LOGGER.warning("out of memory: again with --max-tokens %d", self.max_tokens)
            torch.cuda.empty_cache()
            set_random_state(self.device, state)


def free_gpu_bytes(device: torch.device) -> int:
    """Return the number of bytes that this process can still allocate on a GPU."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the CPU's generator and, for a GPU, of the GPU's: uint8 tensors."""
    of_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *of_gpu]


def set_random_state(device: torch.device, state: Sequence[torch.Tensor]) -> None:
    """Set the generators to a result of `random_state`."""
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
