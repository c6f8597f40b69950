"""Reproduce the paper's tables and figures: plan, run, report, submit.

    python scripts/paper.py plan --output-path out/paper --tables 2 3 --figures 1 2
    python scripts/paper.py run --output-path out/paper
    python scripts/paper.py report --output-path out/paper
    python scripts/paper.py submit --output-path out/paper --model bert-base-cased --method bitfit

A study is a folder. Each cell of a table is one command of run_glue.py. `run` may be killed at any
time and started again, and any number of workers may share one folder.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from bitfit.signals import catch_signals

if __name__ == "__main__":
    catch_signals("paper.py")

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import utils
from bitfit.cli import exit_status
from bitfit.data.tasks import TASKS
from bitfit.model import hub
from bitfit.options import flag_words
from bitfit.parsing import POSITIVE, OneLineParser, gpu, make_commands, number
from bitfit.study import cell_tasks, cells, protocol

# Flags of `plan` that plan no cells, so `plan` may be repeated with them alone.
NOT_PLANNING = ("command", "output_path", "calibrate", "gpu_device", "precision")
# fmt: off


def add_plan(add: Callable) -> None:
    add("--tables", type=int, nargs="+", choices=(2, 3), help="tables of the paper")
    add("--figures", type=int, nargs="+", choices=(1, 2),
        help="figures of the paper: 1 shows how far biases move; 2, scores by number of examples")
    add("--tasks", nargs="+", type=cell_tasks.task_argument, metavar="TASK",
        help="GLUE tasks, or task files (*.json) [those of Table 2; rte for Figure 1, qnli for "
             "Figure 2]")
    add("--rows", nargs="+", choices=protocol.ROWS, metavar="ROW",
        help=f"methods, the rows of a table: some of {', '.join(protocol.ROWS)} [all]")
    add("--models", nargs="+", metavar="MODEL",
        help="names on the Hub, or folders [the paper's three for Table 2, else bert-base-cased]")
    add("--add-biases", action="store_true",
        help="for models without biases, as for run_glue.py, in the rows that train biases [off]")
    add("--learning-rates", nargs="+", metavar="[ROW=]LR", default=[],
        type=cells.named_numbers(float, protocol.ROWS, 0),
        help="for all methods, or for one: 1e-3 full_ft=1e-5,3e-5 [the paper's grids]")
    add("--seeds", nargs="+", metavar="[ROW=]N", default=[],
        type=cells.named_numbers(int, protocol.ROWS, 0, high=2**63),
        help="for all methods, or for one: 0 1 2 frozen=0,1 [0 1 2 3 4]")
    add("--epochs", nargs="+", metavar="[TASK=]N", default=[],
        type=cells.named_numbers(int, TASKS, 1),
        help="for all tasks, or for one: 8 rte=20 [cola 16, mrpc 20, rte 20, stsb 16, others 8]")
    add("--batch-size", type=POSITIVE, metavar="N", default=protocol.BATCH_SIZE,
        help="training examples per optimizer step [%(default)s]")
    add("--train-size", type=POSITIVE, metavar="N", help="train on N examples [all]")
    add("--train-score-rows", type=number(int, 0), metavar="N", help="as for run_glue.py [all]")
    add("--start-from", choices=TASKS, metavar="TASK",
        help="start all other tasks from the best run of this task's cell in the same row, chosen "
             "by its validation scores [from the base model]")
    add("--sizes", type=POSITIVE, nargs="+", metavar="N", default=protocol.SIZES,
        help="numbers of training examples for Figure 2 [500 1000 2000 4000 8000 16000]")
    add("--max-seq-length", type=POSITIVE, metavar="N", help="cut examples to N tokens [128]")
    add("--data-dir", metavar="DIR", help="local data, as for run_glue.py [from the Hub]")
    add("--precision", choices=("fp32", "bf16"), help="precision, as for run_glue.py")
    add("--no-predict-test", action="store_false", dest="predict_test",
        help="no test predictions, which `submit` needs [full_ft and bitfit write them]")
    add("--calibrate", action="store_true",
        help="measure the speed of this machine, to estimate the hours of each cell [off]")
    add("--gpu-device", type=gpu, metavar="GPU",
        help="device for --calibrate: GPU number, or cpu [GPU 0 if there is one, else cpu]")


def add_run(add: Callable) -> None:
    add("--gpus", nargs="+", type=gpu, metavar="GPU",
        help="GPU numbers, or cpu; starts one worker for each [one, on GPU 0 if there is one]")
    add("--nproc-per-node", type=POSITIVE, metavar="N", default=1,
        help="train each cell with torchrun on N GPUs [%(default)s]")
    add("--shard", type=cells.shard, metavar="I/N",
        help="train only share I of N of the cells, for file systems without locks [all]")
    add("--retry-failed", action="store_true", help="train failed cells again [off]")
    add("--budget-hours", type=number(float, 0, above=True), metavar="H",
        help="train the cheapest cells that one worker can train in H hours [all]")


def add_report(add: Callable) -> None:
    add("--resamples", type=number(int, 2, 2**31), metavar="N", default=1000,
        help="number of bootstrap resamples [%(default)s]")
    add("--halving", type=POSITIVE, nargs="+", metavar="N", default=[],
        help="epochs for run_glue.py's --halving: simulate it on the finished cells [none]")
    add("--figure-formats", nargs="+", choices=("pdf", "svg"), metavar="FORMAT", default=[],
        help="also write the figures as pdf or svg [png alone]")
    add("--checklist", action="store_true",
        help="also write checklist.md, the reproducibility checklist of ACL Rolling Review, with "
             "questions for you to answer [off]")


def add_submit(add: Callable) -> None:
    add("--model", required=True, metavar="MODEL", help="a model of the study")
    add("--method", required=True, choices=protocol.ROWS, metavar="ROW",
        help="a method of the study, such as bitfit")
    add("--placeholder-missing", action="store_true",
        help="fill missing tasks with the majority class [write no zip file if a task is missing]")

# fmt: on


def add_folder(add: Callable) -> None:
    add("--output-path", "-o", type=Path, required=True, metavar="DIR", help="the study's folder")


def make_parser() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """Return the parser and {command: parser}."""
    commands = [
        ("plan", add_plan, "choose the cells (method, model, task) and print their cost"),
        ("run", add_run, "train the cells that are not done"),
        ("report", add_report, "write tables, statistics and figures of the finished cells"),
        ("submit", add_submit, "write the zip file for the GLUE server"),
    ]
    return make_commands("paper.py", __doc__.splitlines()[0], commands, add_common=add_folder)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser, commands = make_parser()
    args = parser.parse_args(argv)
    if args.command == "run" and len(args.gpus or []) > 1 and args.nproc_per_node > 1:
        commands["run"].error("--nproc-per-node needs a single worker: give at most one of --gpus")
    if args.command == "report" and args.halving != sorted(set(args.halving)):
        commands["report"].error("--halving: give ascending epochs")
    if args.command == "plan":
        given = [n for n, v in vars(args).items() if v != commands["plan"].get_default(n)]
        planning = [name for name in given if name not in NOT_PLANNING]
        is_planned = os.path.exists(args.output_path / cells.STUDY)
        if not args.tables and not args.figures and (planning or not is_planned):
            commands["plan"].error("give --tables 2 3, or --figures 1 2, or both")
        for name in ("learning_rates", "seeds", "epochs"):
            setattr(args, name, cells.by_name(getattr(args, name)))
        if any(len(values) > 1 for values in args.epochs.values()):
            commands["plan"].error("--epochs: give one number for all tasks, or one per task")
    return args


def plan(args: argparse.Namespace) -> int:
    from bitfit import output_paths
    from bitfit.study import cost, plan

    output_paths.check_writable(args.output_path)
    local = args.data_dir and all(hub.is_local(model) for model in args.models or ["the Hub's"])
    hub.use_local_copies_when_offline(needs_hub=not local)
    study = cells.plan_study(args.output_path, args)
    gpu = utils.resolve_gpu(args.gpu_device)
    utils.choose_device(gpu)
    plan.check_study(study)
    cells.write_study(study)
    if args.calibrate:
        cost.calibrate(study, gpu, args.precision)
    utils.print_result(f"{plan.study_table(study, cost.Costs(study))}\n{plan.commands_text(study)}")
    return 0


def run(args: argparse.Namespace) -> int:
    from bitfit.study import cell_states, plan, worker

    study = cells.read_study(args.output_path)
    part, parts = args.shard or (0, 1)
    gpus = args.gpus or [None]
    for choice in gpus:
        utils.choose_device(utils.resolve_gpu(choice))
    worker.check_gpus_for_ranks(args.nproc_per_node, gpus[0])
    cells_here, states = study.cells[part::parts], worker.states_to_run(args.retry_failed)
    fit = cells_here
    left: list[cells.Cell] = []
    if args.budget_hours:
        hub.use_local_copies_when_offline()
        fit, left = plan.cells_within_budget(study, cells_here, args.budget_hours, states=states)
    if len(gpus) > 1:
        names = ("output_path", "budget_hours", "retry_failed")
        flags = {name: getattr(args, name) for name in names}
        shards = [f"{part + parts * i + 1}/{parts * len(gpus)}" for i in range(len(gpus))]
        statuses = worker.run_workers([
            [__file__, "run", *flag_words(flags | {"gpus": gpu, "shard": args.shard and shard})]
            for gpu, shard in zip(gpus, shards, strict=True)
        ])  # fmt: skip
    else:
        worker.run_cells(
            study, fit, states, gpu=gpus[0], shared=args.shard is None, ranks=args.nproc_per_node
        )
        statuses = []
    utils.print_result(plan.states_summary(study, cells_here, left))
    bad = any(cell_states.cell_state(study, cell) in ("failed", "foreign") for cell in cells_here)
    return int(bad or any(statuses))


def report(args: argparse.Namespace) -> int:
    from bitfit.study import checklist, report

    study = cells.read_study(args.output_path)
    if args.checklist:
        checklist.check_new(study)
    text = report.write_report(study, args.resamples, args.figure_formats, halvings=args.halving)
    utils.print_result(text)
    if args.checklist:
        utils.print_result(str(checklist.write_checklist(study)))
    return 0


def submit(args: argparse.Namespace) -> int:
    from bitfit.study import submit

    name = f"submission_{cells.slug(cells.absolute_folder(args.model))}_{args.method}.zip"
    path = args.output_path / name
    study = cells.read_study(args.output_path)
    lines = submit.write_submission(
        study, args.model, args.method, path=path, placeholder=args.placeholder_missing
    )
    utils.print_result("\n".join([*lines, str(path)]))
    return 0


COMMANDS = {"plan": plan, "run": run, "report": report, "submit": submit}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    utils.setup_logging()
    return exit_status.run_cli(
        "paper.py",
        lambda signals: COMMANDS[args.command](args),
        after_signal="; the same command goes on",
        after_error="; finished cells are kept",
    )


if __name__ == "__main__":
    sys.exit(main())
