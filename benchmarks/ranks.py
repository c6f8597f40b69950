"""Compare a command over two ranks of torchrun with the same command in one process, on CPUs.

    python benchmarks/ranks.py --data-dir <GLUE folder> --model-name <folder>

Compares two ranks with one thread each and one process with two threads, in turn (A B A B ...), for
a sweep of eight runs (each rank trains some runs) and for one run (each rank trains some examples).
Prints seconds and ratios of training alone (metrics.json of the slowest rank), and of the whole
command with start-up, scoring and files. Then every case is repeated for one epoch under torch's
profiler, which records the shape and type of the arguments of all collectives; these give the bytes
per step.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from common import (
    ROOT,
    command_flags,
    command_seconds,
    machine,
    make_command_parser,
    pick_device,
    ratio,
    spread,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CASES = {
    "sweep of 8": ["--fine-tune-type", "bitfit", "--seed", *"01234567"],
    "one bitfit": ["--fine-tune-type", "bitfit"],
    "one full_ft": ["--fine-tune-type", "full_ft", "--learning-rate", "5e-5"],
}
BYTES = {"float": 4, "double": 8, "unsigned char": 1, "long int": 8}


def parse_args() -> argparse.Namespace:
    parser = make_command_parser(__doc__)
    parser.add_argument("--train-size", default="512")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    return parser.parse_args()


def flags_of(args: argparse.Namespace, case: str) -> list[str]:
    return [*command_flags(args), "--gpu-device", "cpu", *CASES[case]]


def measure(start: list[str], threads: int, flags: list[str]) -> tuple[float, float]:
    """Return (seconds of training, seconds of the whole command)."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*start, str(ROOT / "run_glue.py"), *flags, "--output-path", f"{folder}/out"]
        whole = command_seconds(words, threads)
        by_rank: dict[int, float] = defaultdict(float)
        for path in Path(folder).rglob("metrics.json"):
            rank = json.loads(path.with_name("args.json").read_text())["trained_by"][0]
            by_rank[rank] += json.loads(path.read_text())["seconds"]["training"]
    return max(by_rank.values()), whole


def traffic(args: argparse.Namespace, case: str) -> dict[tuple[str, int], int]:
    """Return {(collective, bytes of its argument): calls} of rank 0 in one epoch."""
    flags = flags_of(args, case)
    flags[flags.index("--epochs") + 1] = "1"
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        words = [*TORCHRUN, __file__, "--profile", str(trace), *flags, "-o", f"{folder}/out"]
        command_seconds(words, threads=1)
        events = json.loads(trace.read_text())["traceEvents"]
    calls: dict[tuple[str, int], int] = defaultdict(int)
    for event in events:
        if event.get("name", "").startswith("gloo:"):
            kinds, shapes = event["args"]["Input type"], event["args"]["Input Dims"]
            arguments = zip(kinds, shapes, strict=True)
            size = sum(BYTES[kind] * math.prod(shape) for kind, shape in arguments)
            calls[event["name"].removeprefix("gloo:"), size] += 1
    return calls


def profile(trace: str, flags: list[str]) -> int:
    """Run the program under torch's profiler, on each rank, for `traffic`."""
    import torch

    import run_glue

    with torch.profiler.profile(record_shapes=True) as profiler:
        status = run_glue.main(flags)
    if os.environ["RANK"] == "0":
        profiler.export_chrome_trace(trace)
    return status


def main() -> int:
    if sys.argv[1:2] == ["--profile"]:
        return profile(sys.argv[2], sys.argv[3:])
    args = parse_args()
    print(f"{args.task_name}, {args.train_size} rows, {args.epochs} epochs, {args.precision}, "
          f"{args.rounds} rounds: median (range), {machine(pick_device())}")  # fmt: skip
    for case in args.cases:
        pairs = []
        for _ in range(args.rounds):
            plain = measure([sys.executable], 2, flags_of(args, case))
            pairs.append((plain, measure(TORCHRUN, 1, flags_of(args, case))))
        for i, part in enumerate(("training", "command")):
            alone, split = ([side[i] for side in sides] for sides in zip(*pairs, strict=True))
            print(f"{case}, {part}: one process {spread(alone)} s | two ranks {spread(split)} s | "
                  f"ratio {ratio(zip(alone, split, strict=True))}", flush=True)  # fmt: skip
    steps = math.ceil(int(args.train_size) / int(args.batch_size))
    for case in args.cases:
        calls = traffic(args, case)
        print(f"{case}, one epoch of {steps} steps, a rank hands the communicator:")
        for (name, size), count in sorted(calls.items(), key=lambda item: -item[0][1]):
            print(f"  {count:>6} x {name} of {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
