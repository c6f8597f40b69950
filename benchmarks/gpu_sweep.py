"""Time a sweep on a GPU as a whole command, beside one run with Hugging Face Trainer.

    python benchmarks/gpu_sweep.py
    python benchmarks/gpu_sweep.py --size tiny --rows 64 --seeds 2   # on a CPU, as a trial

The sweep trains a random bert-base on rows of RTE's number and lengths. Another command trains one
of its runs with Trainer (it needs accelerate) and scores it as often. `gpu.sh` runs the program.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import transformers
from common import ROOT, SIZES, examples, pick_device, random_model, train_biases
from gpu_commands import run_glue
from peers import arguments

from bitfit.data import splits
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import tokenize
from bitfit.model import loading


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="bert-base", choices=SIZES)
    parser.add_argument("--rows", type=int, default=2490, help="training rows")
    parser.add_argument("--seeds", type=int, default=20, help="runs of the sweep")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--trainer", nargs=2, help=argparse.SUPPRESS)  # model and data: one run
    return parser.parse_args()


def write_data(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Write a random model and rows of RTE's lengths; returns (model folder, data folder)."""
    transformers.logging.disable_progress_bar()
    source = str(ROOT / "examples/tiny_bert")
    model, data = folder / args.size, folder / "data"
    random_model(args.size).save_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(model)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rng = np.random.default_rng(0)
    (data / "RTE").mkdir(parents=True)
    for split, rows in (("train", args.rows), ("dev", max(16, args.rows // 9))):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for row in range(rows):
            length = int(np.clip(rng.gamma(6, 66 / 6), 12, 128)) - 3
            texts = [" ".join(rng.choice(words, size)) for size in (length - 5, 5)]
            lines.append("\t".join([str(row), *texts, ("entailment", "not_entailment")[row % 2]]))
        (data / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(model), str(data)


def train_with_trainer(args: argparse.Namespace) -> None:
    """Do the work of one command with Trainer: load, train one run, score it after each epoch."""
    model_folder, data = args.trainer
    tokenizer = loading.load_tokenizer(model_folder)
    train, dev = (
        examples(tokenize(splits.read_split(TASKS["rte"], split, data), tokenizer, 128))
        for split in ("train", "validation")
    )
    model, _ = loading.load_model(model_folder, TASKS["rte"])
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(16, "bf16", folder, pick_device())
        settings.num_train_epochs, settings.eval_strategy = float(args.epochs), "epoch"
        settings.per_device_eval_batch_size = 128
        trainer = transformers.Trainer(
            model=train_biases(model), args=settings, train_dataset=train, eval_dataset=dev,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {
                "accuracy": np.mean(output.predictions.argmax(-1) == output.label_ids)
            },
        )  # fmt: skip
        trainer.train()


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Time a sweep as one command, one of its runs, and one run with Trainer."""
    model, data = write_data(args, folder)
    flags = ["--task-name", "rte", "--data-dir", data, "--model-name", model, "--fine-tune-type",
             "bitfit", "--learning-rate", "1e-4", "--epochs", args.epochs, "--batch-size", "16",
             "--quiet"]  # fmt: skip
    seconds = {}
    for runs in dict.fromkeys((args.seeds, 1)):
        begin = time.perf_counter()
        run_glue(folder / f"sweep{runs}", *flags, "--seed", *map(str, range(runs)), threads=None)
        seconds[runs] = time.perf_counter() - begin
        path = next((folder / f"sweep{runs}").rglob("metrics.json"))
        share = json.loads(path.read_text())["seconds"]
        print(f"{args.size}, {args.rows} rows, {args.epochs} epochs, {runs} runs: "
              f"{seconds[runs]:.1f} s as a whole command; of it, for each run: {share}",
              flush=True)  # fmt: skip
    words = [sys.executable, __file__, "--trainer", model, data, "--epochs", args.epochs]
    begin = time.perf_counter()
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    trainer = time.perf_counter() - begin
    if result.returncode:
        print(f"Trainer is left out: {result.stderr.strip().splitlines()[-1]}")
        return
    print(f"Trainer, 1 run: {trainer:.1f} s as a whole command. So {args.seeds} of them take "
          f"{args.seeds * trainer / seconds[args.seeds]:.1f} times as long as one sweep, and one "
          f"{trainer / seconds[1]:.1f} times as long as one run")  # fmt: skip


def main() -> None:
    args = parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.trainer:
        train_with_trainer(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
