"""Estimated hours of cells, from token counts, model sizes and the speed of this machine.

The speed is in floating point operations per second, for training and scoring together. Finished
cells give the speed, or else a short measurement (`--calibrate`).
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bitfit.data.splits import find_split
from bitfit.data.tokens import MAX_ROWS_SCORED, tokenize
from bitfit.files import write_text
from bitfit.model import loading
from bitfit.model.bias_terms import model_of_config
from bitfit.model.run import Run
from bitfit.model.trainable import matrix_weights
from bitfit.results.scores import explain_unreadable, read_metrics
from bitfit.study import cell_states
from bitfit.study.cell_tasks import data_dir_of, task_of
from bitfit.study.cells import Cell, Study, slug
from bitfit.study.protocol import ROWS
from bitfit.training.loop import train_step
from bitfit.training.plan import TrainOptions
from bitfit.training.state import TrainState
from bitfit.training.train import start_training
from glue_evaluator import GLUEvaluator
from utils import UserError

RATES = "rates.json"
SAMPLED = 2000  # examples whose tokens are counted, evenly spaced
START_SECONDS = 8  # per command: imports, data
LOAD_SECONDS = 1  # per model
# Operations per weight and token: forward, gradients of activations, gradients of weights.
OPERATIONS = {"frozen": 2, "bitfit": 4, "full_ft": 6, "rand_uniform": 6, "rand_row_col": 6}
# {kind of cell: (fine-tune type, runs)} of the measured trainings
CALIBRATIONS = {"stacked": ("bitfit", 4), "single": ("bitfit", 1), "full": ("full_ft", 1)}


class Sizes(NamedTuple):
    """The sizes that determine the hours of a cell."""

    weights: int  # in the encoder's matrices
    rows: dict[str, int]  # {split: examples}
    tokens: dict[str, float]  # {split: mean tokens per example}


def cell_sizes(cell: Cell) -> Sizes:
    """Return the sizes of a cell's model and data; UserError if they cannot be read."""
    args, task = cell.args, task_of(cell.args)
    tokenizer = loading.load_tokenizer(cell.model, for_words=task.is_tagging)
    rows, tokens = {}, {}
    tests = task.server_files if args["predict_test"] else ()
    for split in ("train", *task.validation_splits, *tests):
        texts = find_split(task, split, data_dir_of(args))
        if texts is None:
            continue
        rows[split] = len(texts)
        sampled = np.unique(np.linspace(0, len(texts) - 1, min(SAMPLED, len(texts))).astype(int))
        sample = tokenize(texts.take(sampled), tokenizer, args["max_seq_length"])
        tokens[split] = float(sample.lengths.mean())
    return Sizes(matrix_weights(model_of_config(cell.model, task)), rows, tokens)


def operations(cell: Cell, sizes: Sizes) -> float:
    """Return the floating point operations of a cell: training, scoring and test predictions."""
    args, task, row = cell.args, task_of(cell.args), ROWS[cell.row]
    examples = min(args["train_size"] or sizes.rows["train"], sizes.rows["train"])
    training = OPERATIONS[row.fine_tune_type] * args["epochs"] * examples * sizes.tokens["train"]
    most = args["train_score_rows"]
    scored = min(examples, MAX_ROWS_SCORED if most is None else most) * sizes.tokens["train"]
    scored += sum(sizes.rows[s] * sizes.tokens[s] for s in task.validation_splits)
    tests = sum(sizes.rows[s] * sizes.tokens[s] for s in task.server_files if s in sizes.rows)
    scoring = 2 * (args["epochs"] * scored + args["predict_test"] * tests)
    return sizes.weights * cell.runs * (training + scoring)


