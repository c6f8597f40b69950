"""The cells of the paper's tables and figures: one `run_glue.py` command each.

A cell is a model x a table's row x a task (x a training size). Its learning rates x seeds are the
runs of one sweep, in one pass where they stack. `study.json` holds the cells with their flags and
the hash of what their results depend on; whether one is done is read from its own folder.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from bitfit import options
from bitfit.artifacts.run_folder import HARMLESS, folders_of
from bitfit.data.tasks import TASKS
from utils import UserError, as_list, one_line, write_text

STUDY = "study.json"
PAPERS_MODELS = ("bert-base-cased", "bert-large-cased", "roberta-base")
PAPERS_TASKS = ("qnli", "sst2", "mnli", "cola", "mrpc", "stsb", "rte", "qqp")  # Table 2's columns


class Row(NamedTuple):
    """A row of Table 3."""

    fine_tune_type: str
    bias_terms: tuple = ()

    @property
    def stacks(self):
        """Whether its runs share one pass, on models that can."""
        return self.fine_tune_type in ("bitfit", "frozen")


ROWS = {
    "full_ft": Row("full_ft"),
    "bitfit": Row("bitfit"),
    "b_m2+b_q": Row("bitfit", ("intermediate", "query")),
    "b_m2": Row("bitfit", ("intermediate",)),
    "b_q": Row("bitfit", ("query",)),
    "frozen": Row("frozen"),
    "rand_uniform": Row("rand_uniform"),
    "rand_row_col": Row("rand_row_col"),
}
# The paper's protocol, as it is transcribed. Epochs are ours: the paper says at most 8 for most
# tasks and up to 20 for bias terms; the author advised 32 for MNLI at 1e-4.
LEARNING_RATES = (1e-4, 4e-4, 7e-4, 1e-3)
FULL_FT_RATES = (1e-5, 2e-5, 3e-5, 5e-5)
UNSEARCHED = {"roberta-base": {"full_ft": (1e-5,)} | dict.fromkeys(list(ROWS)[1:], (1e-4,))}
EPOCHS = {"cola": 16, "mrpc": 20, "rte": 20, "stsb": 16}
OTHER_EPOCHS = 8
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZE = 16
SIZES = (500, 1000, 2000, 4000, 8000, 16000)  # Figure 2's


class Cell(NamedTuple):
    """One command; `flags` are those of run_glue.py without what may differ between machines."""

    model: str
    row: str
    task: str
    size: int | None  # of a train-size curve
    flags: list
    hash: str

    @property
    def name(self):
        size = "" if self.size is None else f"-{self.size}"
        return f"{slug(self.model)}/{self.row}/{self.task}{size}"

    @property
    def args(self):
        """The flags' values: a dict, as in args.json."""
        return parse(self.flags)

    @property
    def rates(self):
        return self.args["learning_rate"]

    @property
    def seeds(self):
        return self.args["seed"]

    @property
    def runs(self):
        return len(self.rates) * len(self.seeds)

    def folders(self, output):
        """{Run: its folder}, rate after rate."""
        from bitfit.model.run_stack import Run

        runs = [Run(rate, seed) for rate in self.rates for seed in self.seeds]
        return folders_of(Path(output) / self.name, runs)

    def command(self, output, *more):
        """The words of the command that begins it, or goes on with it."""
        where = ["--output-path", str(Path(output) / self.name), "--resume"]
        return ["python", "run_glue.py", *self.flags, *more, *where]

    def shell(self, output):
        return shlex.join(self.command(output))


class Study(NamedTuple):
    """What is planned in a folder."""

    output: Path
    tables: list
    figures: list
    cells: list


def slug(model):
    """A model's folder in the study; local folders are absolute there."""
    return Path(model).name if Path(model).is_absolute() else model.replace("/", "--")


def absolute(path):
    """A folder that is there, by its whole path: workers may start elsewhere. Else as given."""
    return str(Path(path).absolute()) if path is not None and Path(path).is_dir() else path


def parse(words):
    return vars(options.parse_args("", ["--output-path", "-", *words]))


def wanted(tables, figures, models, tasks, rows, sizes):
    """(model, row, task, size) of all that tables and figures show, each once."""
    base = list(models or PAPERS_MODELS[:1])
    cells = []
    if 2 in tables:
        two = [row for row in ("full_ft", "bitfit") if row in rows]
        cells += [(m, r, t, None) for m in models or PAPERS_MODELS for t in tasks or PAPERS_TASKS
                  for r in two]  # fmt: skip
    if 3 in tables:
        cells += [(m, r, t, None) for m in base for t in tasks or PAPERS_TASKS for r in rows]
    if 1 in figures:
        cells += [(m, r, t, None) for m in base for t in tasks or ("rte",)
                  for r in ("bitfit", "b_m2+b_q")]  # fmt: skip
    if 2 in figures:
        cells += [(m, r, t, n) for m in base for t in tasks or ("qnli",) for n in sizes
                  for r in ("full_ft", "bitfit")]  # fmt: skip
    return list(dict.fromkeys(cells))


