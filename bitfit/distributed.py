"""The ranks of torchrun: the assignment of runs to ranks, and collectives.

With at least as many runs as ranks, each rank trains some runs alone. With fewer, several ranks
train one run: a rank computes some rows of every batch, and the gradients are summed. torchrun
starts the ranks, and ends all of them if one fails.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from utils import RankLost, UserError, first_line, resolve_gpu

if TYPE_CHECKING:  # -h imports this module and must not import torch
    import torch

Json = Any  # a value that json.dumps takes
Result = TypeVar("Result")
POLL_SECONDS = 0.05  # between two checks of the store for the other ranks' values
TIMEOUT = timedelta(minutes=30)  # for all ranks to start, and for the slowest rank of a step


class Group(NamedTuple):
    """The ranks that train the same runs."""

    ranks: tuple[int, ...] = (0,)  # their numbers in the command
    rank: int = 0  # the number of this rank in the group
    host: Any = None  # torch.distributed's group for tensors in the host's memory
    device: Any = None  # torch.distributed's group for gradients
    shows_progress: bool = True  # True for one process of the command

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce_sum_(self, *tensors: "torch.Tensor") -> None:
        """Sum each tensor over the ranks, in place; all ranks then hold the same bits."""
        if self.size > 1:
            import torch.distributed as dist

            with raise_rank_lost():
                for tensor in tensors:
                    if tensor.is_cuda and self.device is self.host:
                        on_host = tensor.cpu()
                        dist.all_reduce(on_host, group=self.host)
                        tensor.copy_(on_host)
                    else:
                        dist.all_reduce(tensor, group=self.device)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.all_reduce_max(0)  # A reduction of an empty tensor would not wait.

    def all_reduce_max(self, *numbers: float) -> Sequence[float]:
        """Return the maximum of each number over the ranks."""
        if self.size == 1:
            return numbers
        import torch
        import torch.distributed as dist

        maxima = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        with raise_rank_lost():
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.host)
        return maxima.tolist()

    def all_gather(self, tensors: list["torch.Tensor"]) -> list["torch.Tensor"]:
        """Return the tensors of all ranks in rank order."""
        if self.size == 1:
            return tensors
        import torch.distributed as dist

        gathered: list[list[torch.Tensor]] = [[] for _ in self.ranks]
        with raise_rank_lost():
            dist.all_gather_object(gathered, tensors, group=self.host)
        return [tensor for of_rank in gathered for tensor in of_rank]

    def replicas_equal(self, values: "torch.Tensor") -> bool:
        """Return whether all ranks hold the same values, by hash."""
        if self.size == 1:
            return True
        digest = hashlib.sha256(values.cpu().numpy().tobytes()).digest()
        number = int.from_bytes(digest[:6], "big")  # exact in a float64
        maximum, negative_minimum = self.all_reduce_max(number, -number)
        return maximum == -negative_minimum

    def shard_rows(self, lengths: np.ndarray) -> np.ndarray:
        """Return this rank's positions in `lengths` (rows,): all ranks get about as many tokens."""
        if self.size == 1:
            return np.arange(len(lengths))
        return np.argsort(-lengths, kind="stable")[self.rank :: self.size]


SINGLE_PROCESS = Group()


