"""Show, compare, average or apply deltas: trained parameters minus those of the base model.

    python scripts/deltas.py show out/sst2/lr0.001_seed0
    python scripts/deltas.py compare out/sst2/lr* out/rte --plot out/deltas.png
    python scripts/deltas.py average out/sst2/lr0.001_seed* --output-path out/soup
    python scripts/deltas.py apply out/soup --output-path out/soup-model

Give folders that --save-evaluator wrote, or the run's folder around one.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from bitfit.signals import catch_signals

if __name__ == "__main__":
    catch_signals("deltas.py")

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from bitfit import output_paths
from bitfit.cli import exit_status
from bitfit.files import atomic_folder, write_text
from bitfit.model import hub
from bitfit.parsing import OneLineParser, gpu, make_commands, new_file, number
from utils import UserError

if TYPE_CHECKING:  # -h and argument errors import no torch
    from bitfit.tools.saved_evaluators import SavedEvaluator
    from glue_evaluator import GLUEvaluator

# fmt: off

def add_files(add: Callable, content: str) -> None:
    add("--csv", metavar="FILE.csv", type=new_file(".csv"),
        help="also write the table to this file")
    add("--plot", metavar="FILE", type=new_file(".png", ".pdf", ".svg"),
        help=f"draw {content} (.png, .pdf or .svg)")


def add_output(add: Callable, content: str) -> None:
    add("--output-path", "-o", metavar="DIR", type=Path, required=True,
        help=f"new or empty folder for {content}")


def add_show(add: Callable) -> None:
    add("folders", metavar="FOLDER", nargs=1, help="a saved evaluator that trained bias terms")
    add_files(add, "the table as in the paper's Figure 1")


def add_compare(add: Callable) -> None:
    add("folders", metavar="FOLDER", nargs="+", help="saved evaluators that trained the same "
        "bias terms of one base model, on any tasks")
    add_files(add, "cosines and distances as a heatmap")


def add_average(add: Callable) -> None:
    add("folders", metavar="FOLDER", nargs="+", help="saved evaluators of one task and one base "
        "model that trained the same parameters")
    add("--weights", metavar="W", nargs="+", type=number(float, 0),
        help="one weight per folder, divided by their sum [equal weights]")
    add("--data-dir", metavar="DIR", help="folder with the data, if it has moved [as in training]")
    add("--gpu-device", "-d", metavar="GPU", type=gpu,
        help="device for scoring: GPU number, or cpu [GPU 0 if there is one, else cpu]")
    add_output(add, "the average, which is a saved evaluator")


def add_apply(add: Callable) -> None:
    add("folders", metavar="FOLDER", nargs=1, help="a saved evaluator")
    add("--scale", metavar="S", type=number(float, 0, 1e6), default=1.0,
        help="multiply the encoder's delta by S; the classifier stays as trained [1]")
    add_output(add, "a plain Hugging Face model")

# fmt: on


def add_base(add: Callable) -> None:
    add("--model-name", "-m", metavar="MODEL", help="base model, if it has moved [as in training]")


def make_parser() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """Return the parser and {command: parser}."""
    commands = [
        ("show", add_show, "print how far each bias term moved in each layer"),
        ("compare", add_compare, "print cosines and distances between the deltas of encoders"),
        ("average", add_average, "write the average of several evaluators, and score it"),
        ("apply", add_apply, "write base model + delta as a Hugging Face model"),
    ]
    return make_commands("deltas.py", __doc__.splitlines()[0], commands, add_common=add_base)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser, commands = make_parser()
    args = parser.parse_args(argv)
    command = commands[args.command]
    if args.command in ("compare", "average") and len(args.folders) < 2:
        command.error("give two folders or more")
    weights = getattr(args, "weights", None)
    if weights and len(weights) != len(args.folders):
        command.error(f"--weights: {len(weights)} for {len(args.folders)} folders: give one each")
    if weights and not 0 < sum(weights) < math.inf:
        command.error("--weights: their sum is 0 or too large: give other weights")
    return args


def load(args: argparse.Namespace, member: "SavedEvaluator") -> "GLUEvaluator":
    """Load a saved evaluator with its base model."""
    model = args.model_name or member.metadata["model_name"]
    data, device = getattr(args, "data_dir", None), getattr(args, "gpu_device", "cpu")
    local = hub.is_local(model) and (data or member.metadata["data_dir"])
    hub.use_local_copies_when_offline(needs_hub=not local)
    from glue_evaluator import GLUEvaluator

    return GLUEvaluator.load(
        member.folder, utils.resolve_gpu(device), model_name=args.model_name, data_dir=data
    )


def show(args: argparse.Namespace) -> None:
    from bitfit.results import plots
    from bitfit.tools import deltas, saved_evaluators

    found = saved_evaluators.read_deltas(args.folders)
    saved_evaluators.check_bitfit(found, "show")
    evaluator = load(args, found[0])
    changes = evaluator.terms_changes()
    if args.csv:
        write_text(args.csv, changes.to_csv())
    if args.plot:
        plots.save_figure(plots.bias_heatmap(changes, evaluator.caption), args.plot)
    utils.print_result(deltas.bias_changes_text(evaluator, changes))


def compare(args: argparse.Namespace) -> None:
    from bitfit.results import plots
    from bitfit.tools import deltas, saved_evaluators

    found = saved_evaluators.read_deltas(args.folders)
    saved_evaluators.check_bitfit(found, "compare")
    saved_evaluators.check_same_trainable(found)
    comparison = deltas.compare_deltas(found, load(args, found[0]))
    base = saved_evaluators.describe_base(found[0])
    method = saved_evaluators.describe_method(found[0])
    caption = f"How {len(found)} saved evaluators changed the encoder of {base}, {method} "
    caption += "(without classifiers)"
    if args.csv:
        write_text(args.csv, deltas.comparison_pairs(comparison).to_csv(index=False))
    if args.plot:
        plots.save_figure(deltas.comparison_heatmap(comparison, caption), args.plot)
    utils.print_result(f"{caption}\n{deltas.comparison_text(comparison)}")


def average(args: argparse.Namespace) -> None:
    from bitfit.tools import deltas, saved_evaluators

    output_paths.check_is_new(args.output_path)
    found = saved_evaluators.read_deltas(args.folders)
    saved_evaluators.check_same(found, "tasks", lambda e: e.task, describe=lambda e: e.task.folder)
    saved_evaluators.check_same_trainable(found)
    evaluator = load(args, found[0])
    weights = args.weights or [1] * len(found)
    evaluator, table = deltas.average_evaluators(found, weights, evaluator)
    with atomic_folder(args.output_path) as folder:
        write_text(folder / "members.csv", table.to_csv(index=False))
        evaluator.save(folder)
    utils.print_result(deltas.average_text(table, evaluator))


def apply(args: argparse.Namespace) -> None:
    from bitfit.tools import deltas, saved_evaluators

    output_paths.check_is_new(args.output_path)
    (member,) = saved_evaluators.read_deltas(args.folders)
    is_frozen = member.metadata["fine_tune_type"] == "frozen"
    if args.scale != 1 and is_frozen and "started_from" not in member.metadata:
        raise UserError(f"--scale: {member.name} did not change the encoder: leave --scale out")
    evaluator = load(args, member)
    deltas.scale_delta(evaluator, args.scale)
    evaluator.export_model(args.output_path)
    base, times = saved_evaluators.describe_base(member), f"{args.scale:g} x " * (args.scale != 1)
    utils.print_result(f"{args.output_path}: {base} + {times}{member.name}")


COMMANDS = {"show": show, "compare": compare, "average": average, "apply": apply}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    utils.setup_logging()
    return exit_status.run_cli("deltas.py", lambda signals: COMMANDS[args.command](args))


if __name__ == "__main__":
    sys.exit(main())