class Costs:
    """Cost estimates for the cells of a study, from finished cells and measured speeds."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sizes: dict[tuple, Sizes | None] = {}
        self.unknown: dict[tuple, str] = {}  # the reason why sizes are not known
        # {model: {kind: FLOP/s}}, empty if there is none
        self.measured = cell_states.read_object(study.output / RATES) or {}
        self.done = [
            (cell, operations(cell, sizes), seconds)
            for cell in study.cells
            if (seconds := training_seconds(study, cell)) and (sizes := self.cell_sizes(cell))
        ]

    def cell_sizes(self, cell: Cell) -> Sizes | None:
        """Return the cell's sizes, or None with the reason in `unknown`."""
        key = cell.model, cell.task, cell.args["predict_test"]
        if key not in self.sizes:
            try:
                self.sizes[key] = cell_sizes(cell)
            except UserError as error:
                self.sizes[key], self.unknown[key] = None, str(error)
        return self.sizes[key]

    def rate(self, cell: Cell) -> float | None:
        """Return FLOP/s of finished cells of the row, else of the kind, else as calibrated."""
        kind = cost_kind(cell)
        same = [item for item in self.done if item[0].model == cell.model]
        for similar in ([i for i in same if i[0].row == cell.row],
                        [i for i in same if cost_kind(i[0]) == kind]):  # fmt: skip
            if similar:
                return sum(i[1] for i in similar) / sum(i[2] for i in similar)
        return self.measured.get(slug(cell.model), {}).get(kind)

    def seconds(self, cell: Cell) -> float | None:
        """Return the estimated seconds of a cell, or None if unknown."""
        rate, sizes = self.rate(cell), self.cell_sizes(cell)
        loads = 1 if cost_kind(cell) == "stacked" else cell.runs
        starts = START_SECONDS + LOAD_SECONDS * loads
        return (operations(cell, sizes) / rate + starts) if rate and sizes else None


def cost_kind(cell: Cell) -> str:
    """Return how a cell's runs are computed, a key of CALIBRATIONS."""
    return ("stacked" if cell.runs > 1 else "single") if ROWS[cell.row].stacks else "full"


def training_seconds(study: Study, cell: Cell) -> float | None:
    """Return the seconds of all runs of a finished cell without start-up; None for other cells."""
    if cell_states.cell_state(study, cell) != "done":
        return None
    folder = cell_states.cell_folder(study, cell)
    files = sorted(folder.rglob("metrics.json"))
    with explain_unreadable(folder):
        return sum(sum(read_metrics(file.parent)[0]["seconds"].values()) for file in files)


def calibrate(study: Study, gpu: int | None, precision: str | None) -> None:
    """Measure the speed of the study's models on this machine, and write rates.json."""
    rates = cell_states.read_object(study.output / RATES) or {}
    seeds = list(range(CALIBRATIONS["stacked"][1]))
    cells = sorted(study.cells, key=lambda cell: cell.args["add_biases"])
    for cell in {cell.model: cell for cell in cells}.values():
        args = cell.args
        evaluator = GLUEvaluator(
            args["task_file"] or args["task_name"], cell.model, gpu, seed=seeds,
            data_dir=data_dir_of(args), precision=precision, add_biases=args["add_biases"],
        )  # fmt: skip
        size, setup = args["batch_size"], evaluator.setup
        evaluator.preprocess_dataset("longest", args["max_seq_length"], size, train_size=size)
        measured = {kind: measure_rate(evaluator, *how) for kind, how in CALIBRATIONS.items()}
        machine = {"device": str(setup.device), "dtype": str(setup.dtype)}
        rates[slug(cell.model)] = measured | machine
        write_text(study.output / RATES, json.dumps(rates, indent=2) + "\n")


def measure_rate(evaluator: GLUEvaluator, fine_tune_type: str, runs: int) -> float:
    """Return the median FLOP/s of four training steps, after one that is not counted."""
    components = ["bias"] if fine_tune_type == "bitfit" else []
    chosen = [Run(1e-5, seed) for seed in range(runs)]
    evaluator.prepare(fine_tune_type, 1e-5, components=components, verbose=False, only=chosen)
    if len(evaluator.passes()) > 1:
        return measure_rate(evaluator, fine_tune_type, 1)
    prepared, data = evaluator.need_prepared(), evaluator.need_loaded()
    options = TrainOptions(batch_size=data.batch_size, epochs=1)
    state = start_training(prepared, data, options, group=evaluator.group)
    rows = np.stack([state.plan.order(run, 0) for run in prepared.runs])
    prepared.model.train()
    with state.stack.patched(prepared.dtype):
        _, *speeds = [tokens_per_second(state, rows) for _ in range(5)]
    per_token = OPERATIONS[fine_tune_type] * matrix_weights(prepared.model)
    return per_token * statistics.median(speeds)


def tokens_per_second(
    state: TrainState, rows: np.ndarray, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the tokens per second of one step in which the runs have the rows (R, B)."""
    begin = clock()
    train_step(state, np.arange(len(rows)), rows).sum().item()
    return int(state.plan.train.tokens.lengths[rows].sum()) / (clock() - begin)
