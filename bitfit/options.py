"""The flags of run_glue.py and the checks that need no file, without importing torch."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitfit import parsing
from bitfit.halving_checks import check_halving
from bitfit.parsing import POSITIVE, AddFlag, OneLineParser, gpu, number
from bitfit.versions import ShowVersions, is_installed
from utils import as_list

# Higher modules have an entry for every name; a test compares them.
TASK_NAMES = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
FINE_TUNE_TYPES = ("full_ft", "bitfit", "frozen", "rand_uniform", "rand_row_col")
TRACKERS = ("tensorboard", "wandb", "mlflow")  # also the names of their packages
# term -> (parameter name relative to its layer, the paper's symbol), paper section 3
TERMS = {
    "query": ("attention.self.query.bias", "b_{q}"),
    "key": ("attention.self.key.bias", "b_{k}"),
    "value": ("attention.self.value.bias", "b_{v}"),
    "attention_output": ("attention.output.dense.bias", "b_{m_1}"),
    "attention_layernorm": ("attention.output.LayerNorm.bias", "b_{LN_1}"),
    "intermediate": ("intermediate.dense.bias", "b_{m_2}"),
    "output": ("output.dense.bias", "b_{m_3}"),
    "output_layernorm": ("output.LayerNorm.bias", "b_{LN_2}"),
}
BIAS_TYPES = ("bitfit", "full_ft", "rand_uniform")  # fine-tune types that train added biases
TRAINING_FLAGS = (  # without an effect on --evaluate-only
    "fine_tune_type", "bias_terms", "mask_size", "random_encoder", "train_size", "learning_rate",
    "epochs", "batch_size", "optimizer", "lr_schedule", "warmup_ratio", "seed", "init_seed",
    "data_seed", "checkpoint_every", "checkpoint_minutes", "evaluation_frequency", "keep",
    "halving", "save_evaluator", "export_model", "push_to_hub", "report_to", "verbose",
)  # fmt: skip
NO_TERMS = "none"  # in --bias-terms: only the classifier trains
DEFAULT_LEARNING_RATES = [1e-3]  # the released code's, for all fine-tune types
DEFAULT_SEEDS = [0]
RUN_AXES = ("learning_rate", "seed", "init_seed", "data_seed")  # a run for each combination
EXAMPLES = """\
examples:
  python run_glue.py -o out/rte -t rte -f bitfit -l 1e-3
      train the bias terms of bert-base on RTE
  python run_glue.py -o out/rte-sweep -t rte -f bitfit -l 1e-4 4e-4 1e-3 -s 0 1 2 3 4
      train fifteen runs in one pass
  python run_glue.py -o out/rte-full -t rte -f full_ft -l 3e-5
      train all parameters, which needs a lower learning rate
  python run_glue.py -o out/toy -t sst2 -m examples/tiny_bert --data-dir examples/glue -f bitfit
      use local files, without the Hub
  python run_glue.py -o out/cola -t cola -f bitfit --keep best --predict-test --resume
      resume if the output folder holds an interrupted run; write test predictions at the end
