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
from functools import partial
from pathlib import Path

import torch

from bitfit.artifacts import run_folder, saved_evaluator
from bitfit.data import task_files
from bitfit.data.tasks import predictions, score
from bitfit.data.tokens import Dataset, concatenate
from bitfit.distributed import SINGLE_PROCESS
from bitfit.model import fingerprints as models_fingerprints
from bitfit.model import forward as models_forward
from bitfit.model import hub, loading, predict, run_stack, trainable, zero_gradients
from bitfit.model.batching import MAX_TOKENS
from bitfit.model.precision import DTYPES, cast_parameters
from bitfit.model.run_stack import Run, RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.results import plots
from bitfit.results import scores as reports
from bitfit.tracking.tracker import OFF
from bitfit.training.checkpoints import Saver
from bitfit.training.loop import Record, fit, start
from bitfit.training.plan import Plan
from utils import (
    Diverged,
    UserError,
    as_list,
    choose_device,
    choose_precision,
    make_generator,
    print_result,
)  # fmt: skip
from utils import set_seed as set_seed  # a name of the released code

LOGGER = logging.getLogger("bitfit")


class GLUEvaluator:
    """Fine-tunes and scores one model on one task; every method raises UserError for bad input.

    It holds K >= 1 runs. What it predicts, saves and plots is that of one of them: the first,
    until `select` chooses another.

    Attributes:
        model: the plain Hugging Face classifier.
        model_commit: the hash of the commit that a model on the Hub is at; None for a folder.
        scores: one table of all runs' scores; `records`: what else each of them measured.
        zero_gradient: {name: [[start, stop], ...]} of the biases that bitfit leaves as they are.
    """

    def __init__(
        self, task_name, model_name, device,
        seed=None, data_dir=None, precision=None, random_encoder=False, max_tokens=None,
        model_revision=None,
    ):  # fmt: skip
        """
        Args:
            task_name: a key of `bitfit.data.tasks.TASKS`, the path of a task file, or its record.
            model_name: a name on the Hub, or a folder.
            device: GPU number; None for the CPU.
            seed: draws classifier, data order, dropout, masks; None: set_seed's; a list: many runs.
            data_dir: GLUE's TSV folders or Parquet files; None: the Hub, or beside the task file.
            precision: "fp32" or "bf16"; None: bf16 on a GPU that has it, else fp32.
            random_encoder: draw the encoder's weights at random (a control).
            max_tokens: the most tokens in one pass; None: the device's default.
            model_revision: of a model on the Hub a tag, branch or commit; None: its main branch.
        """
        if precision not in (None, *DTYPES):
            raise UserError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
        self.task, data_dir = task_files.resolve_task(task_name, data_dir)
        self.task_name = self.task.name
        self.num_labels = self.task.num_labels
        self.model_name, self.data_dir, self.random_encoder = model_name, data_dir, random_encoder
        self.revision, self.model_commit = hub.resolve_revision(model_name, model_revision)
        self.torch_device = choose_device(device)
        self.base_name = Path(model_name).name  # for captions
        self.seeds = as_list(torch.initial_seed() if seed is None else seed)
        self.precision = choose_precision(precision, self.torch_device)
        self.max_tokens = max_tokens or MAX_TOKENS[self.torch_device.type]
        self.zero_gradient = {}  # as from `zero_gradients.find_zero_gradients`
        self.averaged = []  # of an average, each member: see `bitfit.tools.deltas.average`
        self.group = (
            SINGLE_PROCESS  # the `bitfit.distributed.Group` that trains and predicts together
        )

    def _need(self, attribute, call):
        if not hasattr(self, attribute):
            raise UserError(f"call {call} first")

    def preprocess_dataset(
        self, padding, max_sequence_len, batch_size, train_size=None, test_splits=False
    ):
        """Read and tokenize the train and validation splits.

        Args:
            padding: "longest" or "max_length", as in the released code; either way rows are packed
                without padding where the model can, which gives the same results.
            max_sequence_len: rows are cut to so many tokens.
            batch_size: rows per optimizer step.
            train_size: train on so many rows, drawn by the run's seed; None: all.
            test_splits: read the test splits now, not when they are first needed.
        """
        if padding not in ("max_length", "longest", True):
            raise UserError(f"padding {padding!r}: give 'longest' or 'max_length'")
        loading.check_max_length(self.model_name, self.task, max_sequence_len, self.revision)
        self._set_data(max_sequence_len, batch_size, train_size)
        tests = self._test_files() if test_splits else ()
        for split in ("train", *self.task.validation_splits, *tests):
            self.tokens(split)
        self.data.report_overlap()

    def _test_files(self):
        if not self.task.server_files:
            raise UserError(f"the record of {self.task_name} names no test split to predict")
        return self.task.server_files

    def _set_data(self, max_sequence_len, batch_size, train_size):
        self.max_sequence_len, self.batch_size = max_sequence_len, batch_size
        self.train_size = train_size
        self.tokenizer = loading.load_tokenizer(self.model_name, self.revision)
        self.base_fingerprints = loading.base_fingerprints(
            self.model_name, self.task, self.tokenizer, self.revision
        )
        self.data = Dataset(self.task, self.data_dir, self.tokenizer, max_sequence_len, self.seeds,
                            train_size, self.torch_device)  # fmt: skip

    def tokens(self, split):
        """Return the `TokenizedSplit` of a split, read once; None for an absent optional split."""
        self._need("data", "preprocess_dataset")
        return self.data.split(split).tokens

    convert_to_actual_components = staticmethod(trainable.terms_to_components)

    def training_preparation(
        self, learning_rate, optimizer, encoder_trainable, trainable_components=None, verbose=True,
        seed=None,
    ):  # fmt: skip
        """`prepare` in the released code's words.

        Args:
            encoder_trainable: True for full fine-tuning, and before a random mask is set.
            trainable_components: for BitFit; with none the classifier alone trains.
            seed: one of the evaluator's seeds; None: all of them.
        """
        if encoder_trainable and trainable_components:
            raise UserError("encoder_trainable trains everything: give no trainable_components")
        kind = "full_ft" if encoder_trainable else "bitfit" if trainable_components else "frozen"
        terms = trainable_components or ()
        if seed is not None and seed not in self.seeds:
            raise UserError(f"seed {seed} is none of this evaluator's: {self.seeds}")
        own = [Run(float(rate), seed) for rate in as_list(learning_rate) if seed is not None]
        self.prepare(kind, learning_rate, optimizer, terms, None, verbose, own or None)

    def prepare(
        self, fine_tune_type, learning_rate, optimizer="adamw", components=(), mask_size=None,
        verbose=True, only=None,
    ):  # fmt: skip
        """Load the model and choose what trains.

        Args:
            fine_tune_type: one of `options.FINE_TUNE_TYPES`.
            learning_rate: of the optimizer, before any schedule; a list: runs for each.
            components: for bitfit, what `convert_to_actual_components` gives.
            mask_size: for rand_uniform; None: the paper's for its models, else as many as bitfit.
            verbose: print the trained tensors.
            only: some of the runs, pairs of a learning rate and a seed; None: all.
        """
        if optimizer not in ("adamw", "adam"):
            raise UserError(f"unknown optimizer {optimizer!r}; known: adamw, adam")
        self._need("data", "preprocess_dataset")
        pairs = [Run(float(rate), seed) for rate in as_list(learning_rate) for seed in self.seeds]
        if len(set(pairs)) < len(pairs):
            raise UserError("a learning rate or seed is given twice: give each once")
        pairs = pairs if only is None else list(only)
        self._load_model(self.random_encoder, report=not hasattr(self, "model"))
        self.runs, self.optimizer, self.verbose = pairs, optimizer, verbose
        self.components, self.selected = list(components), 0
        self.records, self.scores = [Record(run) for run in pairs], reports.scores_frame([])
        self._choose(fine_tune_type, mask_size)
        self._forward("train")
        self.zero_gradient = self._find_zero_gradient()

    def _load_model(self, random_encoder, report=False):
        self.model, initialized = loading.load_model(
            self.model_name, self.task, random_encoder, self.revision, report
        )
        self._draw = partial(loading.init_head, names=initialized) if initialized else None
        self.encoder_sha256 = models_fingerprints.fingerprint(self.model)
        self.model.to(self.torch_device)
        self.token_budget = TokenBudget(self.max_tokens, self.torch_device)
        for outdated in ("stack", "trainable", "_found", "_longest_tried"):
            vars(self).pop(outdated, None)

    def _forward(self, split):
        """The model's `Forward`, found on rows of all splits read so far.

        It is found again for a split that is read later and has longer rows.
        """
        longest = self.tokens(split).lengths.max()
        if longest > vars(self).get("_longest_tried", 0):
            parts = [own.tokens for own in self.data.splits.values() if own.tokens]
            tokens, dtype = concatenate(parts), DTYPES[self.precision]
            self._found = models_forward.select_forward(self.model, self.model_name, tokens, dtype)
            self._longest_tried = tokens.lengths.max()
        else:
            models_forward.check_ids(self.model, self.model_name, self.tokens(split))
        return self._found

    @property
    def row_batching(self):
        """How rows share a pass: "packed", "padded" or "equal length"."""
        self._need("model", "training_preparation")
        return self._forward("train").batching_kind

    def _find_zero_gradient(self):
        """The biases whose gradient is zero; a line says which, unless an earlier one did."""
        if not self.trains_only_biases:
            return {}
        found = zero_gradients.find_zero_gradients(self.model, self.trainable, self.tokens("train"))
        if found and found != self.zero_gradient:
            LOGGER.info("kept fixed, since the logits do not depend on it (its gradient is zero): "
                        "%s", zero_gradients.format_zero_gradients(found, self.model))  # fmt: skip
        return found

    def _choose(self, fine_tune_type, mask_size=None):
        rng = make_generator(self.runs[0].seed, "mask")
        self.trainable = trainable.select_trainable(
            self.model, fine_tune_type, self.components, mask_size, rng
        )
        self.fine_tune_type = fine_tune_type
        vars(self).pop("_reason", None)
        if self.verbose:
            print_result(trainable.trainable_table(self.model, self.trainable))

    def set_uniform_mask(self, mask_size=None):
        """Train so many parameters drawn uniformly from the encoder, and the classifier."""
        self._set_mask("rand_uniform", mask_size)

    def set_row_and_column_random_mask(self):
        """Train one random column, or as many rows, of each matrix, and the classifier."""
        self._set_mask("rand_row_col")

    def _set_mask(self, fine_tune_type, mask_size=None):
        self._need("trainable", "training_preparation")
        if hasattr(self, "stack") or not trainable.trains_matrices(self.model, self.trainable):
            raise UserError("a random mask needs training_preparation(encoder_trainable=True)")
        self._choose(fine_tune_type, mask_size)

    def fingerprints(self):
        """What results depend on beside flags: hashes of the data, the base model, what trains."""
        scored = self.data.scored()
        tests = [split for name, split in self.data.splits.items() if name not in scored]
        return {
            "data_sha256": hash_of_splits(scored.values()),
            "test_sha256": hash_of_splits(split for split in tests if split.tokens),
            "encoder_sha256": self.encoder_sha256,
            "chosen_sha256": self.trainable_sha256(),
            **self.base_fingerprints,
            **({"zero_gradient": self.zero_gradient} if self.zero_gradient else {}),
        }

    def trainable_sha256(self):
        """Return the hash of the names and positions that train."""
        return models_fingerprints.sha256(v for item in self.trainable.items() for v in item)

    @property
    def masks(self):
        """{parameter name: bool tensor of its shape}, True where a random mask trains."""
        self._need("trainable", "training_preparation")
        return trainable.dense_masks(self.model, self.trainable)

    def reason_not_stackable(self):
        """Why several runs cannot be trained in one pass, or None if they can."""
        self._need("trainable", "training_preparation")
        if len(self.runs) > 1 and not hasattr(self, "_reason"):
            tokens = self.tokens("train")
            self._reason = run_stack.reason_not_stackable(
                self._forward("train"), self.trainable, tokens
            )
        return self._reason if len(self.runs) > 1 else None

    def passes(self, share=None):
        """[[run, ...]]: all together, or one after the other where they cannot share a pass.

        Args:
            share: some of the runs, for those alone.
        """
        share = self.runs if share is None else share
        reason = self.reason_not_stackable()
        if len(share) > 1:
            how = f"one after the other: {reason}" if reason else "in one pass"
            LOGGER.info("%d runs %s", len(share), how)
        return [[run] for run in share] if reason else [share]

    def train_and_evaluate(
        self, num_epochs, output_path=None, evaluation_frequency=1,
        lr_schedule="constant", warmup_ratio=0.0, keep="last", saver=None,
        tracker=OFF, curves=True,
    ):  # fmt: skip
        """Train all runs together, score them, write their metrics and learning curves.

        Args:
            output_path: folder for metrics and curves; with several runs each has a folder in it,
                named `Run.name`. Or {run: its folder}, of some runs: the others write nothing.
            evaluation_frequency, lr_schedule, warmup_ratio: as in `bitfit.training.plan.Plan`.
            keep: "last", or "best": keep of each run the values of its best evaluation.
            saver: a `bitfit.training.checkpoints.Saver`, to write checkpoints and go on from one.
            tracker: a `bitfit.tracking.tracker.Tracker`, to be told what is measured while it is.
            curves: plot the learning curves.

        Raises:
            Diverged: in every run a loss or gradient was not finite. Each holds its last good
                values (with `keep` its best), and what was measured is kept and written.
        """
        if lr_schedule not in ("constant", "linear") or keep not in ("last", "best"):
            raise UserError("lr_schedule is 'constant' or 'linear', keep is 'last' or 'best'")
        if min(num_epochs, evaluation_frequency) < 1:
            raise UserError("num_epochs and evaluation_frequency are at least 1")
        reason = self.reason_not_stackable()
        if hasattr(self, "stack"):
            raise UserError("this evaluator has been trained: prepare it again to train again")
        if reason:
            raise UserError(f"{len(self.runs)} runs cannot train in one pass, {reason}: "
                            "prepare and train one after the other")  # fmt: skip
        folders = run_folder.run_folders(output_path, self.runs)
        plan = Plan(self.task, self._forward("train"), self.data.split("train"),
                    self.data.scored(), self.token_budget, self.batch_size, num_epochs, lr_schedule,
                    warmup_ratio, evaluation_frequency, self.group)  # fmt: skip
        set_seed(self._dropout_seed())
        self.stack = RunStack(self.model, self.trainable, self.runs, self._draw, self.zero_gradient)
        state = start(plan, self.stack, self.optimizer, keep)
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        saver = saver or Saver()
        saver.load(state)
        tracker.open_runs(state, folders)
        try:
            with self.stack.patched(DTYPES[self.precision]), saver.held():
                diverged = fit(state, lambda: self._note(state, folders), saver, tracker)
        finally:
            if state.best is not None:
                self.stack.set_params(state.best)
            self._note(state)
        self._note(state, folders)
        for run, folder in folders.items() if curves else ():
            if len(self._scores_of(run)):
                self.plot_learning_curves(folder, run)
        if diverged:
            raise Diverged(diverged)

    def _dropout_seed(self):
        """The run's own; several ranks each draw for their rows."""
        seed, rank = self.runs[0].seed, self.group.rank
        return (
            int(make_generator(seed, f"dropout of rank {rank}").integers(2**63)) if rank else seed
        )

    def _note(self, state, folders=None):
        """Take what a training has measured so far, and write it."""
        self.records, self.scores = state.records, reports.scores_frame(state.scores)
        for k, record in enumerate(state.records):
            if not folders or record.run not in folders:
                continue
            folder, scores = folders[record.run], self._scores_of(record.run)
            reports.write_metrics(folder, self.task, record, scores, reports.metrics_metadata(self))
            saved_evaluator.write_logits(folder, state, k)

    def select(self, run):
        """Let the model and all results below be those of run number `run`, counted from 0."""
        self._need("stack", "train_and_evaluate")
        if not 0 <= run < len(self.runs):
            raise UserError(f"there is no run {run}: there are {len(self.runs)}, counted from 0")
        self.stack.load_run(run)
        self.selected = run

    @property
    def record(self):
        self._need("records", "training_preparation")
        return self.records[self.selected]

    @property
    def evaluations(self):
        """{split: {metric: [value per evaluated epoch]}}"""
        return reports.scores_by_split(self._scores_of(self.record.run))

    def _scores_of(self, run):
        return self.scores[self.scores["run"] == run.name]

    def predict(self, split):
        """Logits of a split, (rows, C) float32, in the order of its rows."""
        self._need("model", "training_preparation")
        forward = self._forward(split)
        with cast_parameters(self.model, DTYPES[self.precision]):
            return predict.predict(forward, self.tokens(split), self.token_budget, group=self.group)

    def evaluate(self, split):
        """{metric: value} of a split with labels, all its rows."""
        if split not in ("train", *self.task.validation_splits):
            raise UserError(f"{split!r} has no labels: give train or a validation split")
        return score(self.task, self.predict(split), self.tokens(split).labels.cpu().numpy())

    def export_model_test_set_predictions(self, output_path):
        """Write the test predictions as files for the GLUE server; returns their paths.

        The ranks of a group predict together; one of them writes.
        """
        Path(output_path).mkdir(parents=True, exist_ok=True)
        written = []
        for split, name in self._test_files().items():
            if self.tokens(split) is None:
                LOGGER.info("there is no %s set: %s is not written", split, name)
                continue
            written.append(Path(output_path) / name)
            own = predictions(self.task, self.predict(split))
            if self.group.rank == 0:
                reports.write_predictions(written[-1], self.task, own)
        return written

    def export_model(self, output_path):
        """Write a plain Hugging Face folder: weights, config with label names, tokenizer."""
        self._need("model", "training_preparation")
        loading.write_model(self.model, self.tokenizer, output_path)

    @property
    def method_caption(self):
        """One line that says what was run, whatever the run."""
        model = self.base_name + (" (random encoder)" if self.random_encoder else "")
        terms = ", ".join(trainable.components_to_terms(self.components))
        method = f"bitfit ({terms})" if terms else self.fine_tune_type
        return f"{self.task.folder}, {model}, {method}"

    @property
    def caption(self):
        """One line that says what the selected run was."""
        of = f"average of {len(self.averaged)}" if self.averaged else self.record.run.caption
        return f"{self.method_caption}, {of}"

    def score_table(self):
        """The last and best scores as text."""
        table = reports.score_table(self._scores_of(self.record.run), self.task)
        return f"{self.caption}\n{table}"

    def plot_learning_curves(self, output_path=None, run=None):
        """{metric: figure}; in the folder `output_path` each as learning_curves_<metric>.png."""
        run = run or self.record.run
        scores, caption = self._scores_of(run), f"{self.method_caption}, {run.caption}"
        if scores.empty:
            raise UserError("call train_and_evaluate first: there are no scores to plot")
        return plots.learning_curves(scores, self.task, caption, output_path)

    @property
    def trains_only_biases(self):
        """Whether there are bias terms whose change can be plotted: so it is with bitfit."""
        return trainable.trains_only_biases(self.model, self.trainable)

    def terms_changes(self):
        """(names, changes): how far each bias term moved, per layer; see `plots.bias_changes`."""
        self._need("stack", "train_and_evaluate")
        if not self.trains_only_biases:
            raise UserError("only bitfit has bias terms to plot")
        before = self.stack.named_params(self.selected, self.stack.initial_params)
        after = self.stack.named_params(self.selected)
        return plots.bias_changes(before, after, self.zero_gradient)

    def plot_terms_changes(self, output_path=None):
        """The paper's figure 1, how far each bias term moved; its numbers too are saved to
        `output_path`, with the endings .png and .csv."""
        names, changes = self.terms_changes()
        figure = plots.bias_heatmap(names, changes, self.caption)
        if output_path:
            plots.save_figure(figure, Path(output_path).with_suffix(".png"))
            plots.write_changes(names, changes, Path(output_path).with_suffix(".csv"))
        return figure

    def save(self, output_path):
        """Write the selected run: facts, and what trained (if all did, the whole model)."""
        self._need("stack", "train_and_evaluate")
        saved_evaluator.write(self, Path(output_path))

    @staticmethod
    def load(path, gpu_device, model_name=None, data_dir=None):
        """As it was saved; `model_name`, `data_dir`: where base model and data are now."""
        return saved_evaluator.read(GLUEvaluator, Path(path), gpu_device, model_name, data_dir)


def hash_of_splits(splits):
    """Return one hash of the tokens and labels of some splits."""
    return models_fingerprints.sha256(array for split in splits for array in split.tokens[:5])
