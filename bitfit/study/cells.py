"""The cells of the paper's tables and figures. A cell is one command of run_glue.py.

A cell is a combination of model, method (a row of the table), task and, for a train-size curve,
training size. The cell's pairs of learning rate and seed are the runs of one sweep. `study.json`
holds the cells with their flags and a hash of the flags that results depend on.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitfit import options
from bitfit.artifacts.run_folder import HARMLESS, NEW_FLAGS, describe_difference, run_folders
from bitfit.files import write_text
from bitfit.parsing import number
from bitfit.study import protocol
from bitfit.study.cell_tasks import check_metric, task_of
from utils import LOGGER, UserError, as_list, first_line

if TYPE_CHECKING:
    from bitfit.model.run import Run

STUDY = "study.json"


class Cell(NamedTuple):
    """One command. `flags` are flags of run_glue.py, without flags that depend on the machine."""

    model: str
    row: str
    task: str
    size: int | None  # of a train-size curve
    flags: list[str]
    hash: str

    @property
    def name(self) -> str:
        size = "" if self.size is None else f"-{self.size}"
        start = f"-from-{self.start}" if self.start else ""
        return f"{slug(self.model)}/{self.row}/{self.task}{size}{start}"

    @property
    def start(self) -> str | None:
        """The task whose cell of the same row gives the first values; None: the base model's."""
        return self.args["start_from"]

    @property
    def args(self) -> dict[str, Any]:
        """The values of the flags, as in args.json."""
        return parse_flags(tuple(self.flags))

    @property
    def rates(self) -> list[float]:
        return self.args["learning_rate"]

    @property
    def seeds(self) -> list[int]:
        return self.args["seed"]

    @property
    def runs(self) -> int:
        return len(self.rates) * len(self.seeds)

    def folders(self, output: Path) -> dict["Run", Path]:
        """Return {run: folder}, ordered by learning rate, then seed."""
        from bitfit.model.run import Run

        runs = [Run(rate, seed) for rate in self.rates for seed in self.seeds]
        return run_folders(Path(output) / self.name, runs)

    def command(self, output: Path, *more: str, start: Path | None = None) -> list[str]:
        """Return the words of the command that starts or resumes this cell.

        Args:
            start: the evaluator that a cell with a warm start starts from; None: the folder of its
                cell, which may have several.
        """
        words = list(self.flags)
        if self.start:  # the flags name the task
            folder = start or Path(output) / slug(self.model) / self.row / self.start
            words[words.index("--start-from") + 1] = str(folder)
        target = ["--output-path", str(Path(output) / self.name), "--resume"]
        return ["python", "run_glue.py", *words, *target, *more]

    def shell(self, output: Path) -> str:
        return shlex.join(self.command(output))


class Study(NamedTuple):
    """The planned cells of a folder."""

    output: Path
    tables: list[int]
    figures: list[int]
    cells: list[Cell]


def slug(model: str) -> str:
    """Return the name of a model's folder in the study. Local models have absolute paths."""
    return Path(model).name if Path(model).is_absolute() else model.replace("/", "--")


def absolute_folder(path: str) -> str:
    """Return the absolute path of an existing folder, since workers may start elsewhere.

    Anything else, for example a name on the Hub, is returned unchanged.
    """
    return str(Path(path).absolute()) if Path(path).is_dir() else path


