"""Fine-tune and score a BERT-family model on a GLUE task, bias terms only (BitFit) or otherwise.

    python run_glue.py --output-path out/rte --task-name rte --fine-tune-type bitfit

Flags in, checks, a GLUEvaluator, files out. Bad input ends with status 2 and one line.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import utils
from bitfit.tasks import TASKS
from bitfit.trainable import FINE_TUNE_TYPES, TERMS
from utils import Diverged, UserError


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; `-h` has the rest."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from `low` (or above it) up to `high`."""
    rule = f"{'above' if above else 'at least'} {low}"
    rule += f" and below {high}" if high < math.inf else ""
    name = {int: "whole number", float: "number"}[kind]

    def parse(word):
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value < high:
            raise argparse.ArgumentTypeError(f"{word!r} is not a {name} {rule}")
        return value

    return parse


def gpu(word):
    if word == "cpu":
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a GPU number nor `cpu`") from None


def make_parser():
    # fmt: off
    parser = OneLineParser(prog="run_glue.py", allow_abbrev=False,
                           description=__doc__.splitlines()[0])
    positive = number(int, 1, 2**31)

    add = parser.add_argument_group("what to run").add_argument
    add("--output-path", "-o", metavar="DIR", required=True,
        help="new or empty folder for the results")
    add("--task-name", "-t", metavar="TASK", required=True, choices=TASKS,
        help=f"one of {', '.join(TASKS)}")
    add("--model-name", "-m", metavar="MODEL", default="bert-base-cased",
        help="name on the Hugging Face Hub, or a folder [%(default)s]")
    add("--fine-tune-type", "-f", metavar="TYPE", required=True, choices=FINE_TUNE_TYPES,
        help=f"what trains: one of {', '.join(FINE_TUNE_TYPES)}")
    add("--bias-terms", metavar="TERM", nargs="+", choices=[*TERMS, "all"],
        help=f"for bitfit: all, or some of {', '.join(TERMS)} [all]")
    add("--mask-size", metavar="N", type=positive,
        help="for rand_uniform: how many encoder parameters are drawn [100000 for bert-base, "
             "280000 for bert-large, 105000 for roberta-base, else as many as bitfit trains]")
    add("--random-encoder", action="store_true",
        help="a control: draw the encoder's weights at random instead of loading them [off]")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR",
        help="a folder with GLUE's own TSV folders (RTE/train.tsv) or with Parquet files "
             "(rte/train-*.parquet) [nyu-mll/glue from the Hub]")
    add("--max-seq-length", metavar="N", type=positive, default=128,
        help="longer rows are cut to so many tokens [%(default)s]")
    add("--train-size", metavar="N", type=positive,
        help="train on so many rows, drawn by the seed [all]")

    add = parser.add_argument_group("training").add_argument
    add("--learning-rate", "-l", metavar="LR", type=number(float, 0, above=True), default=1e-3,
        help="usual: 1e-4 to 1e-3 for bias terms, 1e-5 to 5e-5 for full_ft [%(default)s]")
    add("--epochs", "-e", metavar="N", type=positive, default=16,
        help="passes over the training rows [%(default)s]")
    add("--batch-size", "-b", metavar="N", type=positive, default=8,
        help="rows per optimizer step [%(default)s]")
    add("--optimizer", choices=("adamw", "adam"), default="adamw",
        help="adamw has weight decay 0 and eps 1e-6, as in the released code [%(default)s]")
    add("--lr-schedule", choices=("constant", "linear"), default="constant",
        help="linear falls to 0 at the last step [%(default)s]")
    add("--warmup-ratio", metavar="R", type=number(float, 0, 1), default=0.0,
        help="share of all steps over which the learning rate first rises [%(default)s]")
    add("--seed", "-s", metavar="N", type=number(int, 0, 2**63), default=0,
        help="draws the classifier, data order, dropout and masks [%(default)s]")

    add = parser.add_argument_group("machine").add_argument
    add("--gpu-device", "-d", metavar="GPU", type=gpu,
        help="GPU number, or cpu [GPU 0 where there is one, else cpu]")
    add("--precision", choices=("fp32", "bf16"),
        help="bf16 multiplies in bfloat16; what trains stays float32 "
             "[bf16 on a GPU that has it, else fp32]")
    add("--no-tf32", action="store_true", help="fp32 on a GPU: multiply in full float32 [off]")

    add = parser.add_argument_group("results").add_argument
    add("--evaluation-frequency", metavar="N", type=positive, default=1,
        help="score every N epochs, and after the last [%(default)s]")
    add("--keep", choices=("last", "best"), default="last",
        help="the epoch whose weights are saved and predict; best is by the main validation "
             "score [%(default)s]")
    add("--save-evaluator", action="store_true",
        help="write evaluator/, for GLUEvaluator.load [off]")
    add("--export-model", action="store_true",
        help="write model/, a plain Hugging Face folder [off]")
    add("--predict-test", action="store_true",
        help="write the test predictions for the GLUE server [off]")
    add("--verbose", action="store_true", help="list the trained tensors [off]")
    # fmt: on
    return parser


