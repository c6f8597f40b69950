"""A whole sweep as one command beside its single commands: start-up, training, scoring, files.

    python benchmarks/commands.py --data-dir <GLUE folder> --model-name <folder>

Runs `run_glue.py` with all learning rates and seeds, then once for each pair of them, with the same
flags, and compares their wall-clock seconds. Each side runs `--rounds` times.
"""

import argparse
import sys
import tempfile

from common import ROOT, command_seconds, machine, pick_device, ratio, spread


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task-name", default="cola")
    parser.add_argument("--data-dir", default=str(ROOT / "examples/glue"))
    parser.add_argument("--model-name", default=str(ROOT / "examples/tiny_bert"))
    parser.add_argument("--learning-rates", nargs="+", default=["1e-4", "4e-4", "7e-4", "1e-3"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2", "3", "4"])
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--train-size", default="2000")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--batch-size", default="16")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def sweep_seconds(args, rates, seeds):
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--output-path", f"{folder}/out", "--task-name", args.task_name,
            "--data-dir", args.data_dir, "--model-name", args.model_name,
            "--fine-tune-type", "bitfit", "--precision", args.precision,
            "--train-size", args.train_size, "--epochs", args.epochs,
            "--batch-size", args.batch_size, "--learning-rate", *rates, "--seed", *seeds,
        ]  # fmt: skip
        return command_seconds([sys.executable, str(ROOT / "run_glue.py"), *flags])


def main():
    args = parse_args()
    pairs = []
    for _ in range(args.rounds):
        together = sweep_seconds(args, args.learning_rates, args.seeds)
        grid = [([rate], [seed]) for rate in args.learning_rates for seed in args.seeds]
        pairs.append((sum(sweep_seconds(args, *pair) for pair in grid), together))
    apart, together = (spread([pair[i] for pair in pairs]) for i in (0, 1))
    print(
        f"{args.task_name}, {args.train_size} rows, {args.epochs} epochs, {args.precision}, "
        f"{machine(pick_device())}\n{len(grid)} commands {apart} s | one sweep {together} s | "
        f"ratio {ratio(pairs)}"
    )


if __name__ == "__main__":
    main()
