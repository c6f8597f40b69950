"""GLUEvaluator: one GLUE task x one BERT-family model x one way to fine-tune it.

set_seed(0)
evaluator = GLUEvaluator("rte", "bert-base-cased", device=0)
evaluator.preprocess_dataset("longest", max_sequence_len=128, batch_size=16)
terms = GLUEvaluator.convert_to_actual_components(["query", "intermediate"])
evaluator.training_preparation(1e-3, "adamw", False, terms)
evaluator.train_and_evaluate(16, "out")
"""

import logging
import math
import time
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bitfit import checkpoints, models, reports, sources, trainable
from bitfit.data import tokenize
from bitfit.runs import Run, Stack
from bitfit.tasks import TASKS, predictions
from bitfit.training import Plan, Schedule, make_optimizers, precision_of, score_split, train_epoch
from bitfit.training import predict as predict_logits
from utils import UserError, choose_device, default_precision, generator, set_seed

__all__ = ["GLUEvaluator", "set_seed"]

LOGGER = logging.getLogger("bitfit")


def check_choices(num_epochs, evaluation_frequency, lr_schedule, keep):
    if min(num_epochs, evaluation_frequency) < 1:
        raise UserError("num_epochs and evaluation_frequency are at least 1")
    if lr_schedule not in ("constant", "linear") or keep not in ("last", "best"):
        raise UserError("lr_schedule is 'constant' or 'linear', keep is 'last' or 'best'")


