"""Add zero biases to an encoder that has none, through the switches of its config.

The biases are added to the loaded model, so that weights, random values and fingerprints are those
of the base model. The switches are found by building models without weights and comparing the
names of their parameters.
"""

import re
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from bitfit.model.trainable import in_encoder, is_bias, relative_name
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SWITCH = re.compile(r"(\w+_)?bias")  # attention_bias, use_qkv_bias, bias, and no_bias


def add_biases(model: "PreTrainedModel", report: bool = False) -> None:
    """Add zero biases to a model, and switch them on in its config; UserError if it has no switch.

    Args:
        report: log which biases are added.
    """
    switches = find_switches(model)
    added = added_parameters(model, switches)
    if not added:
        problem = f"the config of this {model.config.model_type} model cannot add biases"
        has_biases = any(in_encoder(model, n) and is_bias(n) for n, _ in model.named_parameters())
        advice = "leave it out" if has_biases else "give another model"
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
