"""What only the device itself can show, for a random encoder of bert-base's size.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --size tiny --runs 1 2 --steps 3   # on a CPU, to see that it runs

First the checks: a stack equals its single runs; no step waits for the device (CUDA alone can
tell); a device with little memory halves the pass and goes on; a training resumed equals one that
never stopped, bit by bit. Then, at CoLA's and RTE's row lengths, the time of a step for K runs
beside the released loop's and Hugging Face Trainer's (with accelerate), the share of the GEMM rate
and the peak memory. Needs no data. Ends with status 1 if a check fails.

No GPU was at hand when this was written: on one, nothing of it has run yet.
"""

import argparse
import resource
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    LENGTH,
    ROOT,
    SIZES,
    Ours,
    flop_of,
    gemm_rate,
    machine,
    pick_device,
    random_model,
)
from peers import make_trainer
from throughput import make_released

from bitfit.checkpoints import capture, restore
from bitfit.data import Tokens
from bitfit.models import load_tokenizer
from bitfit.tasks import TASKS
from bitfit.tracking import peak_gib
from bitfit.train import start, take_step
from utils import set_seed

LENGTHS = {"CoLA": (11.4, 4, 47), "RTE": (66, 12, LENGTH)}  # mean, least, most


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="bert-base", choices=SIZES)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--steps", type=int, default=20, help="timed, of each kind")
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def random_tokens(kind, rows, device):
    """Rows of random tokens, as long as those of a task (gamma-distributed)."""
    mean, least, most = LENGTHS[kind]
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(6, mean / 6, rows), least, most).astype(np.int64)
    ids = torch.from_numpy(rng.integers(5, 400, lengths.sum()).astype(np.int32))
    labels = torch.from_numpy(rng.integers(0, 2, rows))
    starts = lengths.cumsum() - lengths
    return Tokens(ids, None, starts, labels, lengths, pad_id=0).to(device)


def steps(ours, dtype, count, state=None, watch=None):
    """The `State` after so many steps, the same however they are cut up."""
    state = state or start(ours.plan, ours.stack)
    size, runs = ours.plan.batch_size, len(ours.stack.runs)
    orders = np.stack([ours.plan.order(run, 0) for run in ours.stack.runs])
    ours.plan.forward.model.train()
    with ours.stack.bound(dtype):
        for _ in range(count):
            rows = orders[:, state.step * size : (state.step + 1) * size]
            # The first one makes the optimizer's state.
            with watch() if watch and state.step else nullcontext():
                take_step(state, np.arange(runs), rows)
            state.step += 1
    return state


def check_stack(args, tokens):
    """Three runs without dropout, in float32, beside each alone."""
    torch.set_float32_matmul_precision("highest")
    model = without_dropout(random_model(args.size)).to(tokens.ids.device)
    stack = Ours(model, tokens, TASKS["cola"], args.batch_size, 3)
    together = steps(stack, torch.float32, 3).stack.values.clone()
    off = moved = 0.0
    for k, run in enumerate(stack.stack.runs):
        alone = Ours(model, tokens, TASKS["cola"], args.batch_size, 1)
        alone.stack.runs[0] = run
        alone.stack.values.copy_(stack.stack.start[k : k + 1])
        values = steps(alone, torch.float32, 3).stack.values[0]
        for name, (a, b) in stack.stack.slices.items():
            if not name.endswith("key.bias"):  # its gradient is rounding noise
                off += (together[k, a:b] - values[a:b]).abs().sum().item()
                moved += (stack.stack.start[k, a:b] - values[a:b]).abs().sum().item()
    return 0 < off < 0.01 * moved, f"off by {off / moved:.1e} of what they moved"


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def check_waits(args, tokens):
    """CUDA raises an error at whatever makes the host wait."""
    on_gpu = tokens.ids.is_cuda
    ours = Ours(random_model(args.size).to(tokens.ids.device), tokens, TASKS["cola"],
                args.batch_size, 5)  # fmt: skip
    steps(ours, torch.bfloat16, 3, watch=forbid_waiting if on_gpu else None)
    return True, "none" if on_gpu else "not asked: no GPU"


