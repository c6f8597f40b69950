"""Compare our training loop with Hugging Face Trainer, on the same examples in one process.

    pip install accelerate
    python benchmarks/peers.py --task-name cola --data-dir <GLUE folder> --model-name <folder>
    python benchmarks/peers.py --task-file examples/tagging/toy-pos.json --model-name <folder>

Trainer gets its best flags: length grouping, bf16 autocast, the fused AdamW, no logging and no
checkpoints. Both train the same parameters (all biases and the classifier) on the same examples at
the same batch size and rate, in turn (A B A B ...), after a warm-up; K runs of ours in one pass
are compared with K runs of Trainer. The clock covers training alone, without loading, tokenizing
and scoring.

Not the same: Trainer groups examples of similar length, which saves padding (more so with more
--rows). Our loop draws batches at random, as the released code does, and has no padding.
"""

import argparse
import dataclasses
import importlib.util
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfit.data.tokens import TokenizedSplit


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=512)
    parser.add_argument("--task-file", help="instead of --task-name, such as a tagging task's")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 8])
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


def main() -> int:
    args = parse_args()
    if importlib.util.find_spec("accelerate") is None:
        print("peers.py: error: Trainer needs accelerate: pip install accelerate", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    task, tokenizer, make_model, tokens, _ = setup(args)
    device, count = tokens.ids.device, len(tokens.lengths)
    trainer = make_trainer(
        make_model, tokens, tokenizer, batch_size=args.batch_size, as_dataset=args.datasets
    )
    flop = flop_of(make_model(), tokens)
    for runs in args.runs:
        ours = Ours(make_model().to(device), tokens, task, batch_size=args.batch_size, runs=runs)
        for precision in args.precision:
            ours.epoch(precision)
            trainer(precision)
            pairs, rates = [], []
            for _ in range(args.rounds):
                rates.append(gemm_rate(precision, device))
                epoch = ours.epoch(precision)
                rates.append(gemm_rate(precision, device))
                pairs.append((sum(trainer(precision) for _ in range(runs)), epoch))
            theirs, mine = (spread([runs * count / pair[i] for pair in pairs]) for i in (0, 1))
            share = runs * flop / sorted(b for _, b in pairs)[len(pairs) // 2] / max(rates)
            print(
                f"{precision} {runs:>2} runs: Trainer {theirs} ex/s | ours {mine} ex/s, "
                f"{share:.0%} of the GEMM rate | ratio {ratio(pairs)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
