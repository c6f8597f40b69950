"""Answer text with several saved evaluators of one base model, all in one pass over its encoder.

    python scripts/predict.py out/cola/evaluator out/rte/evaluator --input texts.tsv

A line of input is a text, or two with a tab between them; a line of output is a JSON object with an
entry for each evaluator, written as soon as its batch is answered.
"""

import json
import logging
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from bitfit.flags import POSITIVE, OneLineParser, add_machine
from utils import UserError


def make_parser():
    parser = OneLineParser(
        prog="predict.py", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    # fmt: off
    add("evaluators", nargs="+", metavar="EVALUATOR",
        help="folders that run_glue.py --save-evaluator wrote, evaluator/ of a run")
    add("--input", "-i", metavar="FILE", default="-",
        help="a text, or two with a tab between, on each line; -: standard input [-]")
    add("--batch-size", "-b", metavar="N", type=POSITIVE, default=32,
        help="lines that are read before they are answered; 1: each at once [%(default)s]")
    add("--model-name", "-m", metavar="MODEL",
        help="where the base model is now [where it was in training]")
    add("--max-seq-length", metavar="N", type=POSITIVE,
        help="longer rows are cut to so many tokens [as each evaluator's were in training]")
    add_machine(parser.add_argument_group("machine").add_argument)
    # fmt: on
    return parser


def opened(path):
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror}") from None


def run(args):
    with opened(args.input) as lines:
        from bitfit import answers, together
        from glue_evaluator import DTYPES

        found = together.read(args.evaluators, args.model_name)
        local = Path(found[0][1]["model_name"]).is_dir()
        utils.use_local_copies_when_offline(needs_hub=not local)
        import torch

        device = utils.choose_device(utils.gpu_of(args.gpu_device))
        precision = args.precision or utils.default_precision(device)
        dtype = DTYPES[precision]
        if not args.no_tf32 and torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")
        many = together.load(found, device, dtype, args.max_seq_length, args.max_tokens)
        name = "standard input" if args.input == "-" else args.input
        with many.stack.bound(dtype):
            for rows in answers.batches(many, lines, args.batch_size, name):
                told = map(json.dumps, answers.answers(many, rows))
                print("\n".join(told), flush=True)


def main(argv=None):
    args = make_parser().parse_args(argv)
    utils.setup_logging(logging.WARNING)
    try:
        run(args)
        return 0
    except UserError as error:
        status, said = 2, f"error: {error}"
    except (OSError, MemoryError, RuntimeError) as error:
        out_of_memory = utils.is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        what = "out of memory (a lower --max-tokens needs less): " * out_of_memory
        status, said = 1, f"stopped: {what}{utils.one_line(error)}"
    print(f"predict.py: {said}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):  # end as other filters do, without a word
        signal.signal(number, signal.SIG_DFL)
    sys.exit(main())