@contextmanager
def forbid_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_memory(args, tokens):
    """With about a fifth of the memory that a step's one pass takes, it is halved until it fits."""
    device, config = tokens.ids.device, random_model(args.size).config
    ours = Ours(random_model(args.size).to(device), tokens, TASKS["cola"], args.batch_size, 20)
    limit = ours.plan.limit
    limit.tokens = 256
    steps(ours, torch.float32, 1)
    limit.tokens = before = 20 * int(tokens.lengths[: args.batch_size].sum()) * 2
    left = 20 * before * config.hidden_size * config.num_hidden_layers  # bytes
    if left < 2**26:
        return True, "not asked: too small a model to tell"
    with little_memory(device, left):
        losses = steps(ours, torch.float32, 1).loss_sum
    said = f"{before} -> {limit.tokens} tokens a pass, {left / 2**20:.0f} MiB left"
    return limit.tokens < before and bool(losses.isfinite().all()), said


@contextmanager
def little_memory(device, left):
    """Leave so many bytes more than are taken now: to the process, or of the GPU."""
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


def check_resume(args, tokens):
    """Four steps, and two and two with a checkpoint between, dropout and all."""
    device = tokens.ids.device
    model = random_model(args.size).to(device)
    whole, first, second = (
        Ours(model, tokens, TASKS["cola"], args.batch_size, 3) for _ in range(3)
    )
    set_seed(0)
    expected = steps(whole, torch.bfloat16, 4).stack.values
    set_seed(0)
    facts, tensors = capture(steps(first, torch.bfloat16, 2))
    set_seed(1)
    state = start(second.plan, second.stack)
    restore(state, facts, {name: tensor.clone() for name, tensor in tensors.items()})
    found = steps(second, torch.bfloat16, 2, state).stack.values
    if device.type == "cuda":  # its sums by index come in any order
        return torch.allclose(found, expected, atol=1e-6), "to rounding"
    return torch.equal(found, expected), "bit by bit"


def check(args, device):
    failed = False
    tokens = random_tokens("CoLA", 4 * args.batch_size, device)
    for name, of in (("a stack is its single runs", check_stack), ("a step waits", check_waits),
                     ("little memory", check_memory), ("resume", check_resume)):  # fmt: skip
        good, said = of(args, tokens)
        failed |= not good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {said}", flush=True)
    return failed


def measure(args, device):
    tokenizer = load_tokenizer(str(ROOT / "examples/tiny_bert"))
    rate = gemm_rate("bf16", device, size=8192 if device.type == "cuda" else 1024)
    print(f"GEMM {rate / 1e12:.2f} TFLOP/s in bf16; milliseconds of a step, batch "
          f"{args.batch_size}, median of 3 times {args.steps} steps")  # fmt: skip
    for kind in LENGTHS:
        tokens = random_tokens(kind, args.steps * args.batch_size, device)

        def step(epoch):
            epoch()
            return sorted(epoch() for _ in range(3))[1] / args.steps * 1e3

        released = step(make_released(random_model(args.size), tokens, args.batch_size))
        train = partial(
            make_trainer, tokens=tokens, tokenizer=tokenizer, batch_size=args.batch_size
        )
        try:
            trainer = step(partial(train(partial(random_model, args.size)), "bf16"))
        except ImportError as error:
            trainer = float("nan")
            print(f"Trainer is left out: {error}")
        print(f"{kind}: released loop {released:.1f}, Trainer bf16 {trainer:.1f}")
        for runs in args.runs:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            model = random_model(args.size).to(device)
            ours = Ours(model, tokens, TASKS["cola"], args.batch_size, runs)
            mine = step(partial(ours.epoch, "bf16"))
            share = runs * flop_of(model, tokens) / args.steps / (mine / 1e3) / rate
            print(
                f"{kind} {runs:>3} runs: {mine:.1f} ms, {share:.0%} of the GEMM rate, "
                f"{runs * released / mine:.1f} times the released loop, "
                f"{runs * trainer / mine:.1f} times Trainer, peak {peak_gib(device):.2f} GiB",
                flush=True,
            )


def main():
    args = parse_args()
    device = pick_device()
    print(f"{args.size}, {machine(device)}")
    failed = check(args, device)
    measure(args, device)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
