"""GLUEvaluator: fine-tune and score one BERT-family model on one task.

set_seed(0)
evaluator = GLUEvaluator("rte", "bert-base-cased", device=0)
evaluator.preprocess_dataset("longest", max_sequence_len=128, batch_size=16)
terms = GLUEvaluator.convert_to_actual_components(["query", "intermediate"])
evaluator.training_preparation(1e-3, "adamw", False, terms)
evaluator.train_and_evaluate(16, "out")

With several seeds or learning rates it trains one run for each pair of them.
"""

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfit.artifacts import metrics_files, run_folder, saved_evaluator
from bitfit.data.tasks import Task, predictions, score
from bitfit.data.tokens import TokenizedSplit
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model import loading, predict, trainable
from bitfit.model.precision import cast_parameters
from bitfit.model.run_stack import Run
from bitfit.results import plots
from bitfit.results import scores as reports
from bitfit.tracking.tracker import OFF, Tracker
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.plan import TrainOptions
from bitfit.training.prepare import (
    PreparedModel,
    TrainingResult,
    new_result,
    new_training,
    prepare_model,
    select_trainable,
)
from bitfit.training.setup import LoadedData, Method, load_data, make_setup
from bitfit.training.state import Record, TrainState
from utils import Diverged, UserError, as_list, make_generator
from utils import set_seed as set_seed  # a name of the released code

LOGGER = logging.getLogger("bitfit")


