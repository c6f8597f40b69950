"""Estimated cost of cells, from token counts, model sizes and the speed of this machine.

The speed is in floating point operations per second, for training and scoring together. Finished
cells give the speed, or else a short measurement (`--calibrate`).
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bitfit.data.splits import find_split, read_split
from bitfit.data.tasks import Task
from bitfit.data.tokens import MAX_ROWS_SCORED, Split, tokenize
from bitfit.files import write_text
from bitfit.model import loading
from bitfit.model.added_biases import add_biases
from bitfit.model.run import Run
from bitfit.model.trainable import matrix_weights, select_trainable
from bitfit.results.scores import explain_unreadable, read_metrics
from bitfit.study import cell_states
from bitfit.study.cell_tasks import data_dir_of, task_of
from bitfit.study.cells import Cell, Study, slug
from bitfit.study.protocol import ROWS
from bitfit.training.loop import train_step
from bitfit.training.plan import TrainOptions
from bitfit.training.prepare import assemble
from bitfit.training.state import TrainState
from bitfit.training.train import new_training
from utils import UserError, convert_errors

RATES = "rates.json"
SAMPLED = 2000  # examples whose tokens are counted, evenly spaced
START_SECONDS = 8  # per command: imports, data
LOAD_SECONDS = 1  # per model
# Operations per weight and token: forward, gradients of activations, gradients of weights.
OPERATIONS = {"frozen": 2, "bitfit": 4, "full_ft": 6, "rand_uniform": 6, "rand_row_col": 6}
RUN_BYTES = 300_000  # figures, metrics and args.json of a run
CALIBRATIONS = {"stacked": ("bitfit", 4), "single": ("bitfit", 1), "full": ("full_ft", 1)}


class Sizes(NamedTuple):
    """The sizes that determine the cost of a cell."""

    weights: int  # in the encoder's matrices
    parameters: int  # in the whole model
    rows: dict[str, int]  # {split: examples}
    tokens: dict[str, float]  # {split: mean tokens per example}
    classes: int
    labels: dict[str, int]  # {split: examples, or for tagging words}


def cell_sizes(cell: Cell) -> Sizes:
    """Return the sizes of a cell's model and data; UserError if they cannot be read."""
    args, task = cell.args, task_of(cell.args)
    tokenizer = loading.load_tokenizer(cell.model, for_words=task.is_tagging)
    rows, labels, tokens = {}, {}, {}
    tests = task.server_files if args["predict_test"] else ()
    for split in ("train", *task.validation_splits, *tests):
        texts = find_split(task, split, data_dir_of(args))
        if texts is None:
            continue
        rows[split] = len(texts)
        labels[split] = len(texts) if texts.labels is None else len(texts.labels)
        sampled = np.unique(np.linspace(0, len(texts) - 1, min(SAMPLED, len(texts))).astype(int))
        sample = tokenize(texts.take(sampled), tokenizer, args["max_seq_length"])
        tokens[split] = float(sample.lengths.mean())
    empty = model_without_weights(cell.model, task)
    parameters = sum(p.numel() for p in empty.parameters())
    return Sizes(
        weights=matrix_weights(empty), parameters=parameters, rows=rows, labels=labels,
        tokens=tokens, classes=task.num_labels,
    )  # fmt: skip


def model_without_weights(name: str, task: Task) -> torch.nn.Module:
    """Return a model on the device `meta`, which has no weights."""
    with convert_errors(lambda error: loading.cannot_load(name, error)):
        return loading.build_model_without_weights(loading.load_config(name, task), task)


def operations(cell: Cell, sizes: Sizes) -> float:
    """Return the floating point operations of a cell: training, scoring and test predictions."""
    args, task, row = cell.args, task_of(cell.args), ROWS[cell.row]
    examples = min(args["train_size"] or sizes.rows["train"], sizes.rows["train"])
    training = OPERATIONS[row.fine_tune_type] * args["epochs"] * examples * sizes.tokens["train"]
    scored = min(examples, MAX_ROWS_SCORED) * sizes.tokens["train"]
    scored += sum(sizes.rows[s] * sizes.tokens[s] for s in task.validation_splits)
    tests = sum(sizes.rows[s] * sizes.tokens[s] for s in task.server_files if s in sizes.rows)
    scoring = 2 * (args["epochs"] * scored + args["predict_test"] * tests)
    return sizes.weights * cell.runs * (training + scoring)