@contextmanager
def raise_rank_lost() -> Iterator[None]:
    """Raise RankLost in the context if another rank, or torchrun, has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"another rank ended ({first_line(error)})") from None


def shared_error(message: str) -> UserError:
    """Return a UserError that all ranks raise, so that only one of them prints it."""
    error = UserError(message)
    error.shared = True
    return error


def assign_runs(runs: Sequence, size: int) -> list[tuple[tuple[int, ...], Sequence]]:
    """Return [(ranks, runs of these ranks)]: consecutive runs, as evenly as possible."""
    count = min(len(runs), size)
    return [
        (
            tuple(rank for rank in range(size) if rank * count // size == group),
            runs[group * len(runs) // count : (group + 1) * len(runs) // count],
        )
        for group in range(count)
    ]


class Ranks:
    """All processes of one command; a single process if torchrun did not start it.

    Attributes:
        rank, size: the number of this process, and the number of processes.
        local_rank, local_size: the same among the processes of this machine.
    """

    def __init__(self) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        launched = "TORCHELASTIC_RUN_ID" in os.environ  # Other launchers set the same names.
        numbers = [int(os.environ[name]) for name in names] if launched else [0, 1, 0, 1]
        self.rank, self.size, self.local_rank, self.local_size = numbers
        self.store: Any = None  # torch's key-value store, once it is needed
        self.gather_count = 0

    def all_gather_object(self, value: Json) -> list:
        """Return the JSON values of all ranks in rank order; a signal ends the wait."""
        if self.size == 1:
            return [value]
        if self.store is None:
            from torch.distributed import PrefixStore, rendezvous

            self.store = PrefixStore("bitfit", next(rendezvous("env://", timeout=TIMEOUT))[0])
        self.gather_count += 1
        keys = [f"{self.gather_count}/{rank}" for rank in range(self.size)]
        with raise_rank_lost():
            self.store.set(keys[self.rank], json.dumps(value))
            while not self.store.check(keys):
                time.sleep(POLL_SECONDS)
            return [json.loads(self.store.get(key)) for key in keys]

    def raise_together(self, work: Callable[[], Result]) -> Result:
        """Return `work()` after all ranks have done it; a UserError of one is raised on all."""
        message = None
        try:
            value = work()
        except UserError as error:
            message = str(error)
        message = next(filter(None, self.all_gather_object(message)), None)
        if message:
            raise shared_error(message)
        return value  # It is bound, because an error would have been raised.

    def run_on_rank0(self, work: Callable[[], Result]) -> Result:
        """Do `work()` on rank 0 only, and return the result, a JSON value, on all ranks."""
        return self.all_gather_object(
            self.raise_together(work if self.rank == 0 else lambda: None)
        )[0]

    def local_gpu(self, choice: int | str | None) -> int | None:
        """Return this rank's GPU for --gpu-device, None: the CPU; UserError if GPUs are too few."""
        import torch

        count = torch.cuda.device_count()
        if self.size == 1 or choice is not None or not count:
            return resolve_gpu(choice)
        if self.local_rank >= count:
            raise UserError(
                f"{self.local_size} ranks on a machine with {count} GPUs: give torchrun "
                f"--nproc-per-node {count}, or --gpu-device to share one GPU"
            )
        return self.local_rank

    def make_group(self, runs: Sequence, on_own_gpus: bool) -> tuple[Sequence, Group]:
        """Return the runs that this rank trains, and the group of the ranks that train them.

        Args:
            on_own_gpus: whether each rank has a GPU for itself, so that NCCL sums gradients.
        """
        shows_progress, assignment = self.rank == 0, assign_runs(runs, self.size)
        if len(assignment) == self.size:
            ranks, runs_of_rank = assignment[self.rank]
            return runs_of_rank, Group(ranks, shows_progress=shows_progress)
        import torch.distributed as dist

        store = dist.PrefixStore("groups", self.store)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT
        )
        for ranks, runs_of_group in assignment:  # torch wants every rank to create every group.
            host = device = dist.new_group(ranks, timeout=TIMEOUT, backend="gloo")
            if on_own_gpus:
                device = dist.new_group(ranks, timeout=TIMEOUT, backend="nccl")
            if self.rank in ranks:
                group = Group(
                    ranks,
                    ranks.index(self.rank),
                    host,
                    device=device,
                    shows_progress=shows_progress,
                )
                result = runs_of_group, group
        return result

    def require_equal(self, name: str, value: Json) -> None:
        """Raise a UserError if a rank has another value than rank 0."""
        values = self.all_gather_object(value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            raise shared_error(
                f"rank {different[0]} has another {name} than rank 0: give all the same"
            )

    def shutdown(self) -> None:
        """Wait until all ranks are done, and close the process group."""
        self.all_gather_object("done")
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def launch_command(self) -> str:
        """Return the words of a command that start a program as this one was started."""
        if self.size == 1:
            return "python"
        if self.size > self.local_size:
            return "torchrun (with the same flags)"
        return f"torchrun --standalone --nproc-per-node {self.size}"
