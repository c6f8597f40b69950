"""Check the weights of a checkpoint, and reorder its classifier for a task."""

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfit.data.tasks import Task
from bitfit.model.trainable import head_names, in_encoder
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Older checkpoints hold these buffers; transformers now computes them.
BUFFERS = r"\.(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|(cos|sin)_cached)$"


def check_weights(
    model: "PreTrainedModel", model_name: str | Path, info: dict[str, Any]
) -> set[str]:
    """Return the names that a checkpoint lacks or has in another shape.

    A pooler may be absent, as in checkpoints of masked language models. Other absent weights of
    the encoder, or additional weights of its layers, raise a UserError.

    Args:
        info: transformers' lists of missing, unexpected and mismatched names.
    """
    shapes = {
        name: (tuple(given), tuple(needed)) for name, given, needed in info["mismatched_keys"]
    }
    absent = info["missing_keys"] | shapes.keys()
    lacking = sorted(n for n in absent if in_encoder(model, n) and ".pooler." not in n)
    unexpected = sorted(info["unexpected_keys"])
    if lacking:
        first = next((n for n in lacking if n in shapes), lacking[0])
        reason = f"such as {first}; it has {', '.join(unexpected[:2]) or 'no others'}"
        if first in shapes:
            reason = "{} has the shape {}, and {} by its config.json".format(first, *shapes[first])
        raise UserError(
            f"{model_name} lacks {len(lacking)} encoder weights that its config.json describes: "
            f"{reason}"
        )
    encoder = [n for n, _ in model.named_parameters() if in_encoder(model, n)]
    stacks = {layer_stack(model, n) for n in encoder} - {None}
    beyond = [n for n in unexpected if layer_stack(model, n) in stacks]
    if beyond:
        layers = getattr(model.config, "num_hidden_layers", "?")
        raise UserError(
            f"{model_name} has {len(beyond)} weights in its layers for which its config.json has "
            f"no place (num_hidden_layers: {layers}; the first: {beyond[0]}): correct it, or save "
            "the model again"
        )
    return absent


def layer_stack(model: "PreTrainedModel", name: str) -> str | None:
    """Return "encoder.layer" for a weight of any layer of BERT; None outside of layers."""
    found = re.match(r"(.*?)\.\d+\.", name.removeprefix(f"{model.base_model_prefix}."))
    return found[1] if found and not re.search(BUFFERS, name) else None


def check_finite(
    model: "PreTrainedModel", model_name: str | Path, initialized: Collection[str]
) -> None:
    """Raise a UserError if a weight is NaN or infinite, unless it is initialized later."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if name not in initialized and value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise UserError(
            f"cannot load the model {model_name}: {len(bad)} of its tensors hold NaN or infinite "
            f"values (the first: {bad[0]}): fetch or save it again"
        )


def align_head(
    model: "PreTrainedModel", task: Task, absent: Collection[str], raw: dict[str, Any]
) -> tuple[set[str], str]:
    """Bring the outputs of a checkpoint's classifier into the order of the task's labels.

    As in transformers, only absent parameters are initialized. The last layer is used if
    config.json names the task's labels, in any order; otherwise it is initialized too.

    Args:
        absent: names that the checkpoint lacks or has in another shape.
        raw: the dictionary in config.json.

    Returns:
        (names of the parameters to initialize, a message about the last layer or '')
    """
    names = head_names(model)
    initialized, outputs = {n for n in names if n in absent}, set(output_names(model, task))
    if not outputs or outputs <= initialized:
        return initialized, ""
    old, new = label_names(raw), task.labels or ("score",)
    order = label_order(old, new)
    if order is None:
        given = ", ".join(map(str, old[:4])) or "unnamed"
        return initialized | outputs, f"the head's labels were {given}, not the task's"
    if order == sorted(order):
        return initialized, ""
    with torch.no_grad():
        for name in outputs - initialized:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter[order])
    return initialized, f"outputs reordered from {', '.join(old)} to {', '.join(new)}"


def output_names(model: "PreTrainedModel", task: Task) -> list[str]:
    """Return the names of the parameters of the last layer, which has one output per label."""
    last = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not in_encoder(model, name)
        and module.out_features == task.num_labels
    ][-1:]
    return [n for n in head_names(model) if n.rpartition(".")[0] in last]


def label_names(raw: dict[str, Any]) -> list[str]:
    """Return the labels of a config.json by their numbers, or none if some have no number."""
    try:
        named = {int(number): str(name) for number, name in raw["id2label"].items()}
    except (LookupError, ValueError, TypeError, AttributeError):
        return []
    return [named[n] for n in range(len(named))] if set(named) == set(range(len(named))) else []


def label_order(old: Sequence[str], new: Sequence[str]) -> list[int] | None:
    """Return the positions of the new labels among the old labels, or None if they differ.

    Names are equal up to case and punctuation (`NOT-ENTAILMENT`, `not_entailment`).
    """
    for key in (str, lambda name: re.sub(r"[\W_]+", " ", name.casefold()).strip()):
        a, b = [*map(key, old)], [*map(key, new)]
        if len(set(a)) == len(a) and sorted(a) == sorted(b):
            return [a.index(name) for name in b]
    return None


def log_weights_used(
    model: "PreTrainedModel",
    model_name: str | Path,
    info: dict[str, Any],
    absent: Collection[str],
    initialized: Collection[str],
    outputs: str,
) -> None:
    """Log in one line which weights are kept, initialized, reordered or unused (`align_head`)."""
    kept = {n for n in head_names(model) if n not in initialized}
    random_modules = modules_of(n for n in absent if in_encoder(model, n))
    parts = [", ".join(["kept the encoder", *modules_of(kept)])]
    if random_modules:
        parts.append(
            f"{', '.join(random_modules)} is absent: initialized at random, alike in all runs"
        )
    if initialized:
        parts.append(f"initialized from the run's seed: {', '.join(modules_of(initialized))}")
    parts += [outputs] if outputs else []
    if unused := sorted({".".join(name.split(".")[:2]) for name in info["unexpected_keys"]}):
        parts.append(f"not used: {', '.join(unused[:4])}" + " and others" * (len(unused) > 4))
    level = logging.WARNING if random_modules or outputs else logging.INFO
    LOGGER.log(level, "weights of %s: %s", model_name, "; ".join(parts))


def modules_of(names: Iterable[str]) -> list[str]:
    """Return the names of the modules of parameters."""
    return sorted({name.rpartition(".")[0] or name for name in names})
