"""The processes of torchrun, called ranks: who trains which runs, and the little they tell each
other.

K runs over R ranks. With as many runs as ranks, or more, each rank trains a share of them alone.
With fewer, a run has several ranks: each computes some rows of every batch, and the gradients are
summed. torchrun starts the ranks, and ends all of them where one fails.
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

if TYPE_CHECKING:  # -h imports this module, and no torch
    import torch

Json = Any  # a value that json.dumps takes
Result = TypeVar("Result")
LOOK_SECONDS = 0.05  # between two looks at what the others said
MEET = timedelta(minutes=30)  # for all ranks to meet, and for the slowest of a step


class Group(NamedTuple):
    """The ranks that train the same runs."""

    ranks: tuple = (0,)  # their numbers
    rank: int = 0  # this one's place among them
    host: Any = None  # torch.distributed's group for what lies in the host's memory
    device: Any = None  # and for gradients
    shows_progress: bool = True  # whether this process shows progress: one of all does

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce_sum_(self, *tensors: "torch.Tensor") -> None:
        """Add up over the ranks, in place; all of them then hold the same bits."""
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
        """Until all ranks are here; a sum of nothing would not wait."""
        self.all_reduce_max(0)

    def all_reduce_max(self, *numbers: float) -> Sequence[float]:
        """The largest of each number over the ranks; waits for all of them."""
        if self.size == 1:
            return numbers
        import torch
        import torch.distributed as dist

        together = torch.tensor([float(number or 0) for number in numbers], dtype=torch.float64)
        with raise_rank_lost():
            dist.all_reduce(together, dist.ReduceOp.MAX, group=self.host)
        return together.tolist()

    def all_gather(self, tensors: list["torch.Tensor"]) -> list["torch.Tensor"]:
        """The byte tensors of all ranks, those of rank 0 first; each has as many, of one shape."""
        if self.size == 1:
            return tensors
        import torch.distributed as dist

        everyone = [[tensor.clone() for tensor in tensors] for _ in self.ranks]
        with raise_rank_lost():
            for k, own in enumerate(tensors):
                dist.all_gather([theirs[k] for theirs in everyone], own, group=self.host)
        return [tensor for theirs in everyone for tensor in theirs]

    def replicas_equal(self, values: "torch.Tensor") -> bool:
        """Whether all ranks hold the same values, by hash."""
        if self.size == 1:
            return True
        digest = hashlib.sha256(values.cpu().numpy().tobytes()).digest()
        number = int.from_bytes(digest[:6], "big")  # a float64 holds it
        most, least = self.all_reduce_max(number, -number)
        return most == -least

    def shard_rows(self, lengths: np.ndarray) -> np.ndarray:
        """Which of some rows are this rank's: positions, so that each rank has as many tokens.

        Args:
            lengths: (rows,) tokens in each row.
        """
        if self.size == 1:
            return np.arange(len(lengths))
        return np.argsort(-lengths, kind="stable")[self.rank :: self.size]


SINGLE_PROCESS = Group()


@contextmanager
def raise_rank_lost() -> Iterator[None]:
    """Within: RankLost where another rank, or torchrun, is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"another rank ended ({first_line(error)})") from None


def shared_error(message: str) -> UserError:
    """A UserError that all ranks raise, so that one of them says it."""
    error = UserError(message)
    error.shared = True
    return error