def disk_bytes(cell: Cell, sizes: Sizes) -> int:
    """Return the largest size of a cell on disk, in bytes.

    A cell's files are the logits of all evaluations, test predictions, and for full_ft two
    checkpoints with parameters and AdamW's moments.
    """
    task, args = task_of(cell.args), cell.args
    bytes_per_logit = 4 if task.is_regression else 2
    labels = sum(sizes.labels[s] for s in task.validation_splits)
    tests = sum(sizes.rows.get(s, 0) for s in task.server_files) * args["predict_test"]
    checkpoints = 2 * 3 * 4 * sizes.parameters if cell.row == "full_ft" else 0
    run_bytes = RUN_BYTES + args["epochs"] * labels * sizes.classes * bytes_per_logit + 10 * tests
    return cell.runs * run_bytes + checkpoints


class Costs:
    """Cost estimates for the cells of a study, from finished cells and measured speeds."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sizes: dict[tuple, Sizes | None] = {}
        self.unknown: dict[tuple, str] = {}  # the reason why sizes are not known
        self.measured = read_rates(study.output)
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

    def seconds_one_by_one(self, cell: Cell) -> float | None:
        """Return the seconds with one command per run; None if no single run was measured."""
        rate, sizes = self.rate(cell), self.cell_sizes(cell)
        if cost_kind(cell) == "stacked":
            measured = self.measured.get(slug(cell.model), {})
            faster = measured["single"] / measured["stacked"] if measured else None
            rate = rate and faster and rate * faster
        starts = (START_SECONDS + LOAD_SECONDS) * cell.runs
        return (operations(cell, sizes) / rate + starts) if rate and sizes else None

    def bytes(self, cell: Cell) -> int | None:
        """Return the largest size of a cell on disk in bytes, or None if unknown."""
        sizes = self.cell_sizes(cell)
        return sizes and disk_bytes(cell, sizes)


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


def read_rates(output: Path) -> dict[str, dict[str, Any]]:
    """Return the measured {model: {kind: FLOP/s}}, empty if the file cannot be read."""
    try:
        rates = json.loads((output / RATES).read_text(encoding="utf-8"))
        return {model: kinds for model, kinds in rates.items() if set(kinds) >= set(CALIBRATIONS)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def calibrate(study: Study, device: torch.device, dtype: torch.dtype) -> None:
    """Measure the speed of the study's models on this machine, and write rates.json."""
    rates = read_rates(study.output)
    cells = sorted(study.cells, key=lambda cell: cell.args["add_biases"])
    for cell in {cell.model: cell for cell in cells}.values():
        measured = {
            kind: measure_rate(cell, method, runs, device=device, dtype=dtype)
            for kind, (method, runs) in CALIBRATIONS.items()
        }
        rates[slug(cell.model)] = measured | {"device": str(device), "dtype": str(dtype)}
        write_text(study.output / RATES, json.dumps(rates, indent=2) + "\n")


def measure_rate(
    cell: Cell, method: str, runs: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the median FLOP/s of four training steps, after one that is not counted."""
    task, args = task_of(cell.args), cell.args
    texts = read_split(task, "train", data_dir_of(args))
    size = min(len(texts), args["batch_size"])
    picked = np.linspace(0, len(texts) - 1, 5 * size).astype(int)
    tokenizer = loading.load_tokenizer(cell.model, for_words=task.is_tagging)
    tokens = tokenize(texts.take(picked), tokenizer, args["max_seq_length"]).to(device)
    model, _ = loading.load_model(cell.model, task)
    if args["add_biases"]:
        add_biases(model)
    prepared = assemble(
        model.to(device),
        cell.model,
        select_trainable(model, method, ["bias"] if method == "bitfit" else []),
        runs=[Run(1e-5, seed) for seed in range(runs)],
        dtype=dtype,
        tokens=tokens,
    )
    prepared = replace(prepared, init_head=loading.init_head)
    if runs > 1 and prepared.reason_not_stackable(tokens):
        return measure_rate(cell, method, 1, device=device, dtype=dtype)
    train = Split(tokens, dict.fromkeys(range(runs), np.arange(len(picked))))
    state = new_training(
        prepared, task, train, scored={}, options=TrainOptions(batch_size=size, epochs=1)
    )
    finite = np.arange(runs)
    model.train()
    with state.stack.patched(dtype):
        steps = [
            tokens_per_second(state, finite, np.arange(i * size, (i + 1) * size)) for i in range(5)
        ]
    return OPERATIONS[method] * matrix_weights(model) * statistics.median(steps[1:])


def tokens_per_second(
    state: TrainState,
    finite: np.ndarray,
    rows: np.ndarray,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the tokens per second of one step in which all runs have the same rows (B,)."""
    begin = clock()
    train_step(state, finite, np.tile(rows, (len(finite), 1))).sum().item()
    tokens = int(state.plan.train.tokens.lengths[rows].sum()) * len(finite)
    return tokens / (clock() - begin)
