"""Check the kernels and a training step on a GPU, then time steps.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --size tiny --runs 1 2 --steps 3   # on a CPU, to see that it runs

The model is a random BERT of bert-base's size; it computes as `run_glue.py` does, bf16 by default.
The checks compare each fast path with the plain one and end with status 1 if any fails. The times
are those of steps at CoLA's and RTE's row lengths once all shapes have been met: of K runs beside
Hugging Face Trainer (with accelerate), the released loop and K processes that share the GPU; of
each fine-tune type; and of each kernel. Needs no data. `gpu.sh` runs this and whole commands.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from common import (
    DTYPES,
    LENGTH,
    ROOT,
    SIZES,
    Ours,
    flop_of,
    gemm_rate,
    machine,
    pick_device,
    random_model,
    spread,
    synchronize,
)
from peers import make_trainer
from throughput import make_released
from torch.profiler import ProfilerActivity, profile

from bitfit.data.tasks import TASKS
from bitfit.data.tokens import TokenizedSplit
from bitfit.model import attention
from bitfit.model.loading import load_tokenizer
from bitfit.options import FINE_TUNE_TYPES
from bitfit.tracking.tracker import peak_gib
from bitfit.training.loop import step_graphs, train_step
from bitfit.training.state import TrainState, init_state
from utils import set_seed

Outcome = tuple[bool, str]  # whether a check passed, and its message
LENGTHS = {"CoLA": (11.4, 4, 47), "RTE": (66, 12, LENGTH)}  # mean, least, most


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="bert-base", choices=SIZES)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--steps", type=int, default=20, help="timed, of each kind")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--processes", type=int, default=5, help="that share the GPU, one run each")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--only-checks", action="store_true")
    parts.add_argument("--only-times", action="store_true")
    return parser.parse_args()


def random_tokens(kind: str, rows: int, device: torch.device) -> TokenizedSplit:
    """Return examples of random tokens with the lengths of a task (gamma-distributed)."""
    mean, least, most = LENGTHS[kind]
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(6, mean / 6, rows), least, most).astype(np.int64)
    ids = torch.from_numpy(rng.integers(5, 400, lengths.sum()).astype(np.int32))
    labels = torch.from_numpy(rng.integers(0, 2, rows))
    starts = lengths.cumsum() - lengths
    return TokenizedSplit(ids, None, starts, labels, lengths, pad_id=0).to(device)


def make_runs(
    args: argparse.Namespace,
    tokens: TokenizedSplit,
    runs: int,
    method: str = "bitfit",
    size: str | None = None,
) -> Ours:
    """Return K runs of a random model."""
    model = random_model(size or args.size).to(tokens.ids.device)
    return Ours(model, tokens, TASKS["cola"], args.batch_size, runs, method=method)


@contextmanager
def training(ours: Ours, dtype: torch.dtype, graphs: bool = True) -> Iterator[TrainState]:
    """Yield the `TrainState` of a training, for `steps`."""
    state = init_state(ours.plan_in(dtype), ours.stack)
    ours.plan.forward.model.train()
    with ours.stack.patched(dtype):
        state.graphs = step_graphs(state) if graphs else None
        yield state


def steps(state: TrainState, count: int) -> None:
    """Take `count` steps; two calls continue as one longer call would."""
    plan, runs = state.plan, state.stack.runs
    orders = np.stack([plan.order(run, 0) for run in runs])
    for _ in range(count):
        first = state.step * plan.batch_size
        train_step(state, np.arange(len(runs)), orders[:, first : first + plan.batch_size])
        state.step = (state.step + 1) % plan.steps_per_epoch


def trained(ours: Ours, dtype: torch.dtype, count: int, graphs: bool = True) -> TrainState:
    """Return the `TrainState` after so many steps."""
    with training(ours, dtype, graphs) as state:
        steps(state, count)
    return state


# -------------------------------------------------------------------------------------- checks


def check_kernels(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Compare the kernels with plain ones: outputs, gradients, all queries and first ones."""
    worst: dict[torch.dtype, float] = {}
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        lengths, owner = np.random.default_rng(0).integers(3, 120, 9), np.repeat([0, 1, 2], 3)
        sequences = attention.pack_sequences(lengths, owner, stacked=True)[0]
        for size in (32, 64):
            for first in (False, True):
                off = kernel_difference(sequences, size, first, dtype, device)
                worst[dtype] = max(worst.get(dtype, 0.0), off / allowed)
    message = ", ".join(f"{str(d)[6:]} {off:.2f}" for d, off in worst.items())
    return max(worst.values()) < 1, f"differences, in shares of what is allowed: {message}"


