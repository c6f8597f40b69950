"""Compare our training loop with Hugging Face Trainer, on the same examples in one process.

    pip install accelerate
    python benchmarks/peers.py --task-name cola --data-dir <GLUE folder> --model-name <folder>
    python benchmarks/peers.py --task-file examples/tagging/toy-pos.json --model-name <folder>

Trainer gets its best flags: length grouping, bf16 autocast, the fused AdamW, no logging and no
checkpoints. Both train the same parameters (all biases and the classifier) on the same examples at
the same batch size and rate, in turn (A B A B ...), after a warm-up; K runs of ours in one pass
are compared with K runs of Trainer. The clock covers training alone, without loading, tokenizing
and scoring.

Not the same: Trainer and vmap group examples of similar length, which saves padding (more so with
more --rows). Our loop draws batches at random, as the released code does, and has no padding.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch
import transformers
from common import (
    Ours,
    examples,
    flop_of,
    gemm_rate,
    make_parser,
    ratio,
    setup,
    spread,
    train_biases,
)
from parallel_peers import Epoch, Processes, make_vmap
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfit.data.tokens import TokenizedSplit

PEERS = ("trainer", "vmap", "processes")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=512)
    parser.add_argument("--task-file", help="instead of --task-name, such as a tagging task's")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--datasets", action="store_true",
                        help="Trainer reads a datasets.Dataset, as in its examples, not a list: "
                             "slower")  # fmt: skip
    return parser.parse_args()


def arguments(
    batch_size: int, precision: str, folder: str, device: torch.device
) -> transformers.TrainingArguments:
    """Return Trainer's best flags."""
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    new = "train_sampling_strategy" in known
    grouping = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    return transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1,
        learning_rate=1e-4, weight_decay=0.0, adam_epsilon=1e-6, lr_scheduler_type="constant",
        max_grad_norm=1.0, optim="adamw_torch_fused", bf16=precision == "bf16", report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda", **grouping,
    )  # fmt: skip


def make_trainer(
    make_model: Callable[[], PreTrainedModel],
    tokens: TokenizedSplit,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    as_dataset: bool = False,
) -> Callable[[str], float]:
    """Return a function that trains one epoch with Trainer and returns its seconds.

    It needs a new model every time, since Trainer wraps the forward pass of its model.
    """
    rows, device = examples(tokens), tokens.ids.device
    is_tagging = tokens.word_index is not None
    collator = (
        transformers.DataCollatorForTokenClassification
        if is_tagging
        else transformers.DataCollatorWithPadding
    )
    if as_dataset:
        import datasets

        rows = [row | {"length": len(row["input_ids"])} for row in rows]
        rows = datasets.Dataset.from_list(rows)

    def epoch(precision: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(
                model=train_biases(make_model()),
                args=arguments(batch_size, precision, folder, device=device),
                train_dataset=rows,
                data_collator=collator(tokenizer),
            )
            trainer.remove_callback(transformers.PrinterCallback)
            return trainer.train().metrics["train_runtime"]

    return epoch


def single_run(args: argparse.Namespace) -> Ours:
    """Return one run of ours, in a separate process."""
    with contextlib.redirect_stdout(None):
        task, _, make_model, tokens, _ = setup(args)
    model = make_model().to(tokens.ids.device)
    return Ours(model, tokens, task, batch_size=args.batch_size, runs=1)


def measure(args: argparse.Namespace, runs: int) -> None:
    """Time K runs of ours and of each peer in turn, and print examples per second and ratios."""
    task, tokenizer, make_model, tokens, _ = setup(args)
    device, count, flop = tokens.ids.device, len(tokens.lengths), flop_of(make_model(), tokens)
    ours = Ours(make_model().to(device), tokens, task, batch_size=args.batch_size, runs=runs)
    trainer = make_trainer(
        make_model, tokens, tokenizer, batch_size=args.batch_size, as_dataset=args.datasets
    )
    peers: dict[str, Epoch] = {
        "trainer": lambda precision: sum(trainer(precision) for _ in range(runs))
    }
    if "vmap" in args.peers:
        peers["vmap"] = make_vmap(make_model, tokens, args.batch_size, runs=runs)
    if "processes" in args.peers:
        processes = Processes(functools.partial(single_run, args), runs)
        peers["processes"] = processes.epoch
    chosen = {name: peers[name] for name in args.peers}
    for precision in args.precision:
        for epoch in (ours.epoch, *chosen.values()):
            epoch(precision)
        times: dict[str, list[float]] = {name: [] for name in ("ours", *chosen)}
        rates = []
        for _ in range(args.rounds):
            rates.append(gemm_rate(precision, device))
            times["ours"].append(ours.epoch(precision))
            rates.append(gemm_rate(precision, device))
            for name, epoch in chosen.items():
                times[name].append(epoch(precision))
        speeds = {name: spread([runs * count / t for t in taken]) for name, taken in times.items()}
        share = runs * flop / statistics.median(times["ours"]) / max(rates)
        print(
            f"{precision} {runs:>2} runs: ours {speeds['ours']} ex/s, {share:.0%} of the GEMM rate"
        )
        for name in chosen:
            pairs = zip(times[name], times["ours"], strict=True)
            print(f"    {name} {speeds[name]} ex/s | ratio {ratio(pairs)}", flush=True)


def main() -> int:
    args = parse_args()
    if "trainer" in args.peers and importlib.util.find_spec("accelerate") is None:
        print("peers.py: error: Trainer needs accelerate: pip install accelerate", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    for runs in args.runs:
        measure(args, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