def make_cell(model, row, task, size, args):
    """The `Cell` of what `wanted` names, under the plan's flags."""
    kind = ROWS[row]
    rates = of(args.learning_rates, row) or papers_rates(model, row)
    seeds, epochs = of(args.seeds, row) or SEEDS, of(args.epochs, task) or [epochs_of(task)]
    words = ["--task-name", task, "--model-name", model]
    words += ["--fine-tune-type", kind.fine_tune_type]
    words += ["--bias-terms", *kind.bias_terms] if kind.bias_terms else []
    words += ["--learning-rate", *map(repr, rates)]
    words += ["--seed", *(str(int(seed)) for seed in seeds), "--epochs", str(int(epochs[0]))]
    words += ["--batch-size", str(args.batch_size)]
    more = {"max_seq_length": args.max_seq_length, "precision": args.precision}
    for name, value in ({"data_dir": absolute(args.data_dir)} | more).items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    if size or args.train_size:
        words += ["--train-size", str(size or args.train_size)]
    if row in ("full_ft", "bitfit") and not size and args.predict_test:
        words.append("--predict-test")
    return Cell(model, row, task, size, words, hash_of(words))


def of(values, name):
    """What is given for a name, else for all: {name or None: values}."""
    return values.get(name, values.get(None))


def papers_name(model):
    """What the paper calls a model: its name without organisation or folder."""
    return str(model).rstrip("/").rpartition("/")[2]


def papers_rates(model, row):
    given = UNSEARCHED.get(papers_name(model), {}).get(row)
    return given or (FULL_FT_RATES if row == "full_ft" else LEARNING_RATES)


def epochs_of(task):
    return EPOCHS.get(task, OTHER_EPOCHS)


def hash_of(words):
    """SHA-256, short, of all in a cell's flags that its results depend on."""
    return digest(settings_of(words))


def settings_of(words):
    free = HARMLESS - {"data_dir", "model_name"}
    return {name: value for name, value in parse(words).items() if name not in free}


def digest(settings):
    text = json.dumps({name: settings[name] for name in sorted(settings)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_of(facts, cell):
    """Whether an args.json is that of a cell's command."""
    expected = settings_of(cell.flags)
    free = () if expected["precision"] else ("precision",)
    return all(
        name in facts and as_list(facts[name]) == as_list(value)
        for name, value in expected.items()
        if name not in free
    )


def plan(output, args):
    """The `Study` of a plan's flags, with what was planned in that folder before.

    Raises:
        UserError: two models have one name, or a cell there was planned otherwise.
    """
    tables, figures = args.tables or [], args.figures or []
    models = args.models and [absolute(model) for model in args.models]
    keys = wanted(tables, figures, models, args.tasks, args.rows or ROWS, args.sizes)
    if not keys and (tables or figures):
        raise UserError("these --tables have none of these --rows: give other rows, or none")
    new = {cell.name: cell for cell in (make_cell(*key, args) for key in keys)}
    if len(new) < len(keys):
        raise UserError("two of --models have the same folder name: rename one")
    old = read(output) if os.path.exists(Path(output) / STUDY) else Study(Path(output), [], [], [])
    for cell in old.cells:
        if new.get(cell.name, cell).hash != cell.hash:
            what = f"{cell.name}: {difference(cell, new[cell.name])}"
            raise UserError(f"{output} was planned otherwise ({what}): give another --output-path")
    cells = {cell.name: cell for cell in old.cells} | new
    both = [sorted({*now, *before}) for now, before in ((tables, old.tables),
                                                       (figures, old.figures))]  # fmt: skip
    return Study(Path(output), *both, list(cells.values()))


def difference(old, new):
    """What is not the same in two cells of one name, in words."""
    before, after = settings_of(old.flags), settings_of(new.flags)
    return ", ".join(
        f"{name.replace('_', ' ')} {words(before[name])}, now {words(after[name])}"
        for name in before
        if before[name] != after[name]
    )


def words(value):
    return " ".join(map(str, as_list(value)))


def write(study):
    try:
        study.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made: {one_line(error)}: give another place"
        raise UserError(f"--output-path {study.output} {what}") from None
    content = study._asdict() | {"output": None, "cells": [c._asdict() for c in study.cells]}
    del content["output"]
    write_text(study.output / STUDY, json.dumps(content, indent=2) + "\n")


def read(output):
    """The `Study` in a folder.

    Raises:
        UserError: there is none, or it is not as it was written.
    """
    path = Path(output) / STUDY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [Cell(**cell) for cell in content["cells"]]
        for cell in cells:
            if not is_whole(cell):
                raise ValueError(f"{cell.name} was edited")
        shown = {name: sorted(map(int, content[name])) for name in ("tables", "figures")}
        return Study(Path(output), **shown, cells=cells)
    except FileNotFoundError:
        raise UserError(f"{output} holds no study: make one with `paper.py plan`") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a study: {error}; plan it anew") from None


def is_whole(cell):
    """Whether a cell that was read is as it was written."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            same = hash_of(cell.flags) == cell.hash
    except SystemExit:  # these are no flags of run_glue.py
        return False
    same = same and cell.args["model_name"] == cell.model and cell.args["task_name"] == cell.task
    known = cell.task in TASKS and cell.row in ROWS
    return same and known and (cell.size is None or isinstance(cell.size, int))


def one_number(kind, low, high=math.inf):
    """An argparse type: `7`, or `rte=7` for one task or row; several with commas between."""

    def convert(word):
        name, mark, values = word.rpartition("=")
        parsed = [
            options.number(kind, low, high, above=kind is float)(v) for v in values.split(",")
        ]
        return (name if mark else None, parsed)

    return convert