def kernel_difference(
    sequences: attention.VarlenBatch,
    size: int,
    first: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Return the largest relative difference between outputs or gradients of two kernels."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(
            len(sequences.position_ids), 12, size, device=device, dtype=dtype
        ).requires_grad_()
        for _ in range(3)
    )
    arrays = sequences.first_cu_seqlens if first else sequences.cu_seqlens, sequences.cu_seqlens
    bounds = tuple(torch.from_numpy(own).to(device) for own in arrays)
    longest = 1 if first else sequences.max_seqlen, sequences.max_seqlen
    rows = torch.from_numpy(sequences.sequence_starts).to(device)
    results = []
    fast = attention.varlen_kernel if device.type == "cuda" else attention.plain_varlen_kernel
    for kernel, of in ((fast, dtype), (attention.plain_varlen_kernel, torch.float64)):
        own = [x.detach().to(of).requires_grad_() for x in (q, k, v)]
        query = own[0].index_select(0, rows) if first else own[0]
        out = kernel(query, own[1], own[2], bounds, longest, 0.0, size**-0.5)
        out.double().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in own)])
    pairs = ((a.double(), b.double()) for a, b in zip(*results, strict=True))
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def check_dropout(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Check that FlashAttention drops the requested share of weights, and other ones in each head.

    It has 8 random bits for a weight: 0.1 becomes 0.1016.
    """
    if device.type == "cpu":
        return True, "not asked: no GPU"
    # With one key a number of the output, that is 0 where the key's weight was dropped.
    q = torch.zeros(64 * 64, 12, 64, device=device, dtype=torch.bfloat16)
    v = torch.eye(64, device=device, dtype=q.dtype)[:, None].expand(-1, 12, -1).repeat(64, 1, 1)
    bounds = torch.arange(0, len(q) + 1, 64, device=device, dtype=torch.int32)
    out = attention.varlen_kernel(q, q, v.contiguous(), (bounds, bounds), (64, 64), 0.1, 1.0)
    dropped = (out == 0).view(64, 64, 12, 64)  # (sequences, queries, heads, keys)
    rate = dropped.double().mean().item()
    same = [
        (dropped.select(axis, 0) == dropped.select(axis, 1)).double().mean().item()
        for axis in range(4)
    ]
    alike = max(abs(share - (rate**2 + (1 - rate) ** 2)) for share in same)
    message = f"{rate:.4f}, two masks are alike as often as by chance to {alike:.3f}"
    return abs(rate - 0.1) < 3e-3 and alike < 0.01, message


def check_packing(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Check that BERT trains on packed rows, on a GPU in bf16 with FlashAttention."""
    ours = make_runs(args, random_tokens("RTE", 64, device), 1)
    packed_encoder = ours.plan_in(DTYPES[args.precision]).forward.packed_encoder
    fused = device.type == "cuda" and args.precision == "bf16"
    good = packed_encoder and packed_encoder.after_attention and packed_encoder.varlen == fused
    return bool(
        good
    ), "off" if not packed_encoder else "fused" if packed_encoder.varlen else "grouped"


def check_stack(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Compare three runs without dropout, in float32, with each of them alone."""
    tokens = random_tokens("CoLA", 4 * args.batch_size, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    stack = make_runs(args, tokens, 3)
    model = without_dropout(stack.plan.forward.model)
    together = trained(stack, torch.float32, 3).stack.params.clone()
    off = moved = 0.0
    for k, run in enumerate(stack.stack.runs):
        alone = Ours(model, tokens, TASKS["cola"], args.batch_size, 1)
        alone.stack.runs[0] = run
        alone.stack.params.copy_(stack.stack.initial_params[k : k + 1])
        values = trained(alone, torch.float32, 3).stack.params[0]
        for name, (a, b) in stack.stack.slices.items():
            if not name.endswith("key.bias"):  # its gradient is rounding noise
                off += (together[k, a:b] - values[a:b]).abs().sum().item()
                moved += (stack.stack.initial_params[k, a:b] - values[a:b]).abs().sum().item()
    torch.set_float32_matmul_precision(before)
    return 0 < off < 0.01 * moved, f"off by {off / moved:.1e} of what they moved"


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def check_repeat(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Compare a training with a second one, and with one without CUDA graphs, bit by bit."""
    messages, good = [], True
    for runs in (1, 3):
        results = []
        for graphs in (True, True, False):
            set_seed(0)
            ours = make_runs(args, random_tokens("CoLA", 20 * args.batch_size, device), runs)
            set_seed(0)
            state = trained(ours, DTYPES[args.precision], 40, graphs)
            results.append(torch.cat([ours.stack.params.flatten(), state.loss_sum]))
            used = len(state.graphs.graphs) if state.graphs else 0
            good &= not (graphs and device.type == "cuda" and not used)
            messages.append(f"{used} graphs" if graphs and len(results) == 1 else "")
        off = [(results[0] - other).abs().max().item() for other in results[1:]]
        good &= off == [0, 0]
        messages.append(f"{runs} runs: again off by {off[0]:.0e}, without graphs {off[1]:.0e}")
    return good, ", ".join(filter(None, messages))


def check_waits(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Check that nothing in a step makes the host wait, and that all copies are pinned."""
    if device.type == "cpu":
        return True, "not asked: no GPU"
    tokens, dtype = random_tokens("CoLA", 16 * args.batch_size, device), DTYPES[args.precision]
    messages, good = [], True
    for graphs in (False, True):
        ours = make_runs(args, tokens, 5)
        with training(ours, dtype, graphs) as state:
            steps(state, 40)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                with forbid_waiting():
                    steps(state, 8)
                synchronize(device)
        copies = {e.key: e.count for e in seen.key_averages() if "HtoD" in e.key}
        pageable = sum(n for name, n in copies.items() if "Pageable" in name)
        messages.append(f"{sum(copies.values()) / 8:.1f} copies a step, {pageable} stalled")
        good &= pageable == 0
    return good, f"none; without graphs {messages[0]}; with graphs {messages[1]}"


@contextmanager
def forbid_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_memory(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Check that a step with a fifth of the memory it takes is cut into smaller passes."""
    tokens = random_tokens("CoLA", 4 * args.batch_size, device)
    ours = make_runs(args, tokens, 20)
    budget, config = ours.plan.token_budget, ours.plan.forward.model.config
    before = 20 * int(tokens.lengths[: args.batch_size].sum()) * 2
    left = 20 * before * config.hidden_size * config.num_hidden_layers  # bytes
    if left < 2**26:
        return True, "not asked: too small a model to tell"
    with training(ours, torch.float32, graphs=False) as state:
        budget.max_tokens = 256
        steps(state, 1)
        budget.max_tokens = before
        with little_memory(device, left):
            steps(state, 1)
        losses = state.loss_sum
    message = f"{before} -> {budget.max_tokens} tokens a pass, {left / 2**20:.0f} MiB left"
    return budget.max_tokens < before and bool(losses.isfinite().all()), message


@contextmanager
def little_memory(device: torch.device, left: int) -> Iterator[None]:
    """Limit the memory to the given bytes above the current use, of the process or the GPU."""
    if device.type == "cpu":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + left
        resource.setrlimit(resource.RLIMIT_AS, (most, limit[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved(device) + left) / total, device
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_resume(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Compare 20 steps with 12 and 8 that a checkpoint separates, bit by bit."""
    tokens, dtype = random_tokens("CoLA", 4 * args.batch_size, device), DTYPES[args.precision]
    whole, first, second = (make_runs(args, tokens, 3) for _ in range(3))
    set_seed(0)
    expected = trained(whole, dtype, 20).stack.params
    set_seed(0)
    metadata, tensors = trained(first, dtype, 12).state_dict()
    set_seed(1)
    with training(second, dtype) as state:
        state.load_state_dict(metadata, {name: tensor.clone() for name, tensor in tensors.items()})
        second.stack.sync_to_model()
        steps(state, 8)
    found = second.stack.params
    return torch.equal(found, expected), f"off by {(found - expected).abs().max().item():.0e}"


CHECKS = {
    "the fused attention": check_kernels,
    "dropout's rate": check_dropout,
    "rows are packed": check_packing,
    "a stack is its single runs": check_stack,
    "a repeated training": check_repeat,
    "a step waits": check_waits,
    "little memory": check_memory,
    "resume": check_resume,
}


def check(args: argparse.Namespace, device: torch.device) -> bool:
    failed = False
    for name, work in CHECKS.items():
        begin = time.perf_counter()
        good, message = work(args, device)
        failed |= not good
        taken = time.perf_counter() - begin
        print(f"{'ok  ' if good else 'FAIL'} {name}: {message} ({taken:.1f} s)", flush=True)
    return failed


# --------------------------------------------------------------------------------------- times


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


def measure_peers(args: argparse.Namespace, tokens: TokenizedSplit) -> tuple[float, float]:
    """Milliseconds of a step of the released loop and of Trainer, medians of 3 epochs."""

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
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(args.processes + 1), context.Queue()
    workers = [
        context.Process(target=one_process, args=(args, device, barrier, times), daemon=True)
        for _ in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait(timeout=300)
    taken = statistics.median(times.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    print(f"CoLA, {args.processes} processes with a run each: {taken:.2f} ms a step")


def one_process(
    args: argparse.Namespace, device: torch.device, barrier: Barrier, times: Queue
) -> None:
    tokens = random_tokens("CoLA", args.steps * args.batch_size, device)
    ours = make_runs(args, tokens, 1)
    count = 5 * args.steps
    with training(ours, DTYPES[args.precision]) as state:
        steps(state, count)
        synchronize(device)
        barrier.wait(timeout=300)
        begin = time.perf_counter()
        steps(state, count)
        synchronize(device)
        times.put((time.perf_counter() - begin) / count * 1e3)


def main() -> int:
    args, device = parse_args(), pick_device()
    torch.set_float32_matmul_precision("high")  # as run_glue.py
    print(f"{args.size}, {args.precision}, {machine(device)}", flush=True)
    failed = not args.only_times and check(args, device)
    if not args.only_checks:
        measure(args, device)
        measure_types(args, device)
        measure_processes(args, device)
        measure_kernels(args, device)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
