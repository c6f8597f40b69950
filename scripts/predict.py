"""Predict texts with several saved evaluators of one base model, in one pass over the encoder.

    python scripts/predict.py out/cola/evaluator out/rte/evaluator --input texts.tsv

A line of input is a text, or two texts with a tab between them. A line of output is a JSON object
with one entry per evaluator, written as soon as the batch is predicted. Evaluators of tagging tasks
read words with blanks between them, or files of sentences with --output.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from bitfit.signals import catch_signals, exit_with_status

if __name__ == "__main__":
    catch_signals("predict.py")

import argparse
import json
import logging
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

import utils
from bitfit.cli import exit_status
from bitfit.model import hub
from bitfit.options import add_machine
from bitfit.parsing import POSITIVE, OneLineParser
from utils import UserError


def make_parser() -> OneLineParser:
    description = __doc__.splitlines()[0]
    parser = OneLineParser(prog="predict.py", allow_abbrev=False, description=description)
    add = parser.add_argument
    # fmt: off
    add("evaluators", nargs="+", metavar="EVALUATOR",
        help="saved evaluators: the folder evaluator/ of runs with --save-evaluator")
    add("--input", "-i", metavar="FILE", default="-",
        help="file with one text per line, or two with a tab between; -: standard input [-]")
    add("--output", "-o", metavar="FILE",
        help="for taggers: write the sentences of --input with their tags, in its format")
    add("--batch-size", "-b", metavar="N", type=POSITIVE, default=32,
        help="lines per batch; 1 answers each line immediately [%(default)s]")
    add("--model-name", "-m", metavar="MODEL",
        help="the base model, if it has moved [as in training]")
    add("--max-seq-length", metavar="N", type=POSITIVE,
        help="cut longer texts to N tokens [as in training]")
    add_machine(parser.add_argument_group("machine").add_argument)
    # fmt: on
    return parser


def open_input(path: str) -> AbstractContextManager[BinaryIO]:
    if path == "-" and sys.stdin is None:
        raise UserError("standard input is closed: give --input FILE")
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror}") from None


def run(args: argparse.Namespace) -> None:
    with open_input(args.input) as lines:
        from bitfit.model.precision import DTYPES
        from bitfit.tools import answers, multi_task

        found = multi_task.read_evaluators(args.evaluators, args.model_name)
        tasks = [evaluator.task for evaluator in found]
        table = answers.read_words(tasks, args.input, args.output)
        local = hub.is_local(found[0].metadata["model_name"])
        hub.use_local_copies_when_offline(needs_hub=not local)
        import torch

        device = utils.choose_device(utils.resolve_gpu(args.gpu_device))
        dtype = DTYPES[utils.choose_precision(args.precision, device)]
        if not args.no_tf32 and torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")
        predictor = multi_task.load_predictor(
            found, device, dtype, max_length=args.max_seq_length, max_tokens=args.max_tokens
        )
        name = "standard input" if args.input == "-" else args.input
        with predictor.stack.patched(dtype):
            if table:
                answers.write_predicted_tags(predictor, table, args.output)
                return
            for rows in answers.read_batches(predictor, lines, args.batch_size, name=name):
                answered = answers.predict_answers(predictor, rows)
                utils.print_result("\n".join(map(json.dumps, answered)))


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    utils.setup_logging(logging.WARNING)
    less_memory = " (a lower --max-tokens needs less)"
    return exit_status.run_cli("predict.py", lambda signals: run(args), less_memory=less_memory)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # End silently, as other filters do.
    exit_with_status(main())
