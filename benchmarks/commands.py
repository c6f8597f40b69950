"""Compare a sweep as one command with its runs as single commands, in wall-clock time.

    python benchmarks/commands.py --data-dir <GLUE folder> --model-name <folder>

Runs `run_glue.py` with all learning rates and seeds, then once for each pair of them, with the same
flags, and compares their wall-clock seconds. Each side runs `--rounds` times.
"""

import argparse
import sys
import tempfile

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


def parse_args() -> argparse.Namespace:
    parser = make_command_parser(__doc__)
    parser.add_argument("--learning-rates", nargs="+", default=["1e-4", "4e-4", "7e-4", "1e-3"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2", "3", "4"])
    parser.add_argument("--train-size", default="2000")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--train-score-rows", help="as for run_glue.py; None: score all")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def sweep_seconds(args: argparse.Namespace, rates: list[str], seeds: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = [*command_flags(args), "--output-path", f"{folder}/out", "--fine-tune-type",
                 "bitfit", "--learning-rate", *rates, "--seed", *seeds]  # fmt: skip
        if args.train_score_rows:
            flags += ["--train-score-rows", args.train_score_rows]
        return command_seconds([sys.executable, str(ROOT / "run_glue.py"), *flags])


def main() -> None:
    args = parse_args()
    pairs = []
    for _ in range(args.rounds):
        sweep = sweep_seconds(args, args.learning_rates, args.seeds)
        grid = [([rate], [seed]) for rate in args.learning_rates for seed in args.seeds]
        pairs.append((sum(sweep_seconds(args, *pair) for pair in grid), sweep))
    apart, together = (spread([pair[i] for pair in pairs]) for i in (0, 1))
    scored = "all" if args.train_score_rows is None else args.train_score_rows
    print(
        f"{args.task_name}, {args.train_size} rows, {scored} of them scored, {args.epochs} epochs, "
        f"{args.precision}, {machine(pick_device())}\n"
        f"{len(grid)} commands {apart} s | one sweep {together} s | ratio {ratio(pairs)}"
    )


if __name__ == "__main__":
    main()