@cache
def parse_flags(words: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of flags of run_glue.py, as in args.json. Do not change the result."""
    return asdict(options.parse_args("", ["--output-path", "-", *words]))


def make_cell(model: str, row: str, task: str, size: int | None, args: argparse.Namespace) -> Cell:
    """Return the `Cell` of one key of `protocol.requested_cells` under the flags of `plan`."""
    kind = protocol.ROWS[row]
    seeds = value_for(args.seeds, row) or protocol.SEEDS
    rates = value_for(args.learning_rates, row) or protocol.paper_learning_rates(model, row)
    epochs = value_for(args.epochs, task) or [protocol.default_epochs(task)]
    flags = {
        "task_file" if task.endswith(".json") else "task_name": task,
        "model_name": model,
        "fine_tune_type": kind.fine_tune_type,
        "bias_terms": list(kind.bias_terms),
        "add_biases": args.add_biases and kind.fine_tune_type in options.BIAS_TYPES,
        "learning_rate": rates,
        "seed": [int(seed) for seed in seeds],
        "epochs": int(epochs[0]),
        "batch_size": args.batch_size,
        "save_evaluator": args.start_from == task and not size,
        "data_dir": args.data_dir and absolute_folder(args.data_dir),
        "start_from": args.start_from if args.start_from != task else None,
        "max_seq_length": args.max_seq_length,
        "precision": args.precision,
        "train_size": size or args.train_size,
        "train_score_rows": args.train_score_rows,
    }
    known = task_of(parse_flags(tuple(options.flag_words(flags))))
    check_metric(known)
    if args.start_from and known.is_tagging:
        problem = f"{known.name} tags words, which {args.start_from} does not"
        raise UserError(f"{problem}: plan it without --start-from")
    is_submitted = row in ("full_ft", "bitfit") and not size and bool(known.server_files)
    words = options.flag_words(flags | {"predict_test": is_submitted and args.predict_test})
    return Cell(model, row, known.name, size=size, flags=words, hash=flags_hash(words))


def value_for(values: dict[str | None, list], name: str) -> list | None:
    """Return the values given for a name, else the values given for all names (key None)."""
    return values.get(name, values.get(None))


def result_settings(words: Iterable[str]) -> dict[str, Any]:
    """Return {option: value} of the options that results depend on."""
    free, flags = HARMLESS - {"data_dir", "model_name", "start_from"}, parse_flags(tuple(words))
    settings = {name: value for name, value in flags.items() if name not in free}
    return settings | ({"task": task_of(flags).record} if flags["task_file"] else {})


def flags_hash(words: Iterable[str]) -> str:
    """Return a short SHA-256 of the flags that a cell's results depend on.

    Flags that earlier versions did not have do not change it if they are left out.
    """
    settings = sorted(result_settings(words).items())
    text = json.dumps(dict(item for item in settings if item not in NEW_FLAGS.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def has_settings_of(metadata: dict[str, Any], cell: Cell) -> bool:
    """Return whether the content of an args.json belongs to a cell's command."""
    expected, metadata = result_settings(cell.flags), NEW_FLAGS | metadata
    free = {"start_from"} if expected["precision"] else {"start_from", "precision"}
    return bool(metadata["start_from"]) == bool(cell.start) and all(
        name in metadata and as_list(metadata[name]) == as_list(value)
        for name, value in expected.items()
        if name not in free
    )


def plan_study(output: Path, args: argparse.Namespace) -> Study:
    """Return the `Study` of the flags of `plan`, with the cells planned in that folder before.

    Raises:
        UserError: two models have the same name, or a cell was planned with other flags.
    """
    tables, figures = args.tables or [], args.figures or []
    models = args.models and [absolute_folder(model) for model in args.models]
    keys = protocol.requested_cells(
        tables, figures, models, tasks=args.tasks, rows=args.rows or protocol.ROWS, sizes=args.sizes
    )
    if args.start_from:  # a source is planned before its cells
        keys = list(dict.fromkeys([(m, r, args.start_from, None) for m, r, *_ in keys] + keys))
    if not keys and (tables or figures):
        raise UserError("these --tables have none of these --rows: give other rows, or none")
    for name, place in (("learning_rates", 1), ("seeds", 1), ("epochs", 2)):
        if unused := getattr(args, name).keys() - {None, *(key[place] for key in keys)}:
            names, flag = ", ".join(sorted(unused)), name.replace("_", "-")
            LOGGER.warning("--%s has no effect on %s: not planned", flag, names)
    new = {cell.name: cell for cell in (make_cell(*key, args) for key in keys)}
    if len(new) < len(keys):
        raise UserError("two of --models have the same folder name: rename one")
    exists = os.path.exists(Path(output) / STUDY)
    old = read_study(output) if exists else Study(Path(output), [], [], cells=[])
    for cell in old.cells:
        if new.get(cell.name, cell).hash != cell.hash:
            before, after = result_settings(cell.flags), result_settings(new[cell.name].flags)
            changes = [describe_difference(name, value, after.get(name))
                       for name, value in before.items() if value != after.get(name)]  # fmt: skip
            problem = f"{output} has other flags for {cell.name}: {'; '.join(changes)}"
            raise UserError(f"{problem}: give another --output-path")
    cells = {cell.name: cell for cell in old.cells} | new
    tables, figures = sorted({*tables, *old.tables}), sorted({*figures, *old.figures})
    return Study(Path(output), tables, figures, cells=list(cells.values()))


def write_study(study: Study) -> None:
    """Write study.json."""
    study.output.mkdir(parents=True, exist_ok=True)
    cells = [cell._asdict() for cell in study.cells]
    content = {"tables": study.tables, "figures": study.figures, "cells": cells}
    write_text(study.output / STUDY, json.dumps(content, indent=2) + "\n")


def read_study(output: Path) -> Study:
    """Return the `Study` in a folder.

    Raises:
        UserError: there is none, or study.json was edited or damaged.
    """
    path = Path(output) / STUDY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [Cell(**cell) for cell in content["cells"]]
        for cell in cells:
            if flags_hash(cell.flags) != cell.hash:
                raise ValueError(f"{cell.name} was edited")
        shown = {name: sorted(map(int, content[name])) for name in ("tables", "figures")}
        return Study(Path(output), **shown, cells=cells)
    except FileNotFoundError:
        raise UserError(f"{output} holds no study: make one with `paper.py plan`") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a study: {first_line(error)}; plan it anew") from None


def named_numbers(
    kind: type, names: Collection[str], low: float, high: float = math.inf
) -> Callable[[str], tuple[str | None, list]]:
    """Return an argparse type: `7`, `7,8`, or `rte=7,8` for one of the names of tasks or rows."""

    def convert(word: str) -> tuple[str | None, list]:
        name, mark, values = word.rpartition("=")
        if mark and name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(names)}")
        parsed = [number(kind, low, high, above=kind is float)(v) for v in values.split(",")]
        return (name if mark else None, parsed)

    return convert


def by_name(pairs: Iterable[tuple[str | None, list]]) -> dict[str | None, list]:
    """Return {name or None: values} of the values of a flag, as from `named_numbers`."""
    values: dict[str | None, list] = {}
    for name, given in pairs:
        values.setdefault(name, []).extend(given)
    return values


def shard(word: str) -> tuple[int, int]:
    """Return (index from 0, number of shards) of `3/8`, as an argparse type."""
    index, _, count = word.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{word!r} is not I/N with 1 <= I <= N")
    return int(index) - 1, int(count)
