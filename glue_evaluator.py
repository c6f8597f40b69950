"""GLUEvaluator: one GLUE task x one BERT-family model x one way to fine-tune it.

set_seed(0)
evaluator = GLUEvaluator("rte", "bert-base-cased", device=0)
evaluator.preprocess_dataset("longest", max_sequence_len=128, batch_size=16)
terms = GLUEvaluator.convert_to_actual_components(["query", "intermediate"])
evaluator.training_preparation(1e-3, "adamw", False, terms)
evaluator.train_and_evaluate(16, "out")

With several seeds, or several learning rates, it holds a run for each pair.
"""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bitfit import models, outputs, predict, reports, runs, sources, store, trainable
from bitfit.checkpoints import Saver
from bitfit.data import MAX_TOKENS, draw_rows, tokenize
from bitfit.runs import Run, Stack
from bitfit.tasks import TASKS, predictions, score
from bitfit.train import Plan, Record, Split, fit, start
from utils import (
    Damaged,
    Diverged,
    UserError,
    as_list,
    choose_device,
    default_precision,
    generator,
    set_seed,
)

__all__ = ["GLUEvaluator", "set_seed"]

LOGGER = logging.getLogger("bitfit")
FACTS = "evaluator.json"
POSITIONS = ":positions"  # suffix of the tensor that says which entries a random mask chose
SAVED = (  # attributes that are facts of a saved evaluator
    "task_name", "model_name", "data_dir", "base_name", "fine_tune_type", "components",
    "precision", "random_encoder", "max_sequence_len", "pad_to_max", "batch_size", "train_size",
    "encoder_sha256",
)  # fmt: skip


def check_choices(num_epochs, evaluation_frequency, lr_schedule, keep):
    if min(num_epochs, evaluation_frequency) < 1:
        raise UserError("num_epochs and evaluation_frequency are at least 1")
    if lr_schedule not in ("constant", "linear") or keep not in ("last", "best"):
        raise UserError("lr_schedule is 'constant' or 'linear', keep is 'last' or 'best'")


