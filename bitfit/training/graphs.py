"""CUDA graphs of training steps: a step of few tokens is launched as a whole, not kernel by kernel.

A graph repeats the same kernels on the same memory, so it serves all steps whose arrays have the
same shapes; `varlen` rounds the number of tokens so that there are few shapes. One buffer brings
the arrays of a step to its graph. The numbers are those of the step without a graph.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bitfit.model.attention import MAX_ROUNDED_TOKENS
from bitfit.model.batching import buffer_views, list_arrays, pack_into_buffer, replace_arrays
from utils import LOGGER, first_line, is_out_of_memory

Graph = tuple[Callable[[], None], torch.Tensor]  # (function that replays the graph, result)
USES_BEFORE_CAPTURE = 3  # of a shape: capturing takes as long as some ten steps
MAX_GRAPHS = 64


class StepGraphs:
    """The graphs of one training, captured when a shape has occurred often enough."""

    def __init__(
        self,
        work: Callable,
        device: torch.device,
        capture: Callable[[Callable], Graph] | None = None,
    ) -> None:
        """
        Args:
            work: a function of the tensors of a step that does the whole step on the device,
                waits for nothing, and returns a tensor.
            capture: a function of a `work` without arguments -> (replay function, result).
        """
        self.work, self.device = work, device
        # One replay ends before the next begins, so that all graphs can share their memory.
        self.capture = capture or partial(capture_on_gpu, pool=torch.cuda.graph_pool_handle())
        self.uses: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple] = {}  # {shapes: (buffer, replay function, result)}
        self.enabled = True

    def find(self, step: tuple) -> Callable[[], torch.Tensor] | None:
        """Return a function that does this step, or None if the step should run without a graph.

        Args:
            step: nested tuples with arrays on the host.
        """
        arrays = list_arrays(step)
        if not self.enabled or max(array.size for array in arrays) > MAX_ROUNDED_TOKENS:
            return None
        shapes = replace_arrays(step, [(array.shape, array.dtype.str) for array in arrays])
        self.uses[shapes] += 1
        if shapes not in self.graphs:
            if self.uses[shapes] <= USES_BEFORE_CAPTURE or len(self.graphs) == MAX_GRAPHS:
                return None
            if not self._add(shapes, step, arrays):
                return None
        buffer, replay, result = self.graphs[shapes]

        def run() -> torch.Tensor:
            buffer.copy_(pack_into_buffer(arrays, pin=buffer.is_cuda), non_blocking=True)
            replay()
            return result

        return run

    def _add(self, shapes: tuple, step: tuple, arrays: list[np.ndarray]) -> bool:
        """Capture a graph, or return False and let all steps run without graphs."""
        buffer = pack_into_buffer(arrays, pin=False).to(self.device)
        tensors = replace_arrays(step, buffer_views(buffer, arrays))
        try:
            self.graphs[shapes] = buffer, *self.capture(lambda: self.work(tensors))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            LOGGER.warning(
                "training without CUDA graphs: %s", first_line(error.__context__ or error)
            )
            self.enabled = False
            self.graphs.clear()  # they hold memory
        return self.enabled


def capture_on_gpu(work: Callable[[], torch.Tensor], pool: object) -> Graph:
    """Return (function that replays the kernels of `work`, result); nothing runs yet."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    except BaseException:
        # torch does not reset the stream, nor the generator that waits for the end of a graph.
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay, result
