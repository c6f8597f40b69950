"""What cells will cost: arithmetic from token counts and model sizes, rates from this machine.

A rate is floating point operations per second of training and scoring together. It is that of the
cells already done where there are any, else a short measurement (`--calibrate`).
"""

import json
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch

from bitfit.data.splits import read_split
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import MOST_ROWS_SCORED, Split, tokenize
from bitfit.model import forward as models_forward
from bitfit.model import loading
from bitfit.model.batching import MAX_TOKENS
from bitfit.model.predict import Limit
from bitfit.model.run_stack import Run, RunStack, reason_not_stackable
from bitfit.model.trainable import matrix_weights, select
from bitfit.results.scores import read_metrics
from bitfit.study import ledger
from bitfit.study.cells import ROWS, slug
from bitfit.training.loop import start, take_step
from bitfit.training.plan import Plan
from utils import UserError, blaming, one_line, write_text

RATES = "rates.json"
SAMPLED = 2000  # rows whose tokens are counted, evenly spaced
START_SECONDS = 8  # of a command: imports, data
LOAD_SECONDS = 1  # of a model
# Operations for each weight and token: forward, through the activations back, weights' gradients.
OPERATIONS = {"frozen": 2, "bitfit": 4, "full_ft": 6, "rand_uniform": 6, "rand_row_col": 6}
RUN_BYTES = 300_000  # pictures, metrics, args of a run
CALIBRATIONS = {"stacked": ("bitfit", 4), "single": ("bitfit", 1), "full": ("full_ft", 1)}


class Sizes(NamedTuple):
    """What the cost of a cell follows from."""

    weights: int  # of the encoder's matrices: each token is multiplied with all
    parameters: int  # all
    rows: dict  # {split: rows}
    tokens: dict  # {split: mean tokens of a row}
    classes: int


def sizes_of(cell):
    """The `Sizes` of a cell's model and data; UserError where they cannot be had."""
    args, task = cell.args, TASKS[cell.task]
    tokenizer = loading.load_tokenizer(cell.model)
    rows, tokens = {}, {}
    tests = task.server_files if args["predict_test"] else ()
    for split in ("train", *task.validation_splits, *tests):
        texts = read_split(task, split, args["data_dir"])
        if texts is None:
            continue
        rows[split] = len(texts)
        few = np.unique(np.linspace(0, len(texts) - 1, min(SAMPLED, len(texts))).astype(int))
        few = tokenize(texts.take(few), tokenizer, args["max_seq_length"])
        tokens[split] = float(few.lengths.mean())
    empty = empty_model(cell.model, task)
    parameters = sum(p.numel() for p in empty.parameters())
    return Sizes(matrix_weights(empty), parameters, rows, tokens, task.num_labels)


def empty_model(name, task):
    """A model without its weights."""
    with blaming(lambda error: loading.cannot_load(name, error)), torch.device("meta"):
        return loading.from_config(loading.load_config(name, task))


def operations(cell, sizes):
    """Floating point operations of all runs of a cell: training, scoring, test predictions."""
    args, task, row = cell.args, TASKS[cell.task], ROWS[cell.row]
    own = min(args["train_size"] or sizes.rows["train"], sizes.rows["train"])
    training = OPERATIONS[row.fine_tune_type] * args["epochs"] * own * sizes.tokens["train"]
    scored = min(own, MOST_ROWS_SCORED) * sizes.tokens["train"]
    scored += sum(sizes.rows[s] * sizes.tokens[s] for s in task.validation_splits)
    tests = sum(sizes.rows[s] * sizes.tokens[s] for s in task.server_files if s in sizes.rows)
    scoring = 2 * (args["epochs"] * scored + args["predict_test"] * tests)
    return sizes.weights * cell.runs * (training + scoring)


def disk_bytes(cell, sizes):
    """What a cell has on disk at most: what its runs leave, logits of all evaluations and test
    predictions included, and while full_ft trains two checkpoints of values and AdamW's moments.
    """
    task, args = TASKS[cell.task], cell.args
    each = 4 if task.is_regression else 2
    rows = sum(sizes.rows[s] for s in task.validation_splits)
    tests = sum(sizes.rows.get(s, 0) for s in task.server_files) * args["predict_test"]
    checkpoints = 2 * 3 * 4 * sizes.parameters if cell.row == "full_ft" else 0
    own = RUN_BYTES + args["epochs"] * rows * sizes.classes * each + 10 * tests
    return cell.runs * own + checkpoints


