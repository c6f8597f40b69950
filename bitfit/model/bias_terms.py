"""The bias terms of a model, as `--bias-terms` names them; zero biases for models without any.

A term is the name of a module in the architecture (`attn.Wqkv`, or only its last parts: `Wqkv`), or
the paper's name of the module with the same purpose (`intermediate`).

Biases are added to the loaded model, so that weights, random values and fingerprints are those of
the base model. The switches of its config are found by building models without weights and
comparing the names of their parameters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import pandas as pd
import torch

from bitfit.data.tasks import Task
from bitfit.model import loading
from bitfit.model.trainable import (
    ALL_BIASES,
    bitfit_names,
    components_to_terms,
    encoder_biases,
    in_encoder,
    is_bias,
    relative_name,
)
from bitfit.options import NO_TERMS, TERMS
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SWITCH = re.compile(r"(\w+_)?bias")  # attention_bias, use_qkv_bias, bias, and no_bias
# The paper's term -> the modules with its purpose in other architectures. A norm before a block has
# no counterpart in the paper, nor has a joint projection of query, key and value.
ALIASES = {
    "query": ("query", "query_proj", "q_proj", "q_lin", "attn.q", "q_bias"),
    "key": ("key", "key_proj", "k_proj", "k_lin", "attn.k"),
    "value": ("value", "value_proj", "v_proj", "v_lin", "attn.v", "v_bias"),
    "attention_output": ("attn.Wo", "o_proj", "out_proj", "out_lin", "attention.dense",
                         "self_attention.dense", "attn.o", "attn.c_proj"),
    "attention_layernorm": ("sa_layer_norm",),
    "intermediate": ("mlp.Wi", "mlp.gate_proj", "mlp.up_proj", "lin1", "fc1", "mlp.c_fc",
                     "mlp.dense_h_to_4h"),
    "output": ("mlp.Wo", "mlp.down_proj", "lin2", "fc2", "mlp.c_proj", "mlp.dense_4h_to_h"),
    "output_layernorm": ("output_layer_norm",),
}  # fmt: skip


def model_of_config(
    model_name: str, task: Task, *, revision: str | None = None, added: bool = False
) -> "PreTrainedModel":
    """Return a classifier, perhaps with added biases, before its trained weights are loaded."""
    config = loading.load_config(model_name, task, revision)
    with loading.convert_load_errors(model_name, revision):
        try:
            with torch.device("meta"):  # without weights
                model = loading.build_model(config, task)
        except Exception:  # some models compute with weights when they are built
            model = loading.build_model(config, task)
    if added:
        add_biases(model)
    return model


def select_components(
    model: "PreTrainedModel", terms: Sequence[str], report: bool = False
) -> tuple[str, ...]:
    """Return the relative names of the biases of terms (all: "bias"); UserError if there are none.

    Args:
        terms: as in `--bias-terms`, or relative names such as "attention.self.query.bias".
        report: log the parameters of each term.
    """
    biases, selected = need_biases(model), []
    for term in components_to_terms(terms):
        if term == NO_TERMS:
            raise UserError("--bias-terms none trains the classifier alone: give it without other "
                            "terms, or the fine-tune type frozen")  # fmt: skip
        found = [ALL_BIASES] if term == "all" else find_components(biases.values(), term)
        if not found:
            raise UserError(unknown_term_message(model, term))
        if report and term != "all":
            sizes = [model.get_parameter(n).numel() for n, kind in biases.items() if kind in found]
            LOGGER.info("bias term %s: %s (%d tensors, %s parameters)", term, ", ".join(found),
                        len(sizes), f"{sum(sizes):,}")  # fmt: skip
        selected += found
    return tuple(dict.fromkeys(selected))


def check_term_sets(model: "PreTrainedModel", sets: Iterable[Sequence[str]]) -> None:
    """Raise UserError if the model lacks a term of a set, or two sets train the same parameters."""
    checked: dict[tuple[str, ...], str] = {}
    for terms in sets:
        components = () if list(terms) == [NO_TERMS] else select_components(model, terms)
        names = tuple(bitfit_names(model, components)) if components else ()
        words = " ".join(terms)
        if other := checked.get(names):
            raise UserError(f"--bias-terms {words}: trains the same as --bias-terms {other}: give "
                            "one of them")  # fmt: skip
        checked[names] = words


def check_different(
    model: "PreTrainedModel", sets: Mapping[str | None, tuple[Iterable[str], Mapping]]
) -> None:
    """Raise UserError if two sets of bias terms differ only in biases whose gradient is zero.

    Args:
        sets: {terms: (names of the parameters that train, {name: its ranges of zero gradient})}.
    """
    checked: dict[frozenset[str], str | None] = {}
    for terms, (trained, fixed) in sets.items():
        whole = {name: [[0, model.get_parameter(name).numel()]] for name in trained}
        names = frozenset(name for name in trained if fixed.get(name) != whole[name])
        if names in checked:
            others = f"--bias-terms {checked[names]}, apart from biases without a gradient"
            raise UserError(f"--bias-terms {terms}: trains the same as {others}: give one of them")
        checked[names] = terms


def need_biases(model: "PreTrainedModel") -> dict[str, str]:
    """Return {name: relative name} of the encoder's biases; raise UserError if it has none."""
    if biases := encoder_biases(model):
        return biases
    switches = ", ".join(find_switches(model))
    advice = f"--add-biases adds them ({switches} in its config)" if switches else ""
    problem = f"this {model.config.model_type} model has no biases at all, so bitfit cannot train"
    raise UserError(f"{problem} it: {advice or 'give another model'}")


