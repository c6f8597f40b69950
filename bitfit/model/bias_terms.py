"""The bias terms of a model, as `--bias-terms` names them.

A term is the name of a module in the architecture (`attn.Wqkv`, or only its last parts: `Wqkv`), or
the paper's name of the module with the same purpose (`intermediate`).
"""

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from bitfit.data.tasks import TASKS
from bitfit.model import loading
from bitfit.model.added_biases import add_biases as add_zero_biases
from bitfit.model.added_biases import find_switches
from bitfit.model.trainable import ALL_BIASES, components_to_terms, encoder_biases
from bitfit.options import TERMS
from utils import UserError, convert_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger("bitfit")
# The paper's term -> the modules with its purpose in other architectures. A norm before a block has
# no counterpart in the paper, nor has a joint projection of query, key and value.
ALIASES = {
    "query": ("query", "query_proj", "q_proj", "q_lin", "attn.q"),
    "key": ("key", "key_proj", "k_proj", "k_lin", "attn.k"),
    "value": ("value", "value_proj", "v_proj", "v_lin", "attn.v"),
    "attention_output": ("attn.Wo", "o_proj", "out_proj", "out_lin", "attention.dense",
                         "self_attention.dense", "attn.o", "attn.c_proj"),
    "attention_layernorm": ("sa_layer_norm",),
    "intermediate": ("mlp.Wi", "mlp.gate_proj", "mlp.up_proj", "lin1", "fc1", "mlp.c_fc",
                     "mlp.dense_h_to_4h"),
    "output": ("mlp.Wo", "mlp.down_proj", "lin2", "fc2", "mlp.c_proj", "mlp.dense_4h_to_h"),
    "output_layernorm": ("output_layer_norm",),
}  # fmt: skip


def check_terms(
    model_name: str, terms: Sequence[str], *, add_biases: bool, revision: str | None = None
) -> None:
    """Check that a model has some bias terms, before its weights are loaded.

    Raises:
        UserError: it has no biases, its config cannot add any, or it has none of a term.
    """
    select_components(model_of_config(model_name, add_biases, revision), terms or ["all"])


def model_of_config(
    model_name: str, add_biases: bool, revision: str | None = None
) -> "PreTrainedModel":
    """Return a classifier with the parameters' names and shapes, without their trained values."""
    with convert_errors(lambda error: loading.cannot_load(model_name, error, revision)):
        task = TASKS["rte"]
        config = loading.load_config(model_name, task, revision)
        try:
            model = loading.build_model_without_weights(config, task)
        except Exception:  # some models compute with weights when they are built
            model = loading.build_model(config, task)
    if add_biases:
        add_zero_biases(model)
    return model


def select_components(
    model: "PreTrainedModel", terms: Sequence[str], report: bool = False
) -> tuple[str, ...]:
    """Return the relative names of the biases that terms select; all: "bias".

    Args:
        terms: as in `--bias-terms`, or relative names such as "attention.self.query.bias".
        report: log the parameters of each term.

    Raises:
        UserError: the model has no biases, or none of a term.
    """
    biases, selected = encoder_biases(model), []
    if not biases:
        raise UserError(no_biases_message(model))
    kinds = dict.fromkeys(biases.values())
    for term in components_to_terms(terms):
        found = [ALL_BIASES] if term == "all" else find_components(kinds, term)
        if not found:
            raise UserError(unknown_term_message(model, kinds, term))
        if report and term != "all":
            names = [name for name, kind in biases.items() if kind in found]
            size = sum(model.get_parameter(name).numel() for name in names)
            LOGGER.info("bias term %s: %s (%d tensors, %s parameters)", term, ", ".join(found),
                        len(names), f"{size:,}")  # fmt: skip
        selected += found
    return tuple(dict.fromkeys(selected))


def find_components(kinds: Collection[str], term: str) -> list[str]:
    """Return the relative names, among those of a model, that a term selects."""
    exact = [kind for kind in (TERMS.get(term, (term,))[0], f"{term}.bias") if kind in kinds]
    if exact:
        return exact[:1]
    ends = tuple(f".{module}.bias" for module in ALIASES.get(term, (term,)))
    return [kind for kind in kinds if f".{kind}".endswith(ends)]


def no_biases_message(model: "PreTrainedModel") -> str:
    """Return the error message for an encoder without biases."""
    problem = f"this {model.config.model_type} model has no biases at all, so bitfit cannot train "
    switches = ", ".join(find_switches(model))
    advice = f"--add-biases adds them ({switches} in its config)" if switches else "another model"
    return f"{problem}it: {advice if switches else f'give {advice}'}"


def unknown_term_message(model: "PreTrainedModel", kinds: Collection[str], term: str) -> str:
    """Return the error message for a term that selects no bias."""
    has = ", ".join(components_to_terms([*kinds]))
    problem = f"--bias-terms {term}: this {model.config.model_type} model has no such bias"
    names = [f"{name} ({', '.join(components_to_terms(found))})" for name in TERMS
             if (found := find_components(kinds, name)) and found != [TERMS[name][0]]]  # fmt: skip
    paper = f"; of the paper's names apply: {', '.join(names)}" if names else ""
    return f"{problem}; its terms: {has}, all{paper}"


def terms_table(model: "PreTrainedModel") -> str:
    """Return the model's terms with tensors, parameters and an example as text.

    Raises:
        UserError: the model has no biases.
    """
    biases = encoder_biases(model)
    if not biases:
        raise UserError(no_biases_message(model))
    kinds = list(dict.fromkeys(biases.values()))
    paper = {kind: term for term in TERMS for kind in find_components(kinds, term)}
    table = pd.DataFrame({
        "term": [components_to_terms([kind])[0] for kind in biases.values()],
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
