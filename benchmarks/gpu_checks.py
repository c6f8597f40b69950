"""Compare the kernels and a training step with plain versions, on a GPU.

    python benchmarks/gpu_checks.py
    python benchmarks/gpu_checks.py --size tiny   # on a CPU, to see that it runs

The model is a random BERT of bert-base's size; it computes as `run_glue.py` does, bf16 by default.
The program ends with status 1 if a check fails. It needs no data. `gpu.sh` runs it.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import DTYPES, Ours, synchronize
from gpu_steps import make_parser, make_runs, random_tokens, start, steps, trained, training
from plain_attention import plain_varlen_kernel
from torch.profiler import ProfilerActivity, profile

from bitfit.data.tasks import TASKS
from bitfit.model import attention
from utils import set_seed

Outcome = tuple[bool, str]  # whether a check passed, and its message


def check_kernels(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Compare the kernels with plain ones: outputs, gradients, all queries and first ones."""
    lengths, owner = np.random.default_rng(0).integers(3, 120, 9), np.repeat([0, 1, 2], 3)
    sequences = attention.pack_sequences(lengths, owner, stacked=True)[0]
    off = max(
        kernel_difference(sequences, size, first=first, device=device)
        for size in (32, 64)
        for first in (False, True)
    )
    return off < 1e-2, f"relative differences of at most {off:.1e}"


def kernel_difference(
    sequences: attention.VarlenBatch, size: int, first: bool, device: torch.device
) -> float:
    """Return the largest relative difference between outputs or gradients of two kernels."""
    torch.manual_seed(0)
    shape, dtype = (len(sequences.position_ids), 12, size), torch.bfloat16
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    arrays = sequences.first_cu_seqlens if first else sequences.cu_seqlens, sequences.cu_seqlens
    bounds = tuple(torch.from_numpy(array).to(device) for array in arrays)
    longest = 1 if first else sequences.max_seqlen, sequences.max_seqlen
    rows = torch.from_numpy(sequences.sequence_starts).to(device)
    results = []
    fast = attention.varlen_kernel if device.type == "cuda" else plain_varlen_kernel
    for kernel, kind in ((fast, dtype), (plain_varlen_kernel, torch.float64)):
        inputs = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        query = inputs[0].index_select(0, rows) if first else inputs[0]
        out = kernel(query, inputs[1], inputs[2], bounds, longest, 0.0, size**-0.5)
        out.double().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
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
    out = attention.varlen_kernel(
        q,
        q,
        v.contiguous(),
        cu_seqlens=(bounds, bounds),
        max_seqlen=(64, 64),
        dropout=0.1,
        scale=1.0,
    )
    dropped = (out == 0).view(64, 64, 12, 64)  # (sequences, queries, heads, keys)
    rate = dropped.double().mean().item()
    same = [
        (dropped.select(axis, 0) == dropped.select(axis, 1)).double().mean().item()
        for axis in range(4)
    ]
    deviation = max(abs(share - (rate**2 + (1 - rate) ** 2)) for share in same)
    message = f"{rate:.4f}, two masks are alike as often as by chance to {deviation:.3f}"
    return abs(rate - 0.1) < 3e-3 and deviation < 0.01, message


def check_packing(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Check that BERT trains on packed rows, on a GPU in bf16 with FlashAttention."""
    ours = make_runs(args, random_tokens("RTE", 64, device), 1)
    packed_encoder = ours.plan_in(DTYPES[args.precision]).forward.packed_encoder
    fused = device.type == "cuda" and args.precision == "bf16"
    passed = packed_encoder and packed_encoder.after_attention and packed_encoder.varlen == fused
    return bool(
        passed
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
        alone = Ours(model, tokens, TASKS["cola"], batch_size=args.batch_size, runs=1)
        alone.stack.runs = [run]
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
    messages, passed = [], True
    for runs in (1, 3):
        results = []
        for graphs in (True, True, False):
            set_seed(0)
            ours = make_runs(args, random_tokens("CoLA", 20 * args.batch_size, device), runs)
            set_seed(0)
            state = trained(ours, DTYPES[args.precision], 40, graphs=graphs)
            results.append(torch.cat([ours.stack.params.flatten(), state.loss_sum]))
            used = len(state.graphs.graphs) if state.graphs else 0
            passed &= not (graphs and device.type == "cuda" and not used)
            messages.append(f"{used} graphs" if graphs and len(results) == 1 else "")
        off = [(results[0] - other).abs().max().item() for other in results[1:]]
        passed &= off == [0, 0]
        messages.append(f"{runs} runs: again off by {off[0]:.0e}, without graphs {off[1]:.0e}")
    return passed, ", ".join(filter(None, messages))


def check_waits(args: argparse.Namespace, device: torch.device) -> Outcome:
    """Check that nothing in a step makes the host wait, and that all copies are pinned."""
    if device.type == "cpu":
        return True, "not asked: no GPU"
    tokens, dtype = random_tokens("CoLA", 16 * args.batch_size, device), DTYPES[args.precision]
    messages, passed = [], True
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
        passed &= pageable == 0
    return passed, f"none; without graphs {messages[0]}; with graphs {messages[1]}"


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


def failed_checks(args: argparse.Namespace, device: torch.device) -> bool:
    failed = False
    for name, work in CHECKS.items():
        begin = time.perf_counter()
        passed, message = work(args, device)
        failed |= not passed
        taken = time.perf_counter() - begin
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {message} ({taken:.1f} s)", flush=True)
    return failed


def main() -> int:
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    return int(failed_checks(args, start(args)))


if __name__ == "__main__":
    sys.exit(main())