class Costs:
    """Estimates for the cells of a study, from what is done and what was measured."""

    def __init__(self, study):
        self.study, self.sizes, self.unknown = study, {}, {}
        self.measured = read_rates(study.output)
        self.done = [
            (cell, operations(cell, self.sizes_of(cell)), seconds)
            for cell in study.cells
            if (seconds := seconds_of(study, cell)) and self.sizes_of(cell)
        ]

    def sizes_of(self, cell):
        """The cell's `Sizes`, or None; `unknown` then says why."""
        key = cell.model, cell.task, cell.args["predict_test"]
        if key not in self.sizes:
            try:
                self.sizes[key] = sizes_of(cell)
            except UserError as error:
                self.sizes[key], self.unknown[key] = None, str(error)
        return self.sizes[key]

    def rate(self, cell):
        """FLOP/s of such a cell: that of done cells of its row, of its kind, or as measured."""
        kind = kind_of(cell)
        same = [item for item in self.done if item[0].model == cell.model]
        for alike in ([i for i in same if i[0].row == cell.row],
                      [i for i in same if kind_of(i[0]) == kind]):  # fmt: skip
            if alike:
                return sum(i[1] for i in alike) / sum(i[2] for i in alike)
        return self.measured.get(slug(cell.model), {}).get(kind)

    def seconds(self, cell):
        """The estimate, or None where nothing is known."""
        rate, sizes = self.rate(cell), self.sizes_of(cell)
        loads = 1 if kind_of(cell) == "stacked" else cell.runs
        starts = START_SECONDS + LOAD_SECONDS * loads
        return (operations(cell, sizes) / rate + starts) if rate and sizes else None

    def seconds_apart(self, cell):
        """The same with one command for each run; None where a single run was not measured."""
        rate, sizes = self.rate(cell), self.sizes_of(cell)
        if kind_of(cell) == "stacked":
            measured = self.measured.get(slug(cell.model), {})
            rate = rate and measured and rate * measured["single"] / measured["stacked"]
        starts = (START_SECONDS + LOAD_SECONDS) * cell.runs
        return (operations(cell, sizes) / rate + starts) if rate and sizes else None

    def bytes(self, cell):
        sizes = self.sizes_of(cell)
        return sizes and disk_bytes(cell, sizes)


def kind_of(cell):
    return ("stacked" if cell.runs > 1 else "single") if ROWS[cell.row].stacks else "full"


def seconds_of(study, cell):
    """What a done cell took: all of its runs' seconds; None where it is not done."""
    if ledger.state_of(study, cell) != "done":
        return None
    folder = ledger.folder_of(study, cell)
    files = sorted(folder.rglob("metrics.json"))
    with blaming(lambda error: UserError(f"{folder} cannot be read: {one_line(error)}")):
        return sum(sum(read_metrics(file.parent)[0]["seconds"].values()) for file in files)


def read_rates(output):
    """{model: {kind: FLOP/s}} as they were measured; nothing where that cannot be read."""
    try:
        rates = json.loads((output / RATES).read_text(encoding="utf-8"))
        return {model: own for model, own in rates.items() if set(own) >= set(CALIBRATIONS)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def calibrate(study, device, dtype):
    """Measure the rates of the study's models here, and write them to it."""
    rates = read_rates(study.output)
    for cell in {cell.model: cell for cell in study.cells}.values():
        own = {kind: measure(cell, *what, device, dtype) for kind, what in CALIBRATIONS.items()}
        rates[slug(cell.model)] = own | {"device": str(device), "dtype": str(dtype)}
        write_text(study.output / RATES, json.dumps(rates, indent=2) + "\n")


def measure(cell, method, runs, device, dtype):
    """FLOP/s of training steps of a cell's task and batch: the median of four, after a first."""
    task, args = TASKS[cell.task], cell.args
    texts = read_split(task, "train", args["data_dir"])
    size = min(len(texts), args["batch_size"])
    picked = np.linspace(0, len(texts) - 1, 5 * size).astype(int)
    tokenizer = loading.load_tokenizer(cell.model)
    tokens = tokenize(texts.take(picked), tokenizer, args["max_seq_length"]).to(device)
    model, _ = loading.load(cell.model, task)
    forward = models_forward.find_forward(model.to(device), cell.model, tokens, dtype)
    chosen = select(model, method, ["bias"] if method == "bitfit" else [])
    if runs > 1 and reason_not_stackable(forward, chosen, tokens):
        return measure(cell, method, 1, device, dtype)
    rows = dict.fromkeys(range(runs), np.arange(len(picked)))
    limit = Limit(MAX_TOKENS[device.type], device)
    plan = Plan(task, forward, Split(tokens, rows), {}, limit, size, epochs=1)
    stack = RunStack(model, chosen, [Run(1e-5, seed) for seed in range(runs)], loading.draw_head)
    state, alive = start(plan, stack), np.arange(runs)
    model.train()
    with stack.patched(dtype):
        steps = [step_rate(state, alive, np.arange(i * size, (i + 1) * size)) for i in range(5)]
    return OPERATIONS[method] * matrix_weights(model) * statistics.median(steps[1:])


def step_rate(state, alive, rows):
    """Tokens per second of one step in which all runs have the same rows."""
    begin = time.perf_counter()
    take_step(state, alive, np.tile(rows, (len(alive), 1))).sum().item()
    tokens = int(state.plan.train.tokens.lengths[rows].sum()) * len(alive)
    return tokens / (time.perf_counter() - begin)
