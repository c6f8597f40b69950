"""K runs in one pass beside the same K runs one after the other, on the same rows in one process.

    python benchmarks/stacking.py --task-name rte --data-dir <GLUE folder> --model-name <folder>

For each K both are trained in turn (A B A B ...), after a warm-up of each. The clock covers
training alone: no loading, tokenizing or scoring. A run is one pass over the task's training
rows; runs/hour is scaled up from the rows that were trained. The share of the machine's GEMM rate
is 4 x the encoder's matrix weights x real tokens / seconds (forward and backward of the inputs,
padding not counted), over what a product of 2048 x 2048 matrices reached in the same minute.
Without --model-name a random encoder of MiniLM-L6's size (22M) is used.
"""

import resource
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from throughput import (  # noqa: E402
    LENGTH,
    load,
    machine,
    make_parser,
    one_epoch,
    pick_device,
    pick_rows,
    spread,
    synchronize,
    timed_epoch,
)

from bitfit.data import tokenize  # noqa: E402
from bitfit.models import draw_head  # noqa: E402
from bitfit.runs import Run, Stack  # noqa: E402
from bitfit.tasks import TASKS  # noqa: E402
from bitfit.trainable import in_encoder, select  # noqa: E402


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rows", type=int, default=64, help="training rows of each run")
    parser.add_argument("--max-tokens", type=int, help="None: the device's default")
    return parser.parse_args()


def seconds(work, device):
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def gemm_rate(precision, device):
    """FLOP/s of a square product: the median of seven."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(9)][2:]
    return 2 * 2048**3 / median(times)


def timed_pass(model, tokens, runs, args, task):
    """(seconds, peak GiB) of training these runs together, one pass over the rows."""
    device = tokens.ids.device
    stack = Stack(model, select(model, "bitfit", ["bias"]), runs, draw_head)
    rows = np.arange(len(tokens.lengths))
    state = one_epoch(model, stack, tokens, task, args.batch_size, rows, args.max_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elapsed = timed_epoch(state, args.precision)
    peak = peak_gib(device)
    stack.values.copy_(stack.start)
    stack.put(0)
    return elapsed, peak


def peak_gib(device):
    """The most memory so far: of the process, or on the GPU since the pass began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def compare(make_model, tokens, count, args, task):
    """(seconds together, seconds one after the other, peak GiB together), a list each, K runs."""
    device = tokens.ids.device
    model = make_model().to(device)
    grid = [Run(1e-4 * (1 + k % 4), k // 4) for k in range(count)]
    together, apart, peaks = [], [], []
    for lap in range(args.rounds + 1):  # the first is the warm-up
        elapsed, peak = timed_pass(model, tokens, grid, args, task)
        together.append(elapsed)
        peaks.append(peak)
        alone = grid if lap else grid[:1]
        apart.append(sum(timed_pass(model, tokens, [run], args, task)[0] for run in alone))
    return together[1:], apart[1:], peaks[1:]


def main():
    args = parse_args()
    task, device = TASKS[args.task_name], pick_device()
    tokenizer, make_model = load(args, task)
    texts, total = pick_rows(args, task)
    tokens = tokenize(texts, tokenizer, LENGTH).to(device)
    count = len(texts)
    model = make_model()
    weights = sum(
        p.numel()
        for n, p in model.named_parameters()
        if in_encoder(model, n) and p.dim() > 1 and ".embeddings." not in n
    )
    flop = 4 * weights * int(tokens.lengths.sum())  # of one run's pass
    print(
        f"{task.name}, {count} rows of each run, batch {args.batch_size}, {args.precision}, "
        f"{args.rounds} rounds, {machine(device)}\n"
        f"{'K':>3} {'together: s':>18} {'one by one: s':>18} {'ratio':>17} {'runs/hour':>9} "
        f"{'GEMM share':>10} {'peak GiB':>8}"
    )
    gemm = partial(gemm_rate, args.precision, device)
    for runs in args.runs:
        rate = gemm()
        together, apart, peaks = compare(make_model, tokens, runs, args, task)
        ratio = spread([b / a for a, b in zip(together, apart, strict=True)], 2)
        hourly = 3600 * runs / (median(together) * total / count)
        share = runs * flop / median(together) / max(rate, gemm())
        print(
            f"{runs:>3} {spread(together, 2):>18} {spread(apart, 2):>18} {ratio:>17} "
            f"{hourly:>9.1f} {share:>10.0%} {median(peaks):>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
