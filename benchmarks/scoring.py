"""Compare the scoring of K runs, as a training does it, with one run after the other.

    python benchmarks/scoring.py --task-name rte --data-dir <GLUE folder> --model-name <folder>

For each K both compute the logits of the validation examples of all runs, in turn (A B A B ...),
after a warm-up of each. Only frozen runs share an encoder pass, so the ratio of others is 1. Then
the scores of all runs are computed. Without --model-name a random encoder of MiniLM-L6's size (22M)
is used.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from common import Ours, find_task, load, machine, make_parser, pick_device, ratio, seconds, spread
from transformers import PreTrainedModel

from bitfit.data import splits
from bitfit.data.tasks import Task, score
from bitfit.data.tokens import TokenizedSplit, split_long_sentences, tokenize
from bitfit.model.precision import DTYPES
from bitfit.model.predict import predict, predict_runs


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=0)
    parser.add_argument("--task-file", help="instead of --task-name, such as a tagging task's")
    parser.add_argument("--fine-tune-type", default="bitfit", choices=("bitfit", "frozen"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 8, 20])
    return parser.parse_args()


def read_validation(
    args: argparse.Namespace, task: Task, data_dir: str | Path | None
) -> tuple[TokenizedSplit, Callable[[], PreTrainedModel]]:
    """Return (validation tokens, function that makes the model)."""
    tokenizer, make_model = load(args, task)
    texts = splits.read_split(task, task.validation_splits[0], data_dir)
    texts = texts.take(np.arange(min(args.rows or len(texts), len(texts))))
    if task.is_tagging:
        texts = split_long_sentences(texts, tokenizer, 128)
    return tokenize(texts, tokenizer, 128).to(pick_device()), make_model


def both(
    ours: Ours, tokens: TokenizedSplit, task: Task, precision: str
) -> tuple[Callable[[], dict], Callable[[], dict], Callable[[dict], list]]:
    """Return functions: logits one by one, logits as in training, scores of {run: logits}."""
    plan, stack = ours.plan_in(DTYPES[precision]), ours.stack
    every = np.arange(len(tokens.lengths))

    def one_by_one() -> dict:
        logits = {}
        for run in range(len(stack.runs)):
            stack.load_run(run)
            logits[run] = predict(plan.forward, tokens, plan.token_budget)
        return logits

    def as_in_training() -> dict:
        rows = dict.fromkeys(range(len(stack.runs)), every)
        return dict(predict_runs(plan.forward, stack, tokens, budget=plan.token_budget, rows=rows))

    def scores(logits: dict) -> list:
        labels, sentences = tokens.labels_of(every), tokens.sentences_of(every)
        return [score(task, of_run, labels, sentences=sentences) for of_run in logits.values()]

    return one_by_one, as_in_training, scores


def main() -> None:
    args = parse_args()
    task, data_dir = find_task(args)
    tokens, make_model = read_validation(args, task, data_dir)
    device = tokens.ids.device
    print(
        f"{task.name}, {len(tokens.lengths)} validation examples, {args.fine_tune_type}, "
        f"{args.rounds} rounds: median (range), {machine(device)}\n{'K':>3} {'':>4} "
        f"{'one by one: s':>18} {'as in training: s':>18} {'ratio':>17} {'scores: s':>9}"
    )
    for precision in args.precision:
        for runs in args.runs:
            ours = Ours(make_model().to(device), tokens, task, batch_size=args.batch_size,
                        runs=runs, method=args.fine_tune_type)  # fmt: skip
            apart, together, scores = both(ours, tokens, task=task, precision=precision)
            with ours.stack.patched(DTYPES[precision]):
                found, expected = together(), apart()
                assert all(np.abs(found[k] - expected[k]).max() < 0.1 for k in expected)
                pairs = [(seconds(apart, device), seconds(together, device))
                         for _ in range(args.rounds)]  # fmt: skip
                scoring = median(seconds(partial(scores, found), device) for _ in range(3))
            first, second = (spread([pair[i] for pair in pairs], 3) for i in (0, 1))
            print(f"{runs:>3} {precision} {first:>18} {second:>18} {ratio(pairs):>17} "
                  f"{scoring:>9.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
