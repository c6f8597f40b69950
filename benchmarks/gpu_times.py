"""Time training steps on a GPU, and list the most expensive kernels.

    python benchmarks/gpu_times.py
    python benchmarks/gpu_times.py --size tiny --runs 1 2 --steps 3   # on a CPU, as a trial

The model is a random BERT of bert-base's size; it computes as `run_glue.py` does, bf16 by default.
The times are those of steps at CoLA's and RTE's lengths after all shapes were met: of K runs beside
Hugging Face Trainer (with accelerate), the released loop, `torch.func.vmap` of the plain model and
K processes that share the GPU; of each fine-tune type; and of each kernel. The program needs no
data. `gpu.sh` runs it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from common import (
    DTYPES,
    ROOT,
    Ours,
    flop_of,
    gemm_rate,
    pick_device,
    random_model,
    seconds,
    spread,
    synchronize,
)
from gpu_steps import LENGTHS, make_parser, make_runs, random_tokens, start, steps, training
from parallel_peers import Processes, make_vmap
from peers import make_trainer
from throughput import make_released
from torch.profiler import ProfilerActivity, profile

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.loading import load_tokenizer
from bitfit.options import FINE_TUNE_TYPES
from bitfit.tracking.tracker import peak_gib


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--steps", type=int, default=20, help="timed, of each kind")
    parser.add_argument("--processes", type=int, nargs="+", default=[5, 20, 50],
                        help="that share the GPU, one run each")  # fmt: skip
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    return parser.parse_args()


def step_times(ours: Ours, precision: str, rounds: int = 3) -> tuple[list[float], int]:
    """Return (milliseconds of a step in each round, CUDA graphs used) after all shapes were met."""
    device, count, times = ours.device, ours.plan.steps_per_epoch, []
    with training(ours, DTYPES[precision]) as state:
        steps(state, 5 * count if state.graphs else 1)
        for _ in range(rounds):
            synchronize(device)
            begin = time.perf_counter()
            steps(state, count)
            synchronize(device)
            times.append((time.perf_counter() - begin) / count * 1e3)
        return times, len(state.graphs.graphs) if state.graphs else 0


def measure(args: argparse.Namespace, device: torch.device) -> None:
    rate = gemm_rate("bf16", device, size=8192 if device.type == "cuda" else 1024)
    print(f"GEMM {rate / 1e12:.2f} TFLOP/s in bf16; milliseconds of a step, batch "
          f"{args.batch_size}, median (range) of 3 times {args.steps} steps")  # fmt: skip
    one_run: dict[str, float] = {}
    for kind in LENGTHS:
        tokens = random_tokens(kind, args.steps * args.batch_size, device)
        peers = measure_peers(args, tokens)
        print(f"{kind}: released loop {peers[0]:.1f}, Trainer {args.precision} {peers[1]:.1f}")
        for runs in args.runs:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ours = make_runs(args, tokens, runs)
            times, graphs = step_times(ours, args.precision)
            mine = statistics.median(times)
            one_run.setdefault(kind, mine)
            flop = runs * flop_of(ours.plan.forward.model, tokens) / args.steps
            print(
                f"{kind} {runs:>3} runs: {spread(times, 2)} ms, {flop / (mine / 1e3) / rate:.0%} "
                f"of the GEMM rate, {mine / one_run[kind]:.2f} times the first, "
                f"{runs * peers[0] / mine:.1f} times as fast as the released loop, "
                f"{runs * peers[1] / mine:.1f} times Trainer, peak {peak_gib(device):.2f} GiB, "
                f"{graphs} graphs",
                flush=True,
            )
            del ours
            measure_vmap(args, kind, tokens, runs=runs, mine=mine)


def measure_vmap(
    args: argparse.Namespace, kind: str, tokens: TokenizedSplit, runs: int, mine: float
) -> None:
    """Time a step of K runs of the plain model by vmap, beside `mine` milliseconds of ours."""
    epoch = make_vmap(partial(random_model, args.size), tokens, args.batch_size, runs=runs)
    try:
        epoch(args.precision)
        times = [epoch(args.precision) / args.steps * 1e3 for _ in range(3)]
    except torch.OutOfMemoryError:
        print(f"{kind} {runs:>3} runs by vmap: out of memory", flush=True)
        return
    ratio = statistics.median(times) / mine
    print(
        f"{kind} {runs:>3} runs by vmap: {spread(times, 2)} ms, {ratio:.1f} times ours", flush=True
    )


def measure_peers(args: argparse.Namespace, tokens: TokenizedSplit) -> tuple[float, float]:
    """Return the median milliseconds of a step of the released loop and of Trainer."""

    def step(epoch: Callable[[], float], rounds: int) -> float:
        epoch()
        return statistics.median(epoch() for _ in range(rounds)) / args.steps * 1e3

    released = step(make_released(random_model(args.size), tokens, args.batch_size), 1)
    tokenizer = load_tokenizer(str(ROOT / "examples/tiny_bert"))
    make_model = partial(random_model, args.size)
    try:
        train = make_trainer(make_model, tokens, tokenizer, args.batch_size)
        return released, step(partial(train, args.precision), 3)
    except ImportError as error:
        print(f"Trainer is left out: {error}")
        return released, float("nan")


def measure_types(args: argparse.Namespace, device: torch.device) -> None:
    """Time a step of one run of each fine-tune type, in both precisions."""
    tokens = random_tokens("CoLA", args.steps * args.batch_size, device)
    for method in FINE_TUNE_TYPES:
        messages = []
        for precision in DTYPES:
            times, _ = step_times(make_runs(args, tokens, 1, method), precision)
            messages.append(f"{precision} {spread(times, 2)} ms")
        print(f"CoLA {method}: {', '.join(messages)}", flush=True)


def measure_kernels(args: argparse.Namespace, device: torch.device) -> None:
    """Print the most expensive kernels of a step."""
    runs = min(20, max(args.runs))
    tokens = random_tokens("RTE", 8 * args.batch_size, device)
    ours = make_runs(args, tokens, runs)
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with training(ours, DTYPES[args.precision], graphs=False) as state:
        steps(state, 3)
        with profile(activities=[kind]) as seen:
            steps(state, 4)
            synchronize(device)
    took = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(((getattr(e, took) / 4e3, e) for e in seen.key_averages()), key=lambda r: -r[0])
    print(f"kernels of a step of {runs} runs at RTE's lengths, {sum(r[0] for r in rows):.2f} ms")
    for milliseconds, event in rows[:24]:
        print(f"  {milliseconds:7.3f} ms {event.count / 4:6.1f} x {event.key[:100]}")


def measure_processes(args: argparse.Namespace, device: torch.device) -> None:
    """Time steps of several processes that share this device, one run each."""
    for kind in LENGTHS:
        for count in args.processes:
            processes = Processes(partial(SingleRun, args, kind), count)
            try:
                taken = processes.epoch(args.precision) / (5 * args.steps) * 1e3
                message = f"{taken:.2f} ms a step"
            except RuntimeError as error:
                message = str(error)
            processes.close()
            print(f"{kind}, {count} processes with a run each: {message}", flush=True)


class SingleRun:
    """One run in a separate process, trained with CUDA graphs of all shapes."""

    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        tokens = random_tokens(kind, args.steps * args.batch_size, pick_device())
        self.ours = make_runs(args, tokens, 1)

    def epoch(self, precision: str, wait: Callable[[], object]) -> float:
        """Return the seconds of five epochs after `wait`."""
        count = 5 * self.ours.plan.steps_per_epoch
        with training(self.ours, DTYPES[precision]) as state:
            steps(state, count)
            synchronize(self.ours.device)
            wait()
            return seconds(partial(steps, state, count), self.ours.device)


PARTS = {
    "processes": measure_processes,  # first, because torch then keeps the memory of other parts
    "runs": measure,
    "types": measure_types,
    "kernels": measure_kernels,
}


def main() -> None:
    args = parse_args()
    device = start(args)
    for part in args.parts:
        PARTS[part](args, device)


if __name__ == "__main__":
    main()