def find_components(kinds: Iterable[str], term: str) -> list[str]:
    """Return the relative names that a term selects among all relative names of a model."""
    kinds = list(dict.fromkeys(kinds))
    exact = [kind for kind in (TERMS.get(term, (term,))[0], f"{term}.bias") if kind in kinds]
    ends = tuple(f".{name}{end}" for name in ALIASES.get(term, (term,)) for end in ("", ".bias"))
    return exact[:1] or [kind for kind in kinds if f".{kind}".endswith(ends)]


def unknown_term_message(model: "PreTrainedModel", term: str) -> str:
    """Return the error message for a term that selects no bias."""
    kinds = dict.fromkeys(encoder_biases(model).values())
    paper = {name: find_components(kinds, name) for name in TERMS}
    names = [f"{name} ({', '.join(components_to_terms(found))})" for name, found in paper.items()
             if found and found != [TERMS[name][0]]]  # fmt: skip
    return (
        f"--bias-terms {term}: this {model.config.model_type} model has no such bias; its terms: "
        f"{', '.join(components_to_terms([*kinds]))}, all"
        + f"; of the paper's names apply: {', '.join(names)}"
        * bool(names)
    )


def terms_table(model: "PreTrainedModel") -> str:
    """Return a table of the model's bias terms; raise UserError if it has none."""
    biases = need_biases(model)
    paper = {kind: term for term in TERMS for kind in find_components(biases.values(), term)}
    table = pd.DataFrame({
        "term": components_to_terms([*biases.values()]),
        "in the paper": [paper.get(kind, "-") for kind in biases.values()],
        "tensors": 1,
        "parameters": [model.get_parameter(name).numel() for name in biases],
        "example": [*biases],
    })  # fmt: skip
    table = table.groupby(["term", "in the paper"], sort=False, as_index=False).agg(
        {"tensors": "sum", "parameters": "sum", "example": "first"}
    )
    table.loc[len(table)] = ["all", "-", *table[["tensors", "parameters"]].sum(), "-"]
    return table.to_string(index=False, formatters={"parameters": "{:,}".format})


def add_biases(model: "PreTrainedModel", report: bool = False) -> None:
    """Add zero biases to a model, and switch them on in its config; UserError if it has no switch.

    Args:
        report: log which biases are added.
    """
    switches = find_switches(model)
    added = added_parameters(model, switches)
    if not added:
        problem = f"the config of this {model.config.model_type} model cannot add biases"
        advice = "leave it out" if encoder_biases(model) else "give another model"
        raise UserError(f"--add-biases: {problem}: {advice}")
    for name, shape in added.items():
        module_name, _, kind = name.rpartition(".")
        zeros = torch.zeros(shape, dtype=torch.float32, device=model.device)
        setattr(model.get_submodule(module_name), kind, torch.nn.Parameter(zeros))
    model.config.update(switches)
    if report:
        terms = {relative_name(model, n).removesuffix(".bias") for n in added}
        LOGGER.info(
            "added biases: %d tensors with %s zeros (%s), switched on in the config by %s",
            len(added), f"{sum(shape.numel() for shape in added.values()):,}",
            ", ".join(sorted(terms)), ", ".join(switches),
        )  # fmt: skip


def find_switches(model: "PreTrainedModel") -> dict[str, bool]:
    """Return {config attribute: value that adds biases to the encoder, and nothing else}."""
    found = {}
    for name, value in model.config.to_dict().items():
        negated = name.startswith("no_")
        if SWITCH.fullmatch(name) and value is negated:
            added = added_parameters(model, {name: not value})
            if any(in_encoder(model, n) for n in added) and all(map(is_bias, added)):
                found[name] = not value
    return found


def added_parameters(model: "PreTrainedModel", values: dict[str, bool]) -> dict[str, torch.Size]:
    """Return {name: shape} that a model gains by values of its config; none if others change."""
    config = deepcopy(model.config)
    config.update(values)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        with torch.device("meta"):  # without weights
            after = {n: p.shape for n, p in type(model)(config).named_parameters()}
    except Exception:  # of any kind: the architecture does not support these values
        return {}
    if not before.items() <= after.items():
        return {}
    return {name: shape for name, shape in after.items() if name not in before}