class GLUEvaluator:
    """Fine-tunes and scores one model on one task; every method raises UserError for bad input.

    It holds K >= 1 runs. What it predicts, saves and plots is that of one of them: the first,
    until `select` chooses another.

    Attributes:
        model: the plain Hugging Face classifier.
        scores: one table of all runs' scores: run, epoch, split, metric, value.
        records: what else each run measured; `record` is the selected one.
        num_labels: classes, or 1 for a regression.
    """

    def __init__(
        self, task_name, model_name, device,
        seed=None, data_dir=None, precision=None, random_encoder=False, max_tokens=None,
    ):  # fmt: skip
        """
        Args:
            task_name: a key of `bitfit.tasks.TASKS`.
            model_name: a name on the Hub, or a folder.
            device: GPU number; None for the CPU.
            seed: draws the classifier, data order, dropout and masks; None: that of `set_seed`;
                a list: runs for each.
            data_dir: GLUE's TSV folders or Parquet files; None: the Hub.
            precision: "fp32" or "bf16"; None: bf16 on a GPU that has it, else fp32.
            random_encoder: draw the encoder's weights at random (a control).
            max_tokens: the most padded tokens in a micro-batch; None: the device's default.
        """
        if task_name not in TASKS:
            raise UserError(f"unknown task {task_name!r}; known: {', '.join(TASKS)}")
        self.task, self.task_name = TASKS[task_name], task_name
        self.num_labels = self.task.num_labels
        self.model_name, self.data_dir, self.random_encoder = model_name, data_dir, random_encoder
        self.torch_device = choose_device(device)
        self.base_name = Path(model_name).name  # for captions
        self.seeds = as_list(torch.initial_seed() if seed is None else seed)
        if precision not in (None, "fp32", "bf16"):
            raise UserError(f"unknown precision {precision!r}; known: fp32, bf16")
        self.precision = precision or default_precision(self.torch_device)
        self.max_tokens = max_tokens or MAX_TOKENS[self.torch_device.type]
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
            train_size: train on so many rows, drawn by the run's seed; None: all.
            test_splits: read the test splits now.
        """
        if padding not in ("max_length", "longest", True):
            raise UserError(f"padding {padding!r}: give 'longest' or 'max_length'")
        models.check_length_early(self.model_name, self.task, max_sequence_len)
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
            if split == "train":
                kept, self.rows_of_seed = draw_rows(self.seeds, len(texts), self.train_size)
                texts = texts.take(kept)
            self._tokens[split] = texts and tokenize(
                texts, self.tokenizer, self.max_sequence_len, self.pad_to_max
            ).to(self.torch_device)
        return self._tokens[split]

    def _scored(self):
        """{split: Split} of the splits with labels."""
        rows = {"train": self.rows_of_seed}
        for split in self.task.validation_splits:
            rows[split] = dict.fromkeys(self.seeds, np.arange(len(self.tokens(split).lengths)))
        return {
            split: Split(self.tokens(split), {s: predict.thin(r) for s, r in of_seed.items()})
            for split, of_seed in rows.items()
        }

    # Model

    @staticmethod
    def convert_to_actual_components(components):
        """Terms of `--bias-terms` -> names of parameters, relative to their layer."""
        return trainable.actual_components(components)

    def training_preparation(
        self, learning_rate, optimizer, encoder_trainable, trainable_components=None, verbose=True,
        seed=None,
    ):  # fmt: skip
        """Load the model and choose what trains.

        Args:
            learning_rate: of the optimizer, before any schedule; a list: runs for each.
            optimizer: "adamw" or "adam".
            encoder_trainable: True for full fine-tuning, and before a random mask is set.
            trainable_components: what `convert_to_actual_components` gives, for BitFit; with none
                the encoder is frozen and the classifier alone trains.
            verbose: print the trained tensors.
            seed: one of the evaluator's seeds; None: all of them.
        """
        if encoder_trainable and trainable_components:
            raise UserError("encoder_trainable trains everything: give no trainable_components")
        kind = "full_ft" if encoder_trainable else "bitfit" if trainable_components else "frozen"
        components = trainable_components or ()
        self.prepare(kind, learning_rate, optimizer, components, verbose=verbose, seed=seed)

    def prepare(
        self, fine_tune_type, learning_rate, optimizer="adamw", components=(), mask_size=None,
        verbose=True, seed=None,
    ):  # fmt: skip
        """The same for a fine-tune type by its name, one of `trainable.FINE_TUNE_TYPES`.

        Args:
            components: for bitfit, as in `training_preparation`.
            mask_size: for rand_uniform, as in `set_uniform_mask`.
        """
        if optimizer not in ("adamw", "adam"):
            raise UserError(f"unknown optimizer {optimizer!r}; known: adamw, adam")
        self._need("max_sequence_len", "preprocess_dataset")
        if seed is not None and seed not in self.seeds:
            raise UserError(f"seed {seed} is none of this evaluator's: {self.seeds}")
        seeds = self.seeds if seed is None else [seed]
        pairs = [Run(float(rate), s) for rate in as_list(learning_rate) for s in seeds]
        if len(set(pairs)) < len(pairs):
            raise UserError("a learning rate or seed is given twice: give each once")
        self._load_model(self.random_encoder)
        self.runs, self.optimizer, self.verbose = pairs, optimizer, verbose
        self.components, self.selected = list(components), 0
        self.records, self.scores = [Record(run) for run in pairs], reports.frame_of([])
        self._choose(fine_tune_type, mask_size)
        self._find_forward("train")

    def _load_model(self, random_encoder):
        self.model, needs_head = models.load(self.model_name, self.task, random_encoder)
        self._draw = models.draw_head if needs_head else None
        models.check_length(self.model, self.max_sequence_len)
        self.encoder_sha256 = models.fingerprint(self.model)
        self.model.to(self.torch_device)
        self.limit = predict.Limit(self.max_tokens, self.torch_device)
        for outdated in ("stack", "forward"):
            vars(self).pop(outdated, None)

    def _find_forward(self, split):
        """The model's `Forward`, found on the rows of the first split that it meets."""
        if not hasattr(self, "forward"):
            self.forward = models.find_forward(self.model, self.model_name, self.tokens(split))
        return self.forward

    def _choose(self, fine_tune_type, mask_size=None):
        rng = generator(self.runs[0].seed, "mask")
        self.chosen = trainable.select(self.model, fine_tune_type, self.components, mask_size, rng)
        self.fine_tune_type = fine_tune_type
        vars(self).pop("_reason", None)
        if self.verbose:
            print(trainable.describe(self.model, self.chosen))

    def set_uniform_mask(self, mask_size=None):
        """Train `mask_size` parameters drawn uniformly from the encoder, and the classifier.

        None: the paper's size for its models, else as many as BitFit trains.
        """
        self._set_mask("rand_uniform", mask_size)

    def set_row_and_column_random_mask(self):
        """Train one random column, or as many rows, of each matrix, and the classifier."""
        self._set_mask("rand_row_col")

    def _set_mask(self, fine_tune_type, mask_size=None):
        self._need("chosen", "training_preparation")
        if not trainable.trains_matrices(self.model, self.chosen):
            raise UserError("a random mask needs training_preparation(encoder_trainable=True)")
        self._choose(fine_tune_type, mask_size)

    def fingerprints(self):
        """What results depend on beside flags: hashes of the data, the base model, what trains."""
        scored = ("train", *self.task.validation_splits)
        data = [array for split in scored for array in self.tokens(split)[:5]]  # not how padded
        return {
            "data_sha256": models.sha256(data),
            "encoder_sha256": self.encoder_sha256,
            "chosen_sha256": models.sha256(v for item in self.chosen.items() for v in item),
        }

    @property
    def masks(self):
        """{parameter name: bool tensor of its shape}, True where a random mask trains."""
        self._need("chosen", "training_preparation")
        return trainable.dense_masks(self.model, self.chosen)

    def why_not_stackable(self):
        """Why several runs cannot be trained in one pass, or None if they can."""
        self._need("chosen", "training_preparation")
        if not hasattr(self, "_reason"):
            forward, tokens = self._find_forward("train"), self.tokens("train")
            self._reason = runs.why_not_stackable(forward, self.chosen, tokens)
        return self._reason

    def passes(self):
        """The runs that train together: all of them, or one after the other where they cannot."""
        if len(self.runs) == 1:
            return [self.runs]
        reason = self.why_not_stackable()
        how = f"one after the other: {reason}" if reason else "in one pass"
        LOGGER.info("%d runs %s", len(self.runs), how)
        return [[run] for run in self.runs] if reason else [self.runs]

    # Training

    def train_and_evaluate(
        self, num_epochs, output_path=None, evaluation_frequency=1,
        lr_schedule="constant", warmup_ratio=0.0, keep="last", saver=None,
    ):  # fmt: skip
        """Train all runs together, score them, write their metrics and learning curves.

        Args:
            num_epochs: passes over the training rows.
            output_path: folder for metrics.json, metrics.csv and the learning curves; with
                several runs each has a folder in it, named `Run.name`. Or {run: its folder}.
            evaluation_frequency: score every so many epochs and after the last; scoring more or
                less often changes no trained value.
            lr_schedule: "constant", or "linear" down to 0.
            warmup_ratio: the share of all steps over which the learning rate first rises.
            keep: "last", or "best": keep of each run the values of its best evaluation.
            saver: a `bitfit.checkpoints.Saver`, to write checkpoints and go on from one.

        Raises:
            Diverged: in every run a loss or gradient was not finite. Each holds its last good
                values (with `keep` its best), and what was measured is kept and written.
        """
        check_choices(num_epochs, evaluation_frequency, lr_schedule, keep)
        self._check_trainable()
        folders = output_path or {}
        if output_path and not isinstance(output_path, dict):
            folders = outputs.folders_of(output_path, self.runs)
        plan = Plan(
            self.task, self._find_forward("train"), Split(self.tokens("train"), self.rows_of_seed),
            self._scored(), self.limit, self.batch_size, num_epochs, lr_schedule, warmup_ratio,
            evaluation_frequency,
        )  # fmt: skip
        set_seed(self.runs[0].seed)
        self.stack = Stack(self.model, self.chosen, self.runs, self._draw)
        state = start(plan, self.stack, self.optimizer, keep)
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        saver, diverged = saver or Saver(), None
        saver.load(state)
        try:
            with self._precision(), saver.held():
                fit(state, lambda: self._write_metrics(state, folders), saver)
        except Diverged as error:
            diverged = error
        finally:
            self.stack.release(state.best)
        self._write_metrics(state, folders)
        for run, folder in folders.items():
            if len(self._scores_of(run)):
                self._plot_learning_curves(run, folder)
        if diverged:
            raise diverged

    def _write_metrics(self, state, folders):
        """Take what a training measured so far, and write it."""
        self.records, self.scores = state.records, reports.frame_of(state.scores)
        for record in state.records if folders else ():
            run = record.run
            facts, scores = reports.facts(self, run), self._scores_of(run)
            reports.write_metrics(folders[run], self.task, record, scores, facts)

    def _check_trainable(self):
        self._need("chosen", "training_preparation")
        if hasattr(self, "stack"):
            raise UserError("this evaluator has been trained: prepare it again to train again")
        reason = len(self.runs) > 1 and self.why_not_stackable()
        if reason:
            raise UserError(f"{len(self.runs)} runs cannot train in one pass, {reason}: "
                            "prepare and train one after the other")  # fmt: skip

    def _precision(self):
        return predict.precision_of(self.model, self.precision, self.torch_device)

    # Results: of the selected run

    def select(self, run):
        """Let the model and all results below be those of run number `run`, counted from 0."""
        self._need("stack", "train_and_evaluate")
        if not 0 <= run < len(self.runs):
            raise UserError(
                f"there is no run {run}: they are numbered from 0 to {len(self.runs) - 1}"
            )
        self.stack.put(run)
        self.selected = run

    @property
    def record(self):
        self._need("records", "training_preparation")
        return self.records[self.selected]

    @property
    def evaluations(self):
        """{split: {metric: [value per evaluated epoch]}}"""
        return reports.evaluations(self._scores_of(self.record.run))

    def _scores_of(self, run):
        return self.scores[self.scores["run"] == run.name]

    def predict(self, split):
        """Logits of a split, (rows, C) float32, in the order of its rows."""
        self._need("model", "training_preparation")
        forward = self._find_forward(split)
        with self._precision():
            return predict.predict(forward, self.tokens(split), self.limit)

    def evaluate(self, split):
        """{metric: value} of a split with labels, all its rows."""
        if split not in ("train", *self.task.validation_splits):
            raise UserError(f"{split!r} has no labels: give train or a validation split")
        return score(self.task, self.predict(split), self.tokens(split).labels.cpu().numpy())

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
        models.write_model(self.model, self.tokenizer, output_path)

    @property
    def method_caption(self):
        """One line that says what was run, whatever the run."""
        model = self.base_name + (" (random encoder)" if self.random_encoder else "")
        terms = ", ".join(trainable.term_names(self.components))
        method = f"bitfit ({terms})" if terms else self.fine_tune_type
        return f"{self.task.folder}, {model}, {method}"

    @property
    def caption(self):
        """One line that says what the selected run was."""
        return self._caption(self.record.run)

    def _caption(self, run):
        return f"{self.method_caption}, learning rate {run.learning_rate:g}, seed {run.seed}"

    def score_table(self):
        """The last and best scores as text."""
        scores = self._scores_of(self.record.run)
        return f"{self.caption}\n{reports.score_table(scores, self.task)}"

    def plot_learning_curves(self, output_path=None):
        """{metric: figure}; in the folder `output_path` each as learning_curves_<metric>.png."""
        if not len(self._scores_of(self.record.run)):
            raise UserError("call train_and_evaluate first: there are no scores to plot")
        return self._plot_learning_curves(self.record.run, output_path)

    def _plot_learning_curves(self, run, folder):
        return reports.learning_curves(self._scores_of(run), self.task, self._caption(run), folder)

    @property
    def trains_only_biases(self):
        """Whether there are bias terms whose change can be plotted: so it is with bitfit."""
        return trainable.trains_only_biases(self.model, self.chosen)

    def plot_terms_changes(self, output_path=None):
        """The paper's figure 1, how far each bias term moved; saved to the file `output_path`."""
        self._need("stack", "train_and_evaluate")
        if not self.trains_only_biases:
            raise UserError("only bitfit has bias terms to plot")
        start = self.stack.named_values(self.selected, self.stack.start)
        figure = reports.bias_heatmap(start, self.stack.named_values(self.selected), self.caption)
        if output_path:
            reports.save_figure(figure, Path(output_path).with_suffix(".png"))
        return figure

    # On disk

    def save(self, output_path):
        """Write the evaluator to a folder: JSON, and what trained (if all did, the whole model)."""
        self._need("stack", "train_and_evaluate")
        folder, run = Path(output_path), self.record.run
        folder.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(self, name) for name in SAVED}
        for name in ("model_name", "data_dir"):
            if facts[name] is not None and Path(facts[name]).is_dir():
                facts[name] = str(Path(facts[name]).resolve())
        facts |= run._asdict() | {"train_loss": self.record.train_loss}
        facts |= {"scores": self._scores_of(run).values.tolist(), "model_sha256": None}
        if trainable.trains_all(self.model, self.chosen):
            self.export_model(folder / "model")
            facts |= {"model_sha256": models.fingerprint(self.model, head=True)}
            store.write(folder / FACTS, facts, {})
            return
        values = self.stack.named_values(self.selected)
        tensors = {name: value.cpu().contiguous() for name, value in values.items()}
        tensors |= {n + POSITIONS: p.cpu() for n, p in self.stack.positions.items()}
        store.write(folder / FACTS, facts, tensors, "delta.safetensors")

    @staticmethod
    def load(path, gpu_device, model_name=None, data_dir=None):
        """An evaluator as it was saved: it predicts, evaluates, plots and exports.

        Args:
            path: the folder given to `save`.
            gpu_device: GPU number; None for the CPU.
            model_name, data_dir: where base model and data are now, if they have moved.

        Raises:
            UserError: damaged files, or a base model that is not the one of the evaluator.
        """
        folder = Path(path)
        if not (folder / FACTS).exists():
            raise UserError(f"there is no saved evaluator in {folder}: {FACTS} is missing")
        try:
            facts, tensors = store.read(folder / FACTS)
        except Damaged as error:
            raise UserError(f"{error}; save the evaluator again") from None
        whole = facts["model_sha256"]
        facts |= {"model_name": str(model_name or facts["model_name"])}
        facts |= {"data_dir": data_dir or facts["data_dir"]}
        built_from = ("task_name", "seed", "data_dir", "precision", "random_encoder")
        evaluator = GLUEvaluator(
            model_name=str(folder / "model") if whole else facts["model_name"],
            device=gpu_device, **{name: facts[name] for name in built_from},
        )  # fmt: skip
        for name in set(SAVED) - {*built_from, "model_name", "encoder_sha256"}:
            setattr(evaluator, name, facts[name])
        evaluator.runs = [Run(facts["learning_rate"], facts["seed"])]
        evaluator.records, evaluator.selected = [Record(evaluator.runs[0], facts["train_loss"])], 0
        evaluator.scores = reports.frame_of(facts["scores"])
        evaluator._load_model(evaluator.random_encoder and not whole)
        evaluator._take(tensors, facts, folder)
        return evaluator

    def _take(self, tensors, facts, folder):
        """Put what was saved into the model."""
        if facts["model_sha256"]:
            found, wanted = models.fingerprint(self.model, head=True), facts["model_sha256"]
            self.chosen = trainable.whole(n for n, _ in self.model.named_parameters())
        else:
            found, wanted = self.encoder_sha256, facts["encoder_sha256"]
            names = [n for n, _ in self.model.named_parameters() if n in tensors]
            positions = {n: tensors.get(n + POSITIONS) for n in names}
            self.chosen = {n: None if p is None else p.numpy() for n, p in positions.items()}
        if found != wanted:
            raise UserError(
                f"{folder} was trained on another base model than {self.model_name}: "
                "give the one it was trained on as model_name"
            )
        self.stack = Stack(self.model, self.chosen, self.runs)
        for name, (a, b) in self.stack.slices.items() if tensors else ():
            self.stack.values[0, a:b] = tensors[name].flatten()
        self.stack.release()