def parse_args(argv=None):
    """The flags, and the checks that need no file."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.bias_terms and args.fine_tune_type != "bitfit":
        parser.error("--bias-terms goes with --fine-tune-type bitfit only: leave it out")
    if args.mask_size and args.fine_tune_type != "rand_uniform":
        parser.error("--mask-size goes with --fine-tune-type rand_uniform only: leave it out")
    return args


def check_output_path(path):
    """The output folder must be new or empty, and its place writable."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-path {path} is a file: give a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"--output-path {path} is not empty: give a new folder, nothing is replaced"
        )
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output-path {path} cannot be made in {nearest}: give another place")


def pick_device(choice):
    """--gpu-device -> GPU number or None for the CPU."""
    import torch

    if choice is None:
        return 0 if torch.cuda.is_available() else None
    return None if choice == "cpu" else choice


def prepare(args, device):
    """Read data and model and choose what trains; everything that can be wrong is found here."""
    from glue_evaluator import GLUEvaluator, set_seed

    set_seed(args.seed)
    evaluator = GLUEvaluator(
        args.task_name,
        args.model_name,
        device,
        seed=args.seed,
        data_dir=args.data_dir,
        precision=args.precision,
        random_encoder=args.random_encoder,
    )
    evaluator.preprocess_dataset(
        "longest", args.max_seq_length, args.batch_size, args.train_size, args.predict_test
    )
    masked = args.fine_tune_type in ("rand_uniform", "rand_row_col")
    terms = (args.bias_terms or ["all"]) if args.fine_tune_type == "bitfit" else []
    evaluator.training_preparation(
        args.learning_rate,
        args.optimizer,
        masked or args.fine_tune_type == "full_ft",
        evaluator.convert_to_actual_components(terms),
        args.verbose and not masked,
    )
    evaluator.verbose = args.verbose  # a mask is what trains: list that alone
    if args.fine_tune_type == "rand_uniform":
        evaluator.set_uniform_mask(args.mask_size)
    elif args.fine_tune_type == "rand_row_col":
        evaluator.set_row_and_column_random_mask()
    return evaluator


def commit():
    """The checkout's commit, or None where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def write_args(args, evaluator):
    """args.json: all flags, and what else the numbers depend on."""
    import datasets
    import torch
    import transformers

    on_gpu = evaluator.torch_device.type == "cuda"
    facts = vars(args) | {
        "precision": evaluator.precision,
        "device": torch.cuda.get_device_name(evaluator.torch_device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
    }
    Path(args.output_path).mkdir(parents=True, exist_ok=True)
    utils.write_text(Path(args.output_path) / "args.json", json.dumps(facts, indent=2) + "\n")


def run(args):
    check_output_path(args.output_path)
    all_local = args.data_dir is not None and Path(args.model_name).is_dir()
    utils.use_local_copies_when_offline(needs_hub=not all_local)
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = prepare(args, pick_device(args.gpu_device))
    write_args(args, evaluator)
    output = Path(args.output_path)
    evaluator.train_and_evaluate(
        args.epochs,
        output,
        args.evaluation_frequency,
        args.lr_schedule,
        args.warmup_ratio,
        args.keep,
    )
    if args.fine_tune_type == "bitfit":
        evaluator.plot_terms_changes(output / "bias_term_changes")
    if args.save_evaluator:
        evaluator.save(output / "evaluator")
    if args.export_model:
        evaluator.export_model(output / "model")
    if args.predict_test:
        evaluator.export_model_test_set_predictions(output)
    print(evaluator.score_table())


def main(argv=None):
    args = parse_args(argv)
    utils.setup_logging()
    try:
        run(args)
    except UserError as error:
        sys.stderr.write(f"run_glue.py: error: {error}\n")
        return 2
    except Diverged as error:
        sys.stderr.write(f"run_glue.py: stopped: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
