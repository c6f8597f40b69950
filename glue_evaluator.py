"""GLUEvaluator: fine-tune and score one BERT-family model on one task.

set_seed(0)
evaluator = GLUEvaluator("rte", "bert-base-cased", device=0)
evaluator.preprocess_dataset("longest", max_sequence_len=128, batch_size=16)
terms = GLUEvaluator.convert_to_actual_components(["query", "intermediate"])
evaluator.training_preparation(1e-3, "adamw", False, terms)
evaluator.train_and_evaluate(16, "out")
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from bitfit.artifacts import metrics_files, run_folder, saved_evaluator
from bitfit.artifacts.prediction_files import write_test_predictions
from bitfit.data.tasks import Task
from bitfit.data.tokens import TokenizedSplit
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model import loading, trainable
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.parsing import POSITIVE, check_values
from bitfit.results import plots
from bitfit.results import scores as reports
from bitfit.tracking.tracker import OFF, Tracker
from bitfit.training import prepare
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.plan import TrainOptions
from bitfit.training.prepare import PreparedModel
from bitfit.training.result import TrainingResult, new_result
from bitfit.training.setup import LoadedData, Method, Seeds, load_data, make_setup, need
from bitfit.training.state import Record
from bitfit.training.train import start_training, train
from utils import Diverged, UserError, setup_default_logging
from utils import set_seed as set_seed  # a name of the released code


class GLUEvaluator:
    """Fine-tune and score one model on one task; methods raise UserError for invalid input.

    An evaluator has K >= 1 runs. Predictions, files and plots belong to the selected run, which is
    the first until `select` chooses another.

    Attributes:
        setup: the task, the base model and the machine.
        loaded: the tokenized data; None before `preprocess_dataset`.
        prepared: the model and its trainable parameters; None before `prepare`.
        result: trained values, scores and records; None before `train_and_evaluate`.
        group: the processes that train and predict together.
    """

    def __init__(
        self, task_name: str | dict[str, Any], model_name: str, device: int | None,
        seed: Seeds = None, data_dir: str | Path | None = None, precision: str | None = None,
        random_encoder: bool = False, max_tokens: int | None = None,
        model_revision: str | None = None, add_biases: bool = False, data_seed: Seeds = None,
    ) -> None:  # fmt: skip
        """Load nothing yet; see `make_setup` for the arguments."""
        setup_default_logging()
        self.setup = make_setup(
            task_name, model_name, device, seed=seed, data_dir=data_dir, precision=precision,
            random_encoder=random_encoder, max_tokens=max_tokens, model_revision=model_revision,
            add_biases=add_biases, data_seed=data_seed,
        )  # fmt: skip
        self.loaded: LoadedData | None = None
        self.prepared: PreparedModel | None = None
        self.result: TrainingResult | None = None
        self.group: Group = SINGLE_PROCESS

    def with_parts(self, *, result: TrainingResult, prepared: PreparedModel | None = None) -> Self:
        """Return a copy with another result; prepared: another model, None: the same one."""
        other = copy(self)
        other.prepared, other.result = prepared or self.prepared, result
        return other

    convert_to_actual_components = staticmethod(trainable.terms_to_components)

    def preprocess_dataset(
        self, padding: str | bool, max_sequence_len: int, batch_size: int,
        train_size: int | None = None, test_splits: bool = False,
        train_score_rows: int | None = None,
    ) -> None:  # fmt: skip
        """Read and tokenize the splits, as `LoadedData` says; padding does not change results."""
        if padding not in ("max_length", "longest", True):
            raise UserError(f"padding {padding!r}: give 'longest' or 'max_length'")
        rows = {"train_size": train_size, "train_score_rows": train_score_rows}
        self.loaded = load_data(self.setup, max_sequence_len, batch_size, **rows)
        self.loaded.read_splits(test_splits)

    def tokens(self, split: str) -> TokenizedSplit:
        """Return the tokens of a split; UserError if it does not exist."""
        return self.need_loaded().tokens(split)

    def fingerprints(self) -> dict[str, Any]:
        """Return the hashes of the data, the base model and the trainable parameters."""
        return self.need_prepared().fingerprints(self.need_loaded())

    def training_preparation(
        self, learning_rate: float | Sequence[float], optimizer: str, encoder_trainable: bool,
        trainable_components: Sequence[str] | None = None, verbose: bool = True,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        """Call `prepare` with the released code's arguments; seed: one of them, or None: all."""
        kind = Method.released_type(encoder_trainable, trainable_components)
        runs = prepare.make_runs(self.setup, learning_rate, only_seed=seed)
        terms = trainable_components
        self.prepare(kind, learning_rate, optimizer, components=terms, verbose=verbose, only=runs)

    def prepare(
        self, fine_tune_type: str, learning_rate: float | Sequence[float],
        optimizer: str = "adamw", components: Sequence[str] | Sequence[Sequence[str]] | None = None,
        mask_size: int | None = None, verbose: bool = True, only: Sequence[Run] | None = None,
        start_from: str | Path | None = None,
    ) -> None:  # fmt: skip
        """Load the model and select the trainable parameters; see `Method` for the other arguments.

        Args:
            learning_rate: before any schedule; a list: a run for each rate.
            components: the bias terms of bitfit; a list of lists: runs for each of them.
            verbose: print the trained tensors.
            only: some of the runs; None: all combinations of a learning rate with the seeds.
            start_from: folder of a saved evaluator, with whose values all runs start.
        """
        runs = only or prepare.make_runs(self.setup, learning_rate)
        terms, runs = prepare.assign_terms(components, runs)
        source = start_from, self.setup, self.need_loaded()
        start = saved_evaluator.read_warm_start(*source, fine_tune_type=fine_tune_type)
        method = Method(fine_tune_type, terms, mask_size, optimizer=optimizer, start=start)
        self.prepare_runs(runs, method, verbose)

    def prepare_runs(
        self, runs: list[Run], method: Method | None = None, verbose: bool = False
    ) -> None:
        """Load the model again for some runs; method None: as it was prepared before."""
        before, method = self.prepared, method or self.need_prepared().method
        self.prepared, self.result = None, None
        parts = self.setup, self.need_loaded(), runs
        self.prepared = prepare.prepare_model(*parts, method, before=before, verbose=verbose)

    def set_uniform_mask(self, mask_size: int | None = None) -> None:
        """Train parameters drawn uniformly from the encoder, and the classifier."""
        self.prepared = self.need_prepared().with_mask("rand_uniform", mask_size, self.result)

    def set_row_and_column_random_mask(self) -> None:
        """Train one random column or some rows of each matrix, and the classifier."""
        self.prepared = self.need_prepared().with_mask("rand_row_col", None, self.result)

    def passes(self, share: Sequence[Run] | None = None) -> list[list[Run]]:
        """Return the runs of a share (None: all) that train together: all, or each alone."""
        return self.need_prepared().passes(self.tokens("train"), share)

    def join_group(self, group: Group) -> None:
        """Train and predict together with other processes from now on."""
        self.group = group

    def train_and_evaluate(
        self, num_epochs: int, output_path: str | Path | dict[Run, Path] | None = None,
        evaluation_frequency: int = 1, lr_schedule: str = "constant", warmup_ratio: float = 0.0,
        keep: str = "last", checkpoints: CheckpointManager | None = None, tracker: Tracker = OFF,
        curves: bool = True, halving: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Train all runs together, evaluate them, write metrics and learning curves.

        Args:
            output_path: folder for metrics and curves; several runs have folders `Run.name` in it.
                Or {run: folder} for some runs; the others write nothing.
            evaluation_frequency and the following: see `TrainOptions` and the classes.

        Raises:
            Diverged: every run had a loss or gradient that was not finite. The last finite values
                (with keep="best" the best) and the scores stay.
        """
        prepared, data = self.need_prepared(), self.need_loaded()
        options = TrainOptions(data.batch_size, num_epochs, lr_schedule, warmup_ratio=warmup_ratio,
                               evaluation_frequency=evaluation_frequency, keep=keep,
                               halving=check_values("halving", halving, POSITIVE))  # fmt: skip
        if self.result:
            raise UserError("this evaluator has been trained: prepare it again to train again")
        state = start_training(prepared, data, options, group=self.group)
        self.result = new_result(state.stack)
        folders = run_folder.run_folders(output_path, self.runs)
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        write = partial(metrics_files.write_metrics, state, self.result, folders=folders,
                        setup=self.setup, data=data, prepared=prepared)  # fmt: skip
        checkpoints = checkpoints or CheckpointManager()
        diverged = train(state, self.result, dtype=self.setup.dtype, checkpoints=checkpoints,
                         tracker=tracker, folders=folders, write=write)  # fmt: skip
        for run, folder in folders.items() if curves else ():
            if len(self.result.scores_of(run)):
                self.plot_learning_curves(folder, run)
        if diverged:
            raise Diverged(diverged)

    def evaluate_only(self, folders: dict[Run, Path]) -> None:
        """Score the prepared model without training; write metrics and logits to the folders."""
        parts = self.setup, self.need_loaded(), self.need_prepared()
        self.result = metrics_files.score_initial(*parts, group=self.group, folders=folders)

    def select(self, run: int) -> None:
        """Select a run, counted from 0, for the model and for the results of all methods."""
        self.need_result().select(run)

    def predict(self, split: str) -> np.ndarray:
        """Return the logits of all rows of a split, or of their words, (rows, C) float32."""
        return self.need_prepared().predict(self.need_loaded(), split, self.group)

    def evaluate(self, split: str) -> dict[str, float]:
        """Return {metric: value} of all rows of a split with labels."""
        return self.need_loaded().score(split, self.predict)

    def export_model_test_set_predictions(self, output_path: str | Path) -> list[Path]:
        """Write the test predictions as files for the GLUE server, and return their paths."""
        data = self.need_loaded()
        return write_test_predictions(output_path, data, self.predict, group=self.group)

    def score_table(self) -> str:
        """Return the last and best scores as text."""
        scores = self.need_result().scores_of(self.record.run)
        return f"{self.caption}\n{reports.score_table(scores, self.task)}"

    def plot_learning_curves(
        self, output_path: str | Path | None = None, run: Run | None = None
    ) -> dict[str, Any]:
        """Return {metric: figure}, and save learning_curves_<metric>.png in a folder if given."""
        run = run or self.record.run
        caption = f"{self.setup.caption(self.need_prepared().method_of(run))}, {run.caption}"
        scores = self.need_result().require_scores_of(run)
        return plots.learning_curves(scores, self.task, caption, folder=output_path)

    def terms_changes(self) -> pd.DataFrame:
        """Return the mean change of each bias term in each layer; see `plots.bias_changes`."""
        return self.need_prepared().bias_changes(self.need_result())

    def plot_terms_changes(self, output_path: str | Path | None = None) -> "plots.Figure":
        """Return the paper's Figure 1; save the figure as .png and the numbers as .csv."""
        return plots.plot_bias_changes(self.terms_changes(), self.caption, path=output_path)

    def export_model(self, output_path: str | Path) -> None:
        """Write a plain Hugging Face folder: weights, config with label names, tokenizer."""
        loading.write_model(self.model, self.need_loaded().tokenizer, output_path)

    def save(self, output_path: str | Path) -> None:
        """Write the selected run: metadata and trained values (the whole model if all trained)."""
        parts = self.need_result(), self.need_prepared(), self.need_loaded(), self.setup
        saved_evaluator.write_evaluator(*parts, folder=Path(output_path))

    @staticmethod
    def load(
        path: str | Path, gpu_device: int | None, model_name: str | None = None,
        data_dir: str | Path | None = None,
    ) -> "GLUEvaluator":  # fmt: skip
        """Return a saved evaluator; model_name and data_dir: where base model and data are now."""
        arguments, saved = saved_evaluator.read_evaluator(Path(path), model_name, data_dir)
        new = GLUEvaluator(device=gpu_device, **arguments)
        restored = saved_evaluator.restore_evaluator(new.setup, Path(path), *saved)
        new.setup, new.loaded, new.prepared, new.result = restored
        return new

    def need_loaded(self) -> LoadedData:
        """Return the data; UserError before `preprocess_dataset`."""
        return need(self.loaded, "preprocess_dataset")

    def need_prepared(self) -> PreparedModel:
        """Return the prepared model; UserError before `training_preparation` or `prepare`."""
        return need(self.prepared, "training_preparation")

    def need_result(self) -> TrainingResult:
        """Return the result; UserError before `train_and_evaluate`."""
        return need(self.result, "train_and_evaluate")

    @property
    def task(self) -> Task:
        return self.setup.task

    @property
    def num_labels(self) -> int:
        return self.setup.task.num_labels

    @property
    def model(self) -> torch.nn.Module:
        """Return the plain Hugging Face classifier."""
        return self.need_prepared().model

    @property
    def runs(self) -> list[Run]:
        return self.need_prepared().runs

    @property
    def stack(self) -> RunStack:
        """Return the trained and the initial values of all runs."""
        return self.need_result().stack

    @property
    def record(self) -> Record:
        """Return losses, times and divergence of the selected run."""
        return self.need_result().record

    @property
    def evaluations(self) -> dict[str, dict[str, list[float]]]:
        """Return {split: {metric: [value at each evaluated epoch]}} of the selected run."""
        return reports.scores_by_split(self.need_result().scores_of(self.record.run))

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Return {parameter: bool tensor of its shape}, True where a random mask trains."""
        return self.need_prepared().masks

    @property
    def caption(self) -> str:
        """Return one line with task, model, method and the selected run."""
        result, prepared = self.need_result(), self.need_prepared()
        return f"{self.setup.caption(prepared.method_of(result.record.run))}, {result.caption}"
