"""The flags of run_glue.py and the checks that need no file; answers without importing torch."""

import argparse
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bitfit.data.tasks import TASKS
from bitfit.model.trainable import FINE_TUNE_TYPES, TERMS
from bitfit.output_paths import file_error
from bitfit.tracking.services import KINDS
from bitfit.tracking.tracker import is_installed
from bitfit.versions import git_commit
from utils import print_once, print_result, write_line

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

AddFlag = Callable[..., argparse.Action]  # argparse's add_argument
EXAMPLES = """\
examples:
  python run_glue.py -o out/rte -t rte -f bitfit -l 1e-3
      bias terms of bert-base on RTE
  python run_glue.py -o out/rte-sweep -t rte -f bitfit -l 1e-4 4e-4 1e-3 -s 0 1 2 3 4
      fifteen runs in one pass
  python run_glue.py -o out/toy -t sst2 -m examples/tiny_bert --data-dir examples/glue -f full_ft
      without the Hub
  python run_glue.py -o out/cola -t cola -f bitfit --keep best --predict-test --resume
      what may be killed and started again, and ends with test predictions
"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; `-h` has the rest."""

    def parse_known_args(
        self,
        args: Iterable[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> tuple[Any, list[str]]:
        # Such names would end up in logs, tables, JSON and commands to be pasted.
        what = "has control characters, or bytes that are not UTF-8: rename what it names"
        for word in sys.argv[1:] if args is None else args:
            if is_unreadable(word):
                self.error(f"the argument '{word}' {what}")
        try:
            folder = os.getcwd()
        except OSError as error:
            self.error(f"the current folder: {error.strerror}: work in another one")
        if is_unreadable(folder):
            self.error(f"the current folder '{folder}' {what}")
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        if file is not sys.stdout:
            return super()._print_message(message, file)
        try:
            print_result(message.removesuffix("\n"))
        except OSError as error:
            write_line(f"{self.prog}: stopped: {error}")
            self.exit(1)

    def error(self, message: str) -> NoReturn:
        print_once(f"{self.prog}: error: {message}")
        self.exit(2)


def is_unreadable(word: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in word)


def make_commands(
    prog: str,
    description: str,
    commands: Sequence[tuple[str, Callable[[AddFlag], None], str]],
    add_common: Callable[[AddFlag], None],
) -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """(the parser, its {command: parser}) of a program that has several.

    Args:
        commands: [(name, what adds its flags, what it does)].
        add_common: adds the flags that all have.
    """
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                    parser_class=OneLineParser)  # fmt: skip
    for name, add_flags, text in commands:
        own = choices.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_common(own.add_argument)
        add_flags(own.add_argument)
    return parser, choices.choices


def number(
    kind: type[float], low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """An argparse type: an int or float from `low` (or above it) up to `high`."""
    rule = f"{'above' if above else 'at least'} {low}"
    rule += f" and below {high}" if high < math.inf else ""
    name = {int: "whole number", float: "number"}[kind]

    def parse(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value < high:
            raise argparse.ArgumentTypeError(f"{word!r} is not a {name} {rule}")
        return value

    return parse


def gpu(word: str) -> int | str:
    if word == "cpu":
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a GPU number nor `cpu`") from None


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """Return an argparse type: the path of a file with one of some suffixes, to be written."""

    def parse(word: str) -> Path:
        if wrong := file_error(word, suffixes):
            raise argparse.ArgumentTypeError(f"{word!r} {wrong}")
        return Path(word)

    return parse


POSITIVE = number(int, 1, 2**31)
# fmt: off

def add_what_to_run(add: AddFlag) -> None:
    add("--output-path", "-o", metavar="DIR", required=True,
        help="new or empty folder for the results; with --resume that of the interrupted run")
    add("--task-name", "-t", metavar="TASK", choices=TASKS,
        help=f"one of {', '.join(TASKS)}")
    add("--task-file", metavar="FILE",
        help="instead of --task-name: a JSON file that describes a task of your own, with its data "
             "files beside it or in --data-dir (docs/own-tasks.md)")
    add("--model-name", "-m", metavar="MODEL", default="bert-base-cased",
        help="name on the Hugging Face Hub, or a folder [%(default)s]")
    add("--model-revision", metavar="REV",
        help="of a model on the Hub: a tag, branch or commit [its main branch]")
    add("--fine-tune-type", "-f", metavar="TYPE", required=True, choices=FINE_TUNE_TYPES,
        help=f"what trains: one of {', '.join(FINE_TUNE_TYPES)}")
    add("--bias-terms", metavar="TERM", nargs="+", choices=[*TERMS, "all"],
        help=f"for bitfit: all, or some of {', '.join(TERMS)} [all]")
    add("--mask-size", metavar="N", type=POSITIVE,
        help="for rand_uniform: how many encoder parameters are drawn [100000 for bert-base, "
             "280000 for bert-large, 105000 for roberta-base, else as many as bitfit trains]")
    add("--random-encoder", action="store_true",
        help="a control: draw the encoder's weights at random instead of loading them [off]")


def add_data(add: AddFlag) -> None:
    add("--data-dir", metavar="DIR",
        help="a folder with GLUE's own TSV folders (RTE/train.tsv) or with Parquet files "
             "(rte/train-*.parquet) [nyu-mll/glue from the Hub]")
    add("--max-seq-length", metavar="N", type=POSITIVE, default=128,
        help="longer rows are cut to so many tokens [%(default)s]")
    add("--train-size", metavar="N", type=POSITIVE,
        help="train on so many rows, drawn by the seed [all]")


def add_training(add: AddFlag) -> None:
    add("--learning-rate", "-l", metavar="LR", nargs="+", default=[1e-3],
        type=number(float, 0, above=True),
        help="usual: 1e-4 to 1e-3 for bias terms, 1e-5 to 5e-5 for full_ft; several: a run for "
             "each [0.001]")
    add("--epochs", "-e", metavar="N", type=POSITIVE, default=16,
        help="passes over the training rows [%(default)s]")
    add("--batch-size", "-b", metavar="N", type=POSITIVE, default=8,
        help="rows per optimizer step [%(default)s]")
    add("--optimizer", choices=("adamw", "adam"), default="adamw",
        help="adamw has weight decay 0 and eps 1e-6, as in the released code [%(default)s]")
    add("--lr-schedule", choices=("constant", "linear"), default="constant",
        help="linear falls to 0 at the last step [%(default)s]")
    add("--warmup-ratio", metavar="R", type=number(float, 0, 1), default=0.0,
        help="share of all steps over which the learning rate first rises [%(default)s]")
    add("--seed", "-s", metavar="N", nargs="+", type=number(int, 0, 2**63), default=[0],
        help="draws the classifier, data order, dropout and masks; several: a run for each, with "
             "every learning rate [0]")


def add_machine(add: AddFlag) -> None:
    add("--gpu-device", "-d", metavar="GPU", type=gpu,
        help="GPU number, or cpu [GPU 0 where there is one, else cpu]")
    add("--precision", choices=("fp32", "bf16"),
        help="bf16 computes in bfloat16; what trains is kept in float32 "
             "[bf16 on a GPU that has it, else fp32]")
    add("--max-tokens", metavar="N", type=POSITIVE,
        help="the most tokens computed at once, whatever the batch and the number of "
             "runs: less needs less memory [2048 on a CPU, 65536 on a GPU]")
    add("--no-tf32", action="store_true", help="fp32 on a GPU: multiply in full float32 [off]")


def add_results(add: AddFlag) -> None:
    add("--resume", action="store_true",
        help="go on where a run in --output-path was interrupted; give it the same flags [off]")
    add("--checkpoint-every", metavar="N", type=number(int, 0), default=1,
        help="write a checkpoint every N epochs; 0: not at the end of epochs [%(default)s]")
    add("--checkpoint-minutes", metavar="M", type=number(float, 0, above=True), default=30.0,
        help="and after M minutes without one, within an epoch too [%(default)s]")
    add("--evaluation-frequency", metavar="N", type=POSITIVE, default=1,
        help="score every N epochs, and after the last [%(default)s]")
    add("--keep", choices=("last", "best"), default="last",
        help="the epoch whose weights are saved and predict; best is by the main validation "
             "score, and of several runs the best one alone is saved and predicts [%(default)s]")
    add("--save-evaluator", action="store_true",
        help="write evaluator/, for GLUEvaluator.load [off]")
    add("--export-model", action="store_true",
        help="write model/, a plain Hugging Face folder with a model card [off]")
    add("--push-to-hub", metavar="NAME",
        help="export the model, and at the end upload it to the Hub under this name [off]")
    add("--predict-test", action="store_true",
        help="write the test predictions for the GLUE server [off]")
    add("--report-to", metavar="TRACKER", nargs="+", choices=KINDS, default=[],
        help=f"show losses and scores while training, at some of {', '.join(KINDS)} [off]")
    add("--verbose", action="store_true", help="list the trained tensors [off]")
    add("--quiet", "-q", action="store_true",
        help="say nothing but warnings and, at the end, the results [off]")

# fmt: on


GROUPS = {
    "what to run": add_what_to_run,
    "data": add_data,
    "training": add_training,
    "machine": add_machine,
    "results": add_results,
}


class Versions(argparse.Action):
    """Says what results may depend on, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        said = [f"commit {git_commit() or 'unknown'}"]
        for name in ("torch", "transformers", "datasets", "numpy"):
            try:
                said.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                said.append(f"no {name}")
        parser._print_message(f"{parser.prog}: {', '.join(said)}\n", sys.stdout)
        parser.exit()


def make_parser(description: str) -> OneLineParser:
    parser = OneLineParser(
        prog="run_glue.py", allow_abbrev=False, description=description, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action=Versions, nargs=0, default=argparse.SUPPRESS,
                        help="say the versions, and end")  # fmt: skip
    for title, add_flags in GROUPS.items():
        add_flags(parser.add_argument_group(title).add_argument)
    return parser


def parse_args(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; exits with status 2 and one line where one is wrong."""
    parser = make_parser(description)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a word could go on
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    if (args.task_name is None) == (args.task_file is None):
        parser.error("give one of --task-name (a GLUE task) and --task-file (a task of your own)")
    if args.bias_terms and args.fine_tune_type != "bitfit":
        parser.error("--bias-terms goes with --fine-tune-type bitfit only: leave it out")
    for name, values in (("--learning-rate", args.learning_rate), ("--seed", args.seed)):
        if len(set(values)) < len(values):
            parser.error(f"{name} has a value twice: give each once")
    if args.mask_size and args.fine_tune_type != "rand_uniform":
        parser.error("--mask-size goes with --fine-tune-type rand_uniform only: leave it out")
    for kind in (kind for kind in args.report_to if not is_installed(kind)):
        parser.error(f"--report-to {kind} needs a package that is not there: pip install {kind}")
    if args.push_to_hub and args.keep != "best" and len(args.learning_rate) * len(args.seed) > 1:
        parser.error("--push-to-hub takes one model of several runs: give --keep best too")
    args.export_model |= args.push_to_hub is not None
    return args
