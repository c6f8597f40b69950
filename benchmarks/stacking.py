"""Compare K runs in one pass with the same K runs one after the other, in one process.

    python benchmarks/stacking.py --task-name rte --data-dir <GLUE folder> --model-name <folder>

For each K both are trained in turn (A B A B ...), after a warm-up of each. The clock covers
training alone: no loading, tokenizing or scoring. A run is one pass over the task's training rows;
runs/hour is scaled up from the rows that were trained. The share of the machine's GEMM rate is 4 x
the encoder's matrix weights x tokens / seconds (forward, and backward of the inputs), divided by
the rate of a product of 2048 x 2048 matrices in the same minute. Without --model-name a random
encoder of MiniLM-L6's size (22M) is used.
"""

import argparse
from statistics import median

import torch
from common import (
    Ours,
    flop_of,
    gemm_rate,
    make_parser,
    ratio,
    setup,
    spread,
)

from bitfit.tracking.tracker import peak_gib


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=64)
    parser.add_argument("--task-file", help="instead of --task-name, such as a tagging task's")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--max-tokens", type=int, help="None: the device's default")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    task, _, make_model, tokens, total = setup(args)
    device, count = tokens.ids.device, len(tokens.lengths)
    flop = flop_of(make_model(), tokens)
    print(f"{'K':>3} {'together: s':>18} {'one by one: s':>18} {'ratio':>17} {'runs/hour':>9} "
          f"{'GEMM share':>10} {'peak GiB':>8}")  # fmt: skip

    def make_runs(count: int) -> Ours:
        return Ours(make_model().to(device), tokens, task, batch_size=args.batch_size, runs=count,
                    max_tokens=args.max_tokens)  # fmt: skip

    single = make_runs(1)
    for runs in args.runs:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stack = make_runs(runs)
        for warmed in (stack, single):
            warmed.epoch(args.precision)
        pairs, rates = [], []
        for _ in range(args.rounds):
            rates.append(gemm_rate(args.precision, device))
            stacked = stack.epoch(args.precision)
            pairs.append((sum(single.epoch(args.precision) for _ in range(runs)), stacked))
        apart, together = ([pair[i] for pair in pairs] for i in (0, 1))
        hourly = 3600 * runs / (median(together) * total / count)
        share = runs * flop / median(together) / max(rates)
        print(
            f"{runs:>3} {spread(together, 2):>18} {spread(apart, 2):>18} {ratio(pairs):>17} "
            f"{hourly:>9.1f} {share:>10.0%} {peak_gib(device):>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