def assign_runs(runs: Sequence, size: int) -> list[tuple[tuple[int, ...], Sequence]]:
    """[(ranks, the runs they train)]: neighbours each, and as even as it goes."""
    count = min(len(runs), size)
    return [
        (
            tuple(rank for rank in range(size) if rank * count // size == group),
            runs[group * len(runs) // count : (group + 1) * len(runs) // count],
        )
        for group in range(count)
    ]


class Ranks:
    """All processes of one command; this one alone where torchrun did not start it.

    Attributes:
        rank, size: this process's number and how many there are; of them `local_size` on this
            machine, here number `local_rank`.
    """

    def __init__(self) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        launched = "TORCHELASTIC_RUN_ID" in os.environ  # else the names are another launcher's
        numbers = [int(os.environ[name]) for name in names] if launched else [0, 1, 0, 1]
        self.rank, self.size, self.local_rank, self.local_size = numbers
        self.store: Any = None  # torch's key-value store, once the ranks have met
        self.said = 0

    def all_gather_object(self, fact: Json) -> list:
        """What all ranks say, in their order, each a JSON value; a signal ends the wait."""
        if self.size == 1:
            return [fact]
        if self.store is None:
            from torch.distributed import PrefixStore, rendezvous

            self.store = PrefixStore("bitfit", next(rendezvous("env://", timeout=MEET))[0])
        self.said += 1
        keys = [f"{self.said}/{rank}" for rank in range(self.size)]
        with raise_rank_lost():
            self.store.set(keys[self.rank], json.dumps(fact))
            while not self.store.check(keys):
                time.sleep(LOOK_SECONDS)
            return [json.loads(self.store.get(key)) for key in keys]

    def raise_together(self, work: Callable[[], Result]) -> Result:
        """What `work()` gives, once all ranks have done it; one's UserError is raised on all."""
        wrong = None
        try:
            value = work()
        except UserError as error:
            wrong = str(error)
        wrong = next(filter(None, self.all_gather_object(wrong)), None)
        if wrong:
            raise shared_error(wrong)
        return value  # bound: an error would have been raised

    def run_on_rank0(self, work: Callable[[], Result]) -> Result:
        """`work()` on rank 0 alone, while the others wait; its answer, a JSON value, on all."""
        return self.all_gather_object(
            self.raise_together(work if self.rank == 0 else lambda: None)
        )[0]

    def local_gpu(self, choice: int | str | None) -> int | None:
        """--gpu-device -> the number of this rank's GPU, None for the CPU.

        Raises:
            UserError: there are more ranks than GPUs, and it was not asked for.
        """
        import torch

        count = torch.cuda.device_count()
        if self.size == 1 or choice is not None or not count:
            return resolve_gpu(choice)
        if self.local_rank >= count:
            what = f"{self.local_size} ranks on a machine with {count} GPUs: give torchrun "
            raise UserError(f"{what}--nproc-per-node {count}, or --gpu-device to share one GPU")
        return self.local_rank

    def make_group(self, runs: Sequence, on_own_gpus: bool) -> tuple[Sequence, Group]:
        """(the runs that this rank trains, the `Group` of all ranks that train them).

        Args:
            on_own_gpus: whether each rank has a GPU for itself: then NCCL sums, else gloo.
        """
        speaks, dealt = self.rank == 0, assign_runs(runs, self.size)
        if len(dealt) == self.size:
            members, own = dealt[self.rank]
            return own, Group(members, shows_progress=speaks)
        import torch.distributed as dist

        store = dist.PrefixStore("groups", self.store)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=MEET
        )
        for members, own in dealt:  # all ranks make all groups
            host = dist.new_group(members, timeout=MEET, backend="gloo")
            device = dist.new_group(members, timeout=MEET, backend="nccl") if on_own_gpus else host
            if self.rank in members:
                place = members.index(self.rank)
                result = own, Group(members, place, host, device, speaks)
        return result

    def require_equal(self, what: str, fact: Json) -> None:
        """UserError where a rank has another `fact` than the first."""
        said = self.all_gather_object(fact)
        others = [rank for rank, theirs in enumerate(said) if theirs != said[0]]
        if others:
            raise shared_error(
                f"rank {others[0]} has another {what} than rank 0: give all the same"
            )

    def shutdown(self) -> None:
        """Wait until all ranks are done, and leave them."""
        self.all_gather_object("done")
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def launch_command(self) -> str:
        """What started this program, as words of a command."""
        if self.size == 1:
            return "python"
        if self.size > self.local_size:
            return "torchrun (with the same flags)"
        return f"torchrun --standalone --nproc-per-node {self.size}"