class GLUEvaluator:
    """Fine-tune and score one model on one task; every method raises UserError for bad input.

    It holds K >= 1 runs. Predictions, saved files and plots belong to the selected run: the first
    one, until `select` chooses another.

    Attributes:
        setup: the task, the base model and the machine.
        loaded: the tokenized data; None before `preprocess_dataset`.
        prepared: the model and what trains; None before `training_preparation` or `prepare`.
        result: trained values, scores and records; None before `train_and_evaluate`.
        group: the processes that train and predict together.
    """

    def __init__(
        self,
        task_name: str | dict[str, Any],
        model_name: str,
        device: int | None,
        seed: int | Sequence[int] | None = None,
        data_dir: str | Path | None = None,
        precision: str | None = None,
        random_encoder: bool = False,
        max_tokens: int | None = None,
        model_revision: str | None = None,
    ) -> None:
        """
        Args:
            task_name: a name in `bitfit.data.tasks.TASKS`, the path or the content of a task file.
            model_name: a name on the Hub, or a folder.
            device: GPU number; None for the CPU.
            seed: of classifier, data order, dropout and masks; a list: one run for each; None:
                the seed of `set_seed`.
            data_dir: GLUE's TSV folders or Parquet files; None: the Hub, or beside the task file.
            precision: "fp32" or "bf16"; None: bf16 on a GPU that supports it, else fp32.
            random_encoder: draw the encoder's weights at random (a control).
            max_tokens: in one forward pass; None: the default of the device.
            model_revision: tag, branch or commit of a model on the Hub; None: its main branch.
        """
        self.setup = make_setup(
            task_name, model_name, device, seed=seed, data_dir=data_dir, precision=precision,
            random_encoder=random_encoder, max_tokens=max_tokens, model_revision=model_revision,
        )  # fmt: skip
        self.loaded: LoadedData | None = None
        self.prepared: PreparedModel | None = None
        self.result: TrainingResult | None = None
        self.group: Group = SINGLE_PROCESS

    def with_parts(self, **parts: Any) -> "GLUEvaluator":
        """Return a copy with other values of setup, loaded, prepared, result or group."""
        other = copy(self)
        for name, value in parts.items():
            setattr(other, name, value)
        return other

    convert_to_actual_components = staticmethod(trainable.terms_to_components)

    # ------------------------------------------------------------------------------------ data

    def preprocess_dataset(
        self,
        padding: str | bool,
        max_sequence_len: int,
        batch_size: int,
        train_size: int | None = None,
        test_splits: bool = False,
    ) -> None:
        """Read and tokenize the training and validation splits.

        Args:
            padding: "longest" or "max_length", as in the released code; the results are the same,
                because examples are packed without padding if the model can.
            max_sequence_len: in tokens; longer examples are cut.
            batch_size: examples in an optimizer step.
            train_size: training examples drawn by each seed; None: all.
            test_splits: read the test splits now, not when they are first needed.
        """
        if padding not in ("max_length", "longest", True):
            raise UserError(f"padding {padding!r}: give 'longest' or 'max_length'")
        setup = self.setup
        loading.check_max_length(setup.model_name, setup.task, max_sequence_len, setup.revision)
        self.loaded = load_data(setup, max_sequence_len, batch_size, train_size)
        tests = self._test_files() if test_splits else ()
        for split in ("train", *setup.task.validation_splits, *tests):
            self.loaded.tokens(split)
        self.loaded.dataset.report_overlap()

    def tokens(self, split: str) -> TokenizedSplit | None:
        """Return the tokens of a split, or None for an optional split that does not exist."""
        return self._need_loaded().tokens(split)

    def fingerprints(self) -> dict[str, Any]:
        """Return the hashes of the data, the base model and the trainable parameters."""
        prepared, loaded = self._need_prepared(), self._need_loaded()
        hashes = loaded.hashes() | {"encoder_sha256": prepared.encoder_sha256}
        hashes |= {"chosen_sha256": prepared.trainable_sha256(), **loaded.base_fingerprints}
        zero = prepared.zero_gradient
        return hashes | ({"zero_gradient": zero} if zero else {})

    # ----------------------------------------------------------------------- what and how to train

    def training_preparation(
        self,
        learning_rate: float | Sequence[float],
        optimizer: str,
        encoder_trainable: bool,
        trainable_components: Sequence[str] | None = None,
        verbose: bool = True,
        seed: int | None = None,
    ) -> None:
        """Call `prepare` with the released code's arguments.

        Args:
            encoder_trainable: True for full fine-tuning, and before a random mask is set.
            trainable_components: for BitFit; if empty, only the classifier trains.
            seed: one of the evaluator's seeds; None: all of them.
        """
        if encoder_trainable and trainable_components:
            raise UserError("encoder_trainable trains everything: give no trainable_components")
        kind = "full_ft" if encoder_trainable else "bitfit" if trainable_components else "frozen"
        if seed is not None and seed not in self.seeds:
            raise UserError(f"seed {seed} is none of this evaluator's: {self.seeds}")
        runs = [Run(float(rate), seed) for rate in as_list(learning_rate) if seed is not None]
        components = trainable_components or ()
        self.prepare(kind, learning_rate, optimizer, components, verbose=verbose, only=runs or None)

    def prepare(
        self,
        fine_tune_type: str,
        learning_rate: float | Sequence[float],
        optimizer: str = "adamw",
        components: Sequence[str] = (),
        mask_size: int | None = None,
        verbose: bool = True,
        only: Sequence[Run] | None = None,
    ) -> None:
        """Load the model and select the trainable parameters.

        Args:
            fine_tune_type: one of `options.FINE_TUNE_TYPES`.
            learning_rate: before any schedule; a list: one run for each.
            components: for bitfit, the result of `convert_to_actual_components`.
            mask_size: for rand_uniform; None: the paper's for its models, else as many as bitfit.
            verbose: print the trained tensors.
            only: some of the runs; None: all pairs of a learning rate and a seed.
        """
        if optimizer not in ("adamw", "adam"):
            raise UserError(f"unknown optimizer {optimizer!r}; known: adamw, adam")
        self._need_loaded()
        runs = [Run(float(rate), seed) for rate in as_list(learning_rate) for seed in self.seeds]
        if len(set(runs)) < len(runs):
            raise UserError("a learning rate or seed is given twice: give each once")
        method = Method(fine_tune_type, tuple(components), mask_size, optimizer)
        self.prepare_runs(runs if only is None else list(only), method, verbose)

    def prepare_runs(
        self, runs: list[Run], method: Method | None = None, verbose: bool = False
    ) -> None:
        """Load the model again for some runs; method None: as it was prepared before."""
        before, method = self.prepared, method or self._need_prepared().method
        self.prepared, self.result = None, None
        data = self._need_loaded()
        self.prepared = prepare_model(self.setup, data, runs, method, before, verbose)

    def set_uniform_mask(self, mask_size: int | None = None) -> None:
        """Train parameters drawn uniformly from the encoder, and the classifier."""
        self._set_mask("rand_uniform", mask_size)

    def set_row_and_column_random_mask(self) -> None:
        """Train one random column or some rows of each matrix, and the classifier."""
        self._set_mask("rand_row_col", None)

    def _set_mask(self, fine_tune_type: str, mask_size: int | None) -> None:
        before = self._need_prepared()
        if self.result or not trainable.trains_matrices(before.model, before.trainable):
            raise UserError("a random mask needs training_preparation(encoder_trainable=True)")
        method = replace(before.method, fine_tune_type=fine_tune_type, mask_size=mask_size)
        selected = select_trainable(before.model, method, before.runs, before.verbose)
        self.prepared = replace(before, method=method, trainable=selected, stackable_checked=False)

    # -------------------------------------------------------------------------------- training

    def reason_not_stackable(self) -> str | None:
        """Return why several runs cannot train in one pass, or None if they can."""
        prepared = self._need_prepared()
        return prepared.reason_not_stackable(self.tokens("train")) if len(self.runs) > 1 else None

    def passes(self, share: list[Run] | None = None) -> list[list[Run]]:
        """Return the runs that train together: all, or one at a time if they cannot share a pass.

        Args:
            share: some of the runs; None: all.
        """
        share = self.runs if share is None else share
        reason = self.reason_not_stackable()
        if len(share) > 1:
            how = f"one after the other: {reason}" if reason else "in one pass"
            LOGGER.info("%d runs %s", len(share), how)
        return [[run] for run in share] if reason else [share]

    def join_group(self, group: Group) -> None:
        """Train and predict together with other processes from now on."""
        self.group = group

    def train_and_evaluate(
        self,
        num_epochs: int,
        output_path: str | Path | dict[Run, Path] | None = None,
        evaluation_frequency: int = 1,
        lr_schedule: str = "constant",
        warmup_ratio: float = 0.0,
        keep: str = "last",
        checkpoints: CheckpointManager | None = None,
        tracker: Tracker = OFF,
        curves: bool = True,
    ) -> None:
        """Train all runs together, evaluate them, write metrics and learning curves.

        Args:
            output_path: folder for metrics and curves; each of several runs has a folder in it,
                named `Run.name`. Or {run: its folder} for some runs: the others write nothing.
            evaluation_frequency, lr_schedule, warmup_ratio, keep: see `TrainOptions`.
            checkpoints: writes checkpoints and resumes from them.
            tracker: reports losses and scores to experiment trackers.
            curves: plot the learning curves.

        Raises:
            Diverged: every run had a loss or gradient that was not finite. Each run keeps its
                last good values (with `keep` its best), and its scores are written.
        """
        self._need_prepared()
        options = TrainOptions(
            self._need_loaded().batch_size, num_epochs, lr_schedule, warmup_ratio,
            evaluation_frequency, keep,
        )  # fmt: skip
        state = self._new_training(options)
        folders = run_folder.run_folders(output_path, self.runs)
        diverged = metrics_files.train(
            state, self.result, dtype=self.setup.dtype,
            checkpoints=checkpoints or CheckpointManager(), tracker=tracker,
            folders=folders, metadata=reports.metrics_metadata(self),
        )  # fmt: skip
        for run, folder in folders.items() if curves else ():
            if len(self.result.scores_of(run)):
                self.plot_learning_curves(folder, run)
        if diverged:
            raise Diverged(diverged)

    def _new_training(self, options: TrainOptions) -> TrainState:
        """Return the state of a new training; from now on the evaluator has a result."""
        options.check()
        reason = self.reason_not_stackable()
        if self.result:
            raise UserError("this evaluator has been trained: prepare it again to train again")
        if reason:
            raise UserError(f"{len(self.runs)} runs cannot train in one pass, {reason}: "
                            "prepare and train one after the other")  # fmt: skip
        seed, rank = self.runs[0].seed, self.group.rank
        if rank:  # each rank draws the dropout of its own rows
            seed = int(make_generator(seed, f"dropout of rank {rank}").integers(2**63))
        set_seed(seed)
        data = self.loaded.dataset
        state = new_training(
            self.prepared, self.task, data.split("train"), data.scored(), options, self.group
        )
        self.result = new_result(state.stack)
        return state

    def select(self, run: int) -> None:
        """Let the model and all results below be those of a run, counted from 0."""
        result = self._need_result()
        if not 0 <= run < len(self.runs):
            raise UserError(f"there is no run {run}: there are {len(self.runs)}, counted from 0")
        result.stack.load_run(run)
        result.selected = run

    # --------------------------------------------------------------------- predictions and scores

    def predict(self, split: str) -> np.ndarray:
        """Return the logits of all rows of a split, (rows, C) float32."""
        prepared, tokens = self._need_prepared(), self.tokens(split)
        forward = prepared.forward_for(tokens, self.loaded.all_tokens)
        with cast_parameters(prepared.model, prepared.dtype):
            return predict.predict(forward, tokens, prepared.token_budget, group=self.group)

    def evaluate(self, split: str) -> dict[str, float]:
        """Return {metric: value} of all rows of a split with labels."""
        if split not in ("train", *self.task.validation_splits):
            raise UserError(f"{split!r} has no labels: give train or a validation split")
        return score(self.task, self.predict(split), self.tokens(split).labels.cpu().numpy())

    def export_model_test_set_predictions(self, output_path: str | Path) -> list[Path]:
        """Write the test predictions as files for the GLUE server, and return their paths.

        The processes of a group predict together, and the first of them writes.
        """
        Path(output_path).mkdir(parents=True, exist_ok=True)
        written = []
        for split, name in self._test_files().items():
            if self.tokens(split) is None:
                LOGGER.info("there is no %s set: %s is not written", split, name)
                continue
            written.append(Path(output_path) / name)
            predicted = predictions(self.task, self.predict(split))
            if self.group.rank == 0:
                reports.write_predictions(written[-1], self.task, predicted)
        return written

    def _test_files(self) -> dict[str, str]:
        if not self.task.server_files:
            raise UserError(f"the record of {self.task.name} names no test split to predict")
        return self.task.server_files

    def score_table(self) -> str:
        """Return the last and best scores as text."""
        scores = self._need_result().scores_of(self.record.run)
        return f"{self.caption}\n{reports.score_table(scores, self.task)}"

    def plot_learning_curves(
        self, output_path: str | Path | None = None, run: Run | None = None
    ) -> dict[str, Any]:
        """Return {metric: figure}, and save learning_curves_<metric>.png in a folder if given."""
        result = self._need_result()
        run = run or result.record.run
        scores, caption = result.scores_of(run), f"{self.method_caption}, {run.caption}"
        if scores.empty:
            raise UserError("call train_and_evaluate first: there are no scores to plot")
        return plots.learning_curves(scores, self.task, caption, output_path)

    def terms_changes(self) -> tuple[list[str], Any]:
        """Return (names, changes): how far each bias term moved; see `plots.bias_changes`."""
        result = self._need_result()
        if not self.trains_only_biases:
            raise UserError("only bitfit has bias terms to plot")
        before = result.stack.named_params(result.selected, result.stack.initial_params)
        after = result.stack.named_params(result.selected)
        return plots.bias_changes(before, after, self.prepared.zero_gradient)

    def plot_terms_changes(self, output_path: str | Path | None = None) -> Any:
        """Return the paper's figure 1, and save it with its numbers as .png and .csv."""
        names, changes = self.terms_changes()
        figure = plots.bias_heatmap(names, changes, self.caption)
        if output_path:
            plots.save_figure(figure, Path(output_path).with_suffix(".png"))
            plots.write_changes(names, changes, Path(output_path).with_suffix(".csv"))
        return figure

    # ---------------------------------------------------------------------------------- files

    def export_model(self, output_path: str | Path) -> None:
        """Write a plain Hugging Face folder: weights, config with label names, tokenizer."""
        loading.write_model(self.model, self._need_loaded().tokenizer, output_path)

    def save(self, output_path: str | Path) -> None:
        """Write the selected run: metadata and trained values (the whole model if all trained)."""
        self._need_result()
        saved_evaluator.write(self, Path(output_path))

    @staticmethod
    def load(
        path: str | Path,
        gpu_device: int | None,
        model_name: str | None = None,
        data_dir: str | Path | None = None,
    ) -> "GLUEvaluator":
        """Return a saved evaluator; model_name and data_dir: where base model and data are now."""
        arguments, saved = saved_evaluator.read(Path(path), model_name, data_dir)
        evaluator = GLUEvaluator(device=gpu_device, **arguments)
        return evaluator.with_parts(**saved_evaluator.restore(evaluator.setup, Path(path), *saved))

    # ------------------------------------------------------------------------- views of the state

    def _need_loaded(self) -> LoadedData:
        return need(self.loaded, "preprocess_dataset")

    def _need_prepared(self) -> PreparedModel:
        return need(self.prepared, "training_preparation")

    def _need_result(self) -> TrainingResult:
        return need(self.result, "train_and_evaluate")

    @property
    def task(self) -> Task:
        return self.setup.task

    @property
    def num_labels(self) -> int:
        return self.setup.task.num_labels

    @property
    def seeds(self) -> list[int]:
        return self.setup.seeds

    @property
    def model(self) -> Any:
        """Return the plain Hugging Face classifier."""
        return self._need_prepared().model

    @property
    def runs(self) -> list[Run]:
        return self._need_prepared().runs

    @property
    def record(self) -> Record:
        """Return what the selected run measured beside its scores."""
        return self._need_result().record

    @property
    def evaluations(self) -> dict[str, dict[str, list[float]]]:
        """Return {split: {metric: [value at each evaluated epoch]}} of the selected run."""
        return reports.scores_by_split(self._need_result().scores_of(self.record.run))

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Return {parameter: bool tensor of its shape}, True where a random mask trains."""
        prepared = self._need_prepared()
        return trainable.dense_masks(prepared.model, prepared.trainable)

    @property
    def trains_only_biases(self) -> bool:
        """Return whether bitfit trains, so that there are bias changes to plot."""
        prepared = self._need_prepared()
        return trainable.trains_only_biases(prepared.model, prepared.trainable)

    @property
    def method_caption(self) -> str:
        """Return one line with task, model and method."""
        method, setup = self._need_prepared().method, self.setup
        model = setup.base_name + (" (random encoder)" if setup.random_encoder else "")
        terms = ", ".join(trainable.components_to_terms(method.components))
        kind = f"bitfit ({terms})" if terms else method.fine_tune_type
        return f"{setup.task.folder}, {model}, {kind}"

    @property
    def caption(self) -> str:
        """Return one line with task, model, method and the selected run."""
        result = self._need_result()
        count = len(result.averaged)
        return (
            f"{self.method_caption}, {f'average of {count}' if count else self.record.run.caption}"
        )


def need(value: Any, call: str) -> Any:
    """Return a value, or raise UserError if the call that creates it is missing."""
    if value is None:
        raise UserError(f"call {call} first")
    return value