class GLUEvaluator:
    """Fine-tunes and scores one model on one task; every method raises UserError for bad input.

    Attributes:
        model: the plain Hugging Face classifier.
        evaluations: {split: {metric: [value per evaluated epoch]}}; `epochs` names the epochs.
        num_labels: classes, or 1 for a regression.
    """

    def __init__(
        self, task_name, model_name, device,
        seed=None, data_dir=None, precision=None, random_encoder=False,
    ):  # fmt: skip
        """
        Args:
            task_name: a key of `bitfit.tasks.TASKS`.
            model_name: a name on the Hub, or a folder.
            device: GPU number; None for the CPU.
            seed: draws the classifier, data order, dropout and masks; None: that of `set_seed`.
            data_dir: GLUE's TSV folders or Parquet files; None: the Hub.
            precision: "fp32" or "bf16"; None: bf16 on a GPU that has it, else fp32.
            random_encoder: draw the encoder's weights at random (a control).
        """
        if task_name not in TASKS:
            raise UserError(f"unknown task {task_name!r}; known: {', '.join(TASKS)}")
        self.task, self.task_name = TASKS[task_name], task_name
        self.num_labels = self.task.num_labels
        self.model_name, self.data_dir, self.random_encoder = model_name, data_dir, random_encoder
        self.torch_device = choose_device(device)
        self.base_name = Path(model_name).name  # for captions
        self.seed = torch.initial_seed() if seed is None else seed
        if precision not in (None, "fp32", "bf16"):
            raise UserError(f"unknown precision {precision!r}; known: fp32, bf16")
        self.precision = precision or default_precision(self.torch_device)
        self.epochs, self.evaluations, self.train_loss = [], {}, []
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self._tokens = {}

    def _need(self, attribute, call):
        if not hasattr(self, attribute):
            raise UserError(f"call {call} first")

    # Data

    def preprocess_dataset(
        self, padding, max_sequence_len, batch_size, train_size=None, test_splits=False
    ):
        """Read and tokenize the train and validation splits; test splits when first needed.

        Args:
            padding: "max_length" pads every row to `max_sequence_len` as the released code did;
                "longest" (or True) pads to the longest row of a micro-batch: the same results.
            max_sequence_len: rows are cut to so many tokens.
            batch_size: rows per optimizer step.
            train_size: train on so many rows, drawn by the seed; None: all.
            test_splits: read the test splits now.
        """
        if padding not in ("max_length", "longest", True):
            raise UserError(f"padding {padding!r}: give 'longest' or 'max_length'")
        self._tokens = {}
        self.max_sequence_len, self.batch_size = max_sequence_len, batch_size
        self.pad_to_max, self.train_size = padding == "max_length", train_size
        tests = self.task.server_files if test_splits else ()
        for split in ("train", *self.task.validation_splits, *tests):
            self.tokens(split)

    @cached_property
    def tokenizer(self):
        return models.load_tokenizer(self.model_name)

    def tokens(self, split):
        """The `Tokens` of a split, read once; None for an optional split that is not there."""
        self._need("max_sequence_len", "preprocess_dataset")
        if split not in self._tokens:
            texts = sources.read_split(self.task, split, self.data_dir)
            if split == "train" and self.train_size:
                rng = generator(self.seed, "training rows")
                texts = texts.take(rng.permutation(len(texts))[: self.train_size])
            self._tokens[split] = texts and tokenize(
                texts, self.tokenizer, self.max_sequence_len, self.pad_to_max
            ).to(self.torch_device)
        return self._tokens[split]

    # Model

    @staticmethod
    def convert_to_actual_components(components):
        """Terms of `--bias-terms` -> names of parameters, relative to their layer."""
        return trainable.actual_components(components)

    def training_preparation(
        self, learning_rate, optimizer, encoder_trainable, trainable_components=None, verbose=True
    ):
        """Load the model and choose what trains.

        Args:
            learning_rate: of the optimizer, before any schedule.
            optimizer: "adamw" or "adam".
            encoder_trainable: True for full fine-tuning, and before a random mask is set.
            trainable_components: what `convert_to_actual_components` gives, for BitFit; with none
                the encoder is frozen and the classifier alone trains.
            verbose: print the trained tensors.
        """
        if encoder_trainable and trainable_components:
            raise UserError("encoder_trainable trains everything: give no trainable_components")
        if optimizer not in ("adamw", "adam"):
            raise UserError(f"unknown optimizer {optimizer!r}; known: adamw, adam")
        self._need("max_sequence_len", "preprocess_dataset")
        self._load_model()
        self.learning_rate, self.optimizer, self.verbose = learning_rate, optimizer, verbose
        self.components = list(trainable_components or [])
        scored = ("train", *self.task.validation_splits)
        self.evaluations = {s: {metric: [] for metric in self.task.metrics} for s in scored}
        kind = "full_ft" if encoder_trainable else "bitfit" if trainable_components else "frozen"
        chosen = trainable.trainable(self.model, encoder_trainable, trainable_components)
        self._choose(kind, chosen)

    def _load_model(self):
        self.model = models.load_model(self.model_name, self.task, self.seed, self.random_encoder)
        models.check_length(self.model, self.max_sequence_len)
        self.encoder_sha256 = models.fingerprint(self.model)
        self.model.to(self.torch_device)

    def _choose(self, fine_tune_type, chosen):
        self.fine_tune_type, self.chosen = fine_tune_type, chosen
        if self.verbose:
            print(trainable.describe(self.model, chosen))

    def set_uniform_mask(self, mask_size=None):
        """Train `mask_size` parameters drawn uniformly from the encoder, and the classifier.

        None: the paper's size for its models, else as many as BitFit trains.
        """
        self._need_encoder()
        size = mask_size or trainable.default_mask_size(self.model, self.model_name)
        rng = generator(self.seed, "mask")
        self._choose("rand_uniform", trainable.uniform_positions(self.model, size, rng))

    def set_row_and_column_random_mask(self):
        """Train one random column, or as many rows, of each matrix, and the classifier."""
        self._need_encoder()
        rng = generator(self.seed, "mask")
        self._choose("rand_row_col", trainable.row_column_positions(self.model, rng))

    def _need_encoder(self):
        self._need("chosen", "training_preparation")
        if self.fine_tune_type in ("bitfit", "frozen"):
            raise UserError("a random mask needs training_preparation(encoder_trainable=True)")

    @property
    def masks(self):
        """{parameter name: bool tensor of its shape}, True where a random mask trains."""
        self._need("chosen", "training_preparation")
        return trainable.dense_masks(self.model, self.chosen)

    # Training

    def train_and_evaluate(
        self, num_epochs, output_path=None, evaluation_frequency=1,
        lr_schedule="constant", warmup_ratio=0.0, keep="last",
    ):  # fmt: skip
        """Train, score every `evaluation_frequency` epochs and after the last, write metrics.

        Args:
            num_epochs: passes over the training rows.
            output_path: folder for metrics.json, metrics.csv and the learning curves.
            evaluation_frequency: scoring more or less often changes no trained value.
            lr_schedule: "constant", or "linear" down to 0.
            warmup_ratio: the share of all steps over which the learning rate first rises.
            keep: "last", or "best": leave the model as it was at its best evaluation.

        Raises:
            Diverged: a loss or gradient was not finite. The model holds its last good values
                (with `keep` its best), and what was measured so far is kept and written.
        """
        self._need("chosen", "training_preparation")
        check_choices(num_epochs, evaluation_frequency, lr_schedule, keep)
        if hasattr(self, "stack"):
            raise UserError("this evaluator has been trained: make a new one to train again")
        set_seed(self.seed)
        self.stack = Stack(self.model, self.chosen, [Run(self.learning_rate, self.seed)])
        optimizers = make_optimizers(self.optimizer, self.stack)
        tokens = self.tokens("train")
        steps = num_epochs * math.ceil(len(tokens.lengths) / self.batch_size)
        schedule = Schedule(lr_schedule, round(warmup_ratio * steps), steps)
        plan = Plan(self.task, self.model, tokens, self.batch_size, schedule)
        rows = num_epochs * len(tokens.lengths)
        best = None
        try:
            bar = tqdm(total=rows, unit="ex", disable=None, desc=self.task_name)
            with self._precision(), logging_redirect_tqdm(), bar:
                for epoch in range(num_epochs):
                    self._train(plan, optimizers, epoch, bar)
                    if (epoch + 1) % evaluation_frequency == 0 or epoch + 1 == num_epochs:
                        self._evaluate(epoch, output_path)
                        if keep == "best" and self._is_best():
                            best = self.stack.values.clone()
        finally:
            self.stack.release(best)
            if output_path:
                self._write_metrics(output_path)
            if output_path and self.epochs:
                self.plot_learning_curves(output_path)

    def _precision(self):
        return precision_of(self.model, self.precision, self.torch_device)

    def _train(self, plan, optimizers, epoch, bar):
        begin = time.perf_counter()
        losses = train_epoch(plan, self.stack, optimizers, epoch, bar)
        self.train_loss.append(losses[0])
        self.seconds["training"] += time.perf_counter() - begin

    def _evaluate(self, epoch, output_path):
        begin = time.perf_counter()
        for split, metrics in self.evaluations.items():
            for metric, value in score_split(self.task, self.model, self.tokens(split)).items():
                metrics[metric].append(value)
        self.seconds["evaluation"] += time.perf_counter() - begin
        self.epochs.append(epoch + 1)
        scores = reports.one_line_scores(self.evaluations)
        LOGGER.info("epoch %d  loss %.3f  %s", epoch + 1, self.train_loss[-1], scores)
        if output_path:
            self._write_metrics(output_path)

    def _write_metrics(self, output_path):
        facts = self._facts()
        reports.write_metrics(output_path, self.task, self.epochs, self.evaluations, facts)

    def _is_best(self):
        return reports.best_index(self.task, self.evaluations) == len(self.epochs) - 1

    def _facts(self):
        """What metrics.json says of this run beside its scores."""
        return {
            "task": self.task_name,
            "model": str(self.model_name),
            "random_encoder": self.random_encoder,
            "fine_tune_type": self.fine_tune_type,
            "bias_terms": trainable.term_names(self.components),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "trained_parameters": trainable.count(self.model, self.chosen),
            "all_parameters": sum(p.numel() for p in self.model.parameters()),
            "train_loss": self.train_loss,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    # Results

    def predict(self, split):
        """Logits of a split, (rows, C) float32, in the order of its rows."""
        self._need("model", "training_preparation")
        with self._precision():
            return predict_logits(self.model, self.tokens(split))

    def evaluate(self, split):
        """{metric: value} of a split with labels."""
        self._need("model", "training_preparation")
        if split not in self.evaluations:
            raise UserError(f"{split!r} has no labels; known: {', '.join(self.evaluations)}")
        with self._precision():
            return score_split(self.task, self.model, self.tokens(split))

    def export_model_test_set_predictions(self, output_path):
        """Write the test predictions as files for the GLUE server; returns their paths."""
        written = []
        Path(output_path).mkdir(parents=True, exist_ok=True)
        for split, name in self.task.server_files.items():
            if self.tokens(split) is None:
                LOGGER.info("there is no %s set: %s is not written", split, name)
                continue
            predicted = predictions(self.task, self.predict(split))
            written.append(Path(output_path) / name)
            reports.write_predictions(written[-1], self.task, predicted)
        return written

    def export_model(self, output_path):
        """Write a plain Hugging Face folder: weights, config with label names, tokenizer."""
        self._need("model", "training_preparation")
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)

    @property
    def caption(self):
        """One line that says what was run."""
        model = self.base_name + (" (random encoder)" if self.random_encoder else "")
        terms = ", ".join(trainable.term_names(self.components))
        method = f"bitfit ({terms})" if terms else self.fine_tune_type
        settings = f"learning rate {self.learning_rate:g}, seed {self.seed}"
        return f"{self.task.folder}, {model}, {method}, {settings}"

    def score_table(self):
        """The last and best scores as text."""
        return f"{self.caption}\n{reports.score_table(self.task, self.epochs, self.evaluations)}"

    def plot_learning_curves(self, output_path=None):
        """{metric: figure}; in the folder `output_path` each as learning_curves_<metric>.png."""
        if not self.epochs:
            raise UserError("call train_and_evaluate first: there are no scores to plot")
        figures = reports.learning_curves(self.task, self.epochs, self.evaluations, self.caption)
        for metric, figure in figures.items() if output_path else ():
            name = f"learning_curves_{metric.lower()}.png"
            reports.save_figure(figure, Path(output_path) / name)
        return figures

    def plot_terms_changes(self, output_path=None):
        """The paper's figure 1, how far each bias term moved; saved to the file `output_path`."""
        self._need("stack", "train_and_evaluate")
        if self.fine_tune_type != "bitfit":
            raise UserError("only bitfit has bias terms to plot")
        start = self.stack.named_values(values=self.stack.start)
        figure = reports.bias_heatmap(start, self.stack.named_values(), self.caption)
        if output_path:
            reports.save_figure(figure, Path(output_path).with_suffix(".png"))
        return figure

    def save(self, output_path):
        """Write the evaluator to a folder: JSON, and what trained (full_ft: the whole model)."""
        self._need("stack", "train_and_evaluate")
        checkpoints.save_evaluator(self, Path(output_path))

    @staticmethod
    def load(path, gpu_device, model_name=None, data_dir=None):
        """An evaluator as it was saved: it predicts, evaluates, plots and exports.

        Args:
            path: the folder given to `save`.
            gpu_device: GPU number; None for the CPU.
            model_name, data_dir: where base model and data are now, if they have moved.
        """
        return checkpoints.load_evaluator(
            GLUEvaluator, Path(path), gpu_device, model_name, data_dir
        )