"""


@dataclass(frozen=True)
class RunOptions:
    """The flags of run_glue.py in the order of args.json; `-h` describes them."""

    output_path: str
    task_name: str | None
    task_file: str | None
    model_name: str
    model_revision: str | None
    fine_tune_type: str
    bias_terms: list[str] | list[list[str]] | None  # a list of lists if the flag is repeated
    mask_size: int | None
    random_encoder: bool
    add_biases: bool
    start_from: str | None
    data_dir: str | None
    max_seq_length: int
    train_size: int | None
    learning_rate: list[float]
    epochs: int
    halving: list[int] | None
    batch_size: int
    optimizer: str
    lr_schedule: str
    warmup_ratio: float
    seed: list[int]
    init_seed: list[int] | None
    data_seed: list[int] | None
    gpu_device: int | str | None
    precision: str | None
    max_tokens: int | None
    no_tf32: bool
    resume: bool
    checkpoint_every: int
    checkpoint_minutes: float
    evaluation_frequency: int
    train_score_rows: int | None
    keep: str
    save_evaluator: bool
    export_model: bool  # also with --push-to-hub
    push_to_hub: str | None
    predict_test: bool
    evaluate_only: bool
    report_to: list[str]
    verbose: bool
    quiet: bool

    @property
    def init_seeds(self) -> list[int]:
        return self.init_seed or self.seed

    @property
    def data_seeds(self) -> list[int] | None:
        """Return the data seeds of a grid of seeds; None: each run has a single seed."""
        return self.data_seed or (self.seed if self.init_seed else None)


# fmt: off

def add_what_to_run(add: AddFlag) -> None:
    add("--output-path", "-o", metavar="DIR", required=True,
        help="new or empty folder for the results; with --resume, that of the interrupted run")
    add("--task-name", "-t", metavar="TASK", choices=TASK_NAMES,
        help=f"one of {', '.join(TASK_NAMES)}")
    add("--task-file", metavar="FILE",
        help="instead of --task-name: a JSON file that describes a custom task; its data files are "
             "beside it or in --data-dir (docs/own-tasks.md)")
    add("--model-name", "-m", metavar="MODEL", default="bert-base-cased",
        help="name on the Hugging Face Hub, or a folder [%(default)s]")
    add("--model-revision", metavar="REV",
        help="tag, branch or commit of a model on the Hub [its main branch]")
    add("--fine-tune-type", "-f", metavar="TYPE", choices=FINE_TUNE_TYPES,
        help=f"what trains: one of {', '.join(FINE_TUNE_TYPES)}")
    add("--bias-terms", metavar="TERM", nargs="+", action=parsing.AppendWords,
        help=f"for bitfit: all, or some of {', '.join(TERMS)}; other models have other terms, see "
             "--list-bias-terms; repeat the flag for runs with other terms in the same pass, none "
             "trains the classifier alone [all]")
    add("--list-bias-terms", action="store_true", default=argparse.SUPPRESS,
        help="print the bias terms of --model-name, with --add-biases those that it adds, and exit")
    add("--mask-size", metavar="N", type=POSITIVE,
        help="for rand_uniform: number of encoder parameters to train [100000 for bert-base, "
             "280000 for bert-large, 105000 for roberta-base, else as many as bitfit trains]")
    add("--random-encoder", action="store_true",
        help="a control: draw the encoder's weights at random instead of loading them [off]")
    add("--add-biases", action="store_true",
        help="for a model without biases, such as ModernBERT: switch them on in its config; they "
             "are zero before training (docs/modern-encoders.md) [off]")
    add("--start-from", metavar="FOLDER",
        help="start all runs from the values of a saved evaluator, usually of another task such as "
             "MNLI: the evaluator's folder, or its run's (docs/warm-start.md) [the base model]")


def add_data(add: AddFlag) -> None:
    add("--data-dir", metavar="DIR",
        help="local data: a folder with GLUE's TSV files (RTE/train.tsv) or with Parquet files "
             "(rte/train-*.parquet) [nyu-mll/glue from the Hub]")
    add("--max-seq-length", metavar="N", type=POSITIVE, default=128,
        help="longer examples are cut to N tokens [%(default)s]")
    add("--train-size", metavar="N", type=POSITIVE,
        help="train on N examples, sampled with the data seed [all]")


def add_training(add: AddFlag) -> None:
    add("--learning-rate", "-l", metavar="LR", nargs="+", default=DEFAULT_LEARNING_RATES,
        type=number(float, 0, above=True),
        help="usual are 1e-4 to 1e-3 for bias terms; full_ft needs less: 1e-5 to 5e-5; several: "
             "a run for each [0.001]")
    add("--epochs", "-e", metavar="N", type=POSITIVE, default=16,
        help="passes over the training examples [%(default)s]")
    add("--halving", metavar="N", nargs="+", type=POSITIVE,
        help="after epoch N, the worse half of learning rates and sets of bias terms stops [off]")
    add("--batch-size", "-b", metavar="N", type=POSITIVE, default=8,
        help="training examples per optimizer step [%(default)s]")
    add("--optimizer", choices=("adamw", "adam"), default="adamw",
        help="adamw has weight decay 0 and eps 1e-6, as in the released code [%(default)s]")
    add("--lr-schedule", choices=("constant", "linear"), default="constant",
        help="linear: the learning rate falls to 0 at the last step [%(default)s]")
    add("--warmup-ratio", metavar="R", type=parsing.RATIO, default=0.0,
        help="fraction of all steps in which the learning rate rises from 0 [%(default)s]")
    add("--seed", "-s", metavar="N", nargs="+", type=parsing.SEED, default=DEFAULT_SEEDS,
        help="draws the classifier, data order, dropout and masks; several: a run for each, with "
             "every learning rate [0]")
    add("--init-seed", metavar="N", nargs="+", type=parsing.SEED,
        help="instead of --seed: draws the classifier and the parameters of random masks; several: "
             "a run for each, with every data seed and learning rate [0 with --data-seed]")
    add("--data-seed", metavar="N", nargs="+", type=parsing.SEED,
        help="instead of --seed: draws the examples, their order and dropout [0 with --init-seed]")


def add_machine(add: AddFlag) -> None:
    add("--gpu-device", "-d", metavar="GPU", type=gpu,
        help="GPU number, or cpu [GPU 0 if there is one, else cpu]")
    add("--precision", choices=("fp32", "bf16"),
        help="bf16 computes in bfloat16; trained parameters stay in float32 "
             "[bf16 on a GPU that supports it, else fp32]")
    add("--max-tokens", metavar="N", type=POSITIVE,
        help="the most tokens computed at once, for any batch size and number of runs; a lower "
             "limit needs less memory [2048 on a CPU, 65536 on a GPU]")
    add("--no-tf32", action="store_true", help="in fp32 on a GPU, multiply without TF32 [off]")


def add_results(add: AddFlag) -> None:
    add("--resume", action="store_true",
        help="continue the interrupted run in --output-path; give the same flags as before [off]")
    add("--checkpoint-every", metavar="N", type=number(int, 0), default=1,
        help="write a checkpoint every N epochs; 0: only by --checkpoint-minutes [%(default)s]")
    add("--checkpoint-minutes", metavar="M", type=number(float, 0, above=True), default=30.0,
        help="write a checkpoint M minutes after the last, also within an epoch [%(default)s]")
    add("--evaluation-frequency", metavar="N", type=POSITIVE, default=1,
        help="score every N epochs, and after the last [%(default)s]")
    add("--train-score-rows", metavar="N", type=parsing.COUNT,
        help="score N of a run's training examples, drawn by its data seed; 0: score the "
             "validation examples alone [all, at most 50000]")
    add("--keep", choices=("last", "best"), default="last",
        help="save and predict with the weights of the last epoch, or of the epoch with the best "
             "main validation score; in a sweep, best takes only the best run [%(default)s]")
    add("--save-evaluator", action="store_true",
        help="write evaluator/: the trained parameters, for GLUEvaluator.load and scripts/ [off]")
    add("--export-model", action="store_true",
        help="write model/, a plain Hugging Face folder with a model card [off]")
    add("--push-to-hub", metavar="NAME",
        help="export the model and upload it to the Hub under this name at the end [off]")
    add("--predict-test", action="store_true",
        help="write the predictions of the test set, in the GLUE server's format [off]")
    add("--evaluate-only", action="store_true",
        help="score the model of --model-name, or the evaluator of --start-from, without training, "
             "and write the same files [off]")
    add("--report-to", metavar="TRACKER", nargs="+", choices=TRACKERS, default=[],
        help=f"show losses and scores while training, in some of {', '.join(TRACKERS)} [off]")
    add("--verbose", action="store_true", help="list the trained parameters [off]")
    add("--quiet", "-q", action="store_true", help="print only warnings and the results [off]")

# fmt: on


GROUPS = {
    "what to run": add_what_to_run,
    "data": add_data,
    "training": add_training,
    "machine": add_machine,
    "results": add_results,
}


def make_parser(description: str) -> OneLineParser:
    parser = OneLineParser(
        prog="run_glue.py", allow_abbrev=False, description=description, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action=ShowVersions, nargs=0, default=argparse.SUPPRESS,
                        help="print the commit and the library versions")  # fmt: skip
    for title, add_flags in GROUPS.items():
        add_flags(parser.add_argument_group(title).add_argument)
    return parser


def parse_args(description: str, argv: Sequence[str] | None = None) -> RunOptions:
    """Return the flags, or exit with status 2 and one line if a flag is wrong."""
    parser = make_parser(description)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a word could go on
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    check_type(parser, args)
    if (args.task_name is None) == (args.task_file is None):
        parser.error("give one of --task-name (a GLUE task) and --task-file (a custom task)")
    if args.bias_terms and args.fine_tune_type != "bitfit":
        parser.error("--bias-terms goes with --fine-tune-type bitfit only: leave it out")
    if args.bias_terms == [NO_TERMS]:
        args.fine_tune_type, args.bias_terms = "frozen", None
    if args.add_biases and args.fine_tune_type not in BIAS_TYPES and not args.start_from:
        method = "--evaluate-only" if args.evaluate_only else args.fine_tune_type
        parser.error(f"--add-biases: {method} would leave the biases at zero: leave it out")
    check_grid(parser, args)
    check_halving(parser, args)
    if args.mask_size and args.fine_tune_type != "rand_uniform":
        parser.error("--mask-size goes with --fine-tune-type rand_uniform only: leave it out")
    if args.start_from and args.random_encoder:
        parser.error("--start-from has a trained encoder, --random-encoder none: give one of them")
    for kind in (kind for kind in args.report_to if not is_installed(kind)):
        parser.error(f"--report-to {kind} needs a package that is not there: pip install {kind}")
    if args.push_to_hub and args.keep != "best" and count_runs(vars(args)) > 1:
        parser.error("--push-to-hub takes one model of several runs: give --keep best too")
    args.export_model = args.export_model or args.push_to_hub is not None
    return RunOptions(**vars(args))


def flag_words(values: dict[str, Any]) -> list[str]:
    """Return the words of a command with {option: value}; None, False and [] are left out."""
    words: list[str] = []
    for name, value in ((n, part) for n, v in values.items() for part in parsing.split_repeated(v)):
        if value not in (None, []) and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, as_list(value))
    return words


def check_type(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Require --fine-tune-type for a training, and refuse flags of a training for a scoring."""
    if not args.evaluate_only and args.fine_tune_type is None:
        parser.error("the following arguments are required: --fine-tune-type/-f")
    if args.evaluate_only:
        given = [n for n in TRAINING_FLAGS if getattr(args, n) != parser.get_default(n)]
        if names := ", ".join(f"--{name.replace('_', '-')}" for name in given):
            parser.error(f"--evaluate-only trains nothing: leave out {names}")
        args.fine_tune_type, args.learning_rate = "none", [0.0]


def check_grid(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a value given twice, and --seed beside a seed of one purpose."""
    for name in RUN_AXES:
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name.replace('_', '-')} has a value twice: give each once")
    if (args.init_seed or args.data_seed) and args.seed is not DEFAULT_SEEDS:
        parser.error("--seed sets --init-seed and --data-seed: give --seed alone, or the other two")


def count_runs(flags: Mapping[str, Any]) -> int:
    """Return the number of runs of a command; earlier versions of args.json lack some names."""
    sets = len(parsing.split_repeated(flags["bias_terms"]))
    return sets * math.prod(len(flags.get(name) or [None]) for name in RUN_AXES)
