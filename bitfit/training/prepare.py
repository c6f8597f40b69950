"""A model prepared for training and prediction.

`assemble` puts forward pass, token budget and run stack together for all programs;
`train.new_training` adds the plan and the state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.distributed import Group
from bitfit.model import fingerprints, forward_trials, predict, trainable, zero_gradients
from bitfit.model.batching import MAX_TOKENS
from bitfit.model.bias_terms import check_different
from bitfit.model.forward import Forward, check_ids
from bitfit.model.precision import cast_parameters
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack, ZeroGradient
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import Trainable, components_to_terms
from bitfit.parsing import NOT_NEGATIVE, check_values, split_repeated
from bitfit.results import plots
from bitfit.training.result import TrainingResult
from bitfit.training.setup import LoadedData, Method, Setup, load_base, method_for_terms, need
from utils import LOGGER, UserError, as_list, make_generator, print_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Selection(NamedTuple):
    """The parameters that train with one set of bias terms."""

    method: Method
    trainable: Trainable
    zero_gradient: ZeroGradient


@dataclass
class PreparedModel:
    """A model with its trainable parameters, forward pass and token budget.

    `selected_forward` is None until a split is given to `forward_for`, because saved evaluators are
    loaded without data.
    """

    model: "PreTrainedModel"
    model_name: str
    runs: list[Run]
    trainable: Trainable
    dtype: torch.dtype
    token_budget: TokenBudget
    selected_forward: Forward | None = None
    max_length_tried: int = 0
    method: Method = field(default_factory=Method)
    encoder_sha256: str = ""
    init_head: Callable | None = None  # (model, seed) -> None; None: the head is not random
    zero_gradient: ZeroGradient = field(default_factory=dict)
    selections: dict[str | None, Selection] = field(default_factory=dict)  # {`Run.terms`: ...}
    base_biases: dict[str, torch.Tensor] = field(default_factory=dict)  # before a warm start
    verbose: bool = False  # print the trained tensors
    stackable_checked: bool = False
    not_stackable: str | None = None

    def forward_for(self, tokens: TokenizedSplit, known: Callable[[], TokenizedSplit]) -> Forward:
        """Return the forward pass for a split, tried again if its rows are the longest so far.

        Args:
            known: returns the tokens for the trial: the tokens of all splits read so far.
        """
        if self.selected_forward is None or tokens.lengths.max() > self.max_length_tried:
            return self.select_forward(known())
        check_ids(self.model, self.model_name, tokens)
        return self.selected_forward

    @property
    def forward(self) -> Forward:
        """Return the forward pass; UserError if no split has been given to `forward_for`."""
        return need(self.selected_forward, "forward_for")

    def select_forward(self, tokens: TokenizedSplit) -> Forward:
        """Choose the fastest forward pass that gives the right logits on some rows."""
        forward = forward_trials.select_forward(
            self.model, self.model_name, tokens, dtype=self.dtype
        )
        self.selected_forward, self.max_length_tried = forward, tokens.lengths.max()
        return forward

    def reason_not_stackable(self, tokens: TokenizedSplit) -> str | None:
        """Return why several runs cannot train in one pass, or None if they can."""
        if not self.stackable_checked:
            reason = forward_trials.reason_not_stackable(self.forward, self.trainable, tokens)
            self.not_stackable, self.stackable_checked = reason, True
        return self.not_stackable

    def passes(self, tokens: TokenizedSplit, share: Sequence[Run] | None = None) -> list[list[Run]]:
        """Return the runs of a share (None: all) that train together: all, or each alone."""
        reason = self.reason_not_stackable(tokens) if len(self.runs) > 1 else None
        return split_into_passes(self.runs if share is None else share, reason)

    def for_run(self, run: Run) -> "PreparedModel":
        """Return this model with the method and the trainable parameters of one run."""
        selection = self.selections.get(run.terms)
        return replace(self, selections={}, **selection._asdict()) if selection else self

    def method_of(self, run: Run) -> Method:
        """Return the method of one run."""
        return self.for_run(run).method

    def bias_changes(self, result: TrainingResult) -> pd.DataFrame:
        """Return the mean change of each bias term in each layer; see `plots.bias_changes`."""
        trained = self.for_run(result.record.run).trainable
        if not trainable.trains_only_biases(self.model, trained):
            raise UserError("only bitfit has bias terms to plot")
        values = result.values_before_and_after()
        before, after = ({name: of_run[name] for name in trained} for of_run in values)
        after |= {name: self.model.get_parameter(name).detach() for name in self.base_biases}
        return plots.bias_changes(before | self.base_biases, after, self.zero_gradient)

    def with_mask(
        self, fine_tune_type: str, mask_size: int | None, result: TrainingResult | None
    ) -> "PreparedModel":
        """Return a model in which a random mask trains; `result` is None unless it was trained."""
        if result or not trainable.trains_matrices(self.model, self.trainable):
            raise UserError("a random mask needs training_preparation(encoder_trainable=True)")
        method = replace(self.method, fine_tune_type=fine_tune_type, mask_size=mask_size)
        selected = select_trainable(self.model, method, self.runs, verbose=self.verbose)
        return replace(self, method=method, trainable=selected, selections={},
                       stackable_checked=False)  # fmt: skip

    def predict(
        self, data: LoadedData, split: str, group: Group, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the logits of all rows of a split, or of some (rows,), as (rows, C) float32."""
        tokens = data.tokens(split)
        forward = self.forward_for(tokens, data.all_tokens)
        with cast_parameters(self.model, self.dtype):
            return predict.predict(forward, tokens, self.token_budget, rows=rows, group=group)

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Return {parameter: bool tensor of its shape}, True where a random mask trains."""
        return trainable.dense_masks(self.model, self.trainable)

    @property
    def changed(self) -> Trainable:
        """Return the parameters that differ from the base model, by training or a warm start."""
        start = self.method.start
        return start.changed(self.model, self.trainable) if start else self.trainable

    @property
    def trains_only_biases(self) -> bool:
        """Return whether bitfit trains."""
        return trainable.trains_only_biases(self.model, self.trainable)

    def fingerprints(self, data: LoadedData) -> dict[str, Any]:
        """Return the hashes of the data, the base model and the trainable parameters."""
        hashes: dict[str, Any] = data.hashes() | {"encoder_sha256": self.encoder_sha256}
        chosen = self.trainable_fingerprints()
        hashes |= {"chosen_sha256": chosen.pop("chosen_sha256"), **data.base_fingerprints}
        hashes["start_sha256"] = self.method.start and self.method.start.record["sha256"]
        return hashes | chosen

    def trainable_fingerprints(self) -> dict[str, Any]:
        """Return the hash of the names and positions that train, and the zero gradients if any."""
        digest = fingerprints.sha256(v for item in self.trainable.items() for v in item)
        fixed = {"zero_gradient": self.zero_gradient} if self.zero_gradient else {}
        return {"chosen_sha256": digest} | fixed

    def new_stack(self) -> RunStack:
        """Return the stack of all runs at their initial values."""
        of_runs = [self.for_run(run) for run in self.runs]
        return RunStack(
            self.model,
            self.trainable,
            self.runs,
            init_run=self.init_head,
            selections=[(of_run.trainable, of_run.zero_gradient) for of_run in of_runs],
        )


def assemble(
    model: "PreTrainedModel", model_name: str, trainable: Trainable, runs: list[Run], *,
    dtype: torch.dtype, max_tokens: int | None = None, tokens: TokenizedSplit | None = None,
) -> PreparedModel:  # fmt: skip
    """Return a `PreparedModel` of a model on a device; the other fields have defaults.

    Args:
        max_tokens: in one forward pass; None: the default of the device.
        tokens: rows for the trial of the forward pass; None: `forward_for` selects it later.
    """
    device = next(model.parameters()).device
    budget = TokenBudget(max_tokens or MAX_TOKENS[device.type], device)
    prepared = PreparedModel(
        model=model, model_name=model_name, runs=runs, trainable=trainable, dtype=dtype,
        token_budget=budget,
    )  # fmt: skip
    if tokens is not None:
        prepared.select_forward(tokens)
    return prepared


def prepare_model(
    setup: Setup, data: LoadedData, runs: list[Run], method: Method,
    before: PreparedModel | None = None, verbose: bool = False,
) -> PreparedModel:  # fmt: skip
    """Load the base model, and select the trainable parameters and the forward pass.

    Args:
        before: an earlier model of the evaluator, whose log lines are not repeated.
        verbose: print the trained tensors.
    """
    model, fields = load_base(setup, report=before is None)
    if method.start:
        apply, sha256 = method.start.apply, fields["encoder_sha256"]
        fields["base_biases"] = apply(model, setup.task, sha256, report=before is None)
        fields["init_head"] = None if method.start.order else fields["init_head"]
    selections = {}
    for terms in dict.fromkeys(run.terms for run in runs):
        of_terms = method_for_terms(method, terms, model, report=before is None)
        selected = select_trainable(model, of_terms, runs, verbose=verbose)
        selections[terms] = Selection(of_terms, selected, {})
    method = of_terms if list(selections) == [None] else method  # for a later `prepare_runs`
    if len(selections) > 1:  # all train whole parameters
        names = {name for selection in selections.values() for name in selection.trainable}
        selected = {name: None for name, _ in model.named_parameters() if name in names}
    prepared = assemble(
        model, setup.model_name, selected, runs=runs, dtype=setup.dtype, max_tokens=setup.max_tokens
    )
    prepared = replace(prepared, method=method, verbose=verbose, selections=selections, **fields)
    tokens = data.tokens("train")
    prepared.forward_for(tokens, data.all_tokens)
    find_zero_gradients(prepared, tokens)
    found = prepared.zero_gradient
    if found and (before is None or found != before.zero_gradient):
        LOGGER.info("kept fixed, since the logits do not depend on it (its gradient is zero): %s",
                    zero_gradients.format_zero_gradients(found, model))  # fmt: skip
    return prepared


def find_zero_gradients(prepared: PreparedModel, tokens: TokenizedSplit) -> None:
    """Set the biases without a gradient, of each set of bias terms and of all sets."""
    for terms, selection in prepared.selections.items():
        if trainable.trains_only_biases(prepared.model, selection.trainable):
            found = zero_gradients.find_zero_gradients(prepared.model, selection.trainable, tokens)
            prepared.selections[terms] = selection._replace(zero_gradient=found)
            prepared.zero_gradient = prepared.zero_gradient | found
    sets = {terms: (s.trainable, s.zero_gradient) for terms, s in prepared.selections.items()}
    check_different(prepared.model, sets)


def select_trainable(
    model: "PreTrainedModel", method: Method, runs: list[Run], verbose: bool
) -> Trainable:
    """Return the trainable parameters; the seed of the first run draws a random mask."""
    rng = make_generator(runs[0].seed, "mask")
    selected = trainable.select_trainable(
        model, method.fine_tune_type, method.components, mask_size=method.mask_size, rng=rng
    )
    if verbose:
        print_result(trainable.trainable_table(model, selected))
    return selected


def make_runs(
    setup: Setup, learning_rate: float | Sequence[float], only_seed: int | None = None
) -> list[Run]:
    """Return a run for each learning rate, seed and data seed, or for one of the seeds only."""
    if only_seed is not None and only_seed not in setup.seeds:
        raise UserError(f"seed {only_seed} is not one of this evaluator's seeds: {setup.seeds}")
    runs = [
        Run(rate, seed, None if data_seed == seed else data_seed)
        for rate in check_values("learning_rate", learning_rate, NOT_NEGATIVE)
        for seed in (setup.seeds if only_seed is None else [only_seed])
        for data_seed in setup.data_seeds or [seed]
    ]
    if not runs:
        raise UserError("learning_rate: give at least one")
    if len(set(runs)) < len(runs):
        raise UserError("a learning rate or seed is given twice: give each once")
    return runs


def assign_terms(
    components: Sequence[str] | Sequence[Sequence[str]] | None, runs: Sequence[Run]
) -> tuple[tuple[str, ...], list[Run]]:
    """Return (terms, runs): of a single set, or () and the runs with the terms of each set."""
    sets = split_repeated(as_list(components or ()))
    if not all(isinstance(word, str) for terms in sets for word in terms):
        raise UserError("components: give one list of bias terms, or a list of such lists")
    first, *others = sets
    if not others:
        return tuple(first), list(runs)
    names = [" ".join(components_to_terms(terms)) for terms in sets]
    if len(set(names)) < len(names):
        raise UserError("a set of bias terms is given twice: give each once")
    return (), [run._replace(terms=name) for name in names for run in runs]


def split_into_passes(runs: Sequence[Run], reason: str | None) -> list[list[Run]]:
    """Return the groups of runs that train together.

    Args:
        reason: why runs cannot share a pass; None: they can.
    """
    if reason and len(runs) > 1:
        LOGGER.info("%d runs one after the other: %s", len(runs), reason)
    return [[run] for run in runs] if reason else [list(runs)]
