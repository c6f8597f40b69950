"""Check the weights of a checkpoint, and reorder its classifier for a task."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from bitfit.data.tasks import Task
from bitfit.model import hub
from bitfit.model.trainable import head_names, in_encoder
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger("bitfit")
# Prefixes of names that DataParallel, torch.compile and peft add.
WRAPPERS = ("module.", "_orig_mod.", "model.", "base_model.model.")
# Older checkpoints hold these buffers; transformers now computes them.
BUFFERS = r"\.(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|(cos|sin)_cached)$"


def check_weights(model: "PreTrainedModel", model_name: str | Path, info: dict[str, Any]) -> None:
    """Check that a checkpoint holds the encoder that config.json describes.

    A pooler may be absent, as in checkpoints of masked language models.

    Args:
        info: transformers' lists of missing, unexpected and mismatched names.

    Raises:
        UserError: other encoder weights are absent, or layers have additional weights.
    """
    shapes = {
        name: (tuple(given), tuple(needed)) for name, given, needed in info["mismatched_keys"]
    }
    absent = sorted(
        n
        for n in info["missing_keys"] | shapes.keys()
        if in_encoder(model, n) and ".pooler." not in n
    )
    unexpected = sorted(info["unexpected_keys"])
    if absent:
        problem = f"lacks {len(absent)} encoder weights (the first: {absent[0]})"
        reason = "it is not a checkpoint of the architecture in its config.json"
        differing = next((n for n in absent if n in shapes), None)
        if wrapper := wrapper_of(absent[0], unexpected, model.base_model_prefix):
            reason = f"all names in it begin with `{wrapper}`: save the model inside the wrapper, "
            reason += "as with `model.module.save_pretrained(folder)`"
        elif differing:
            given, needed = shapes[differing]
            reason = f"{differing} has the shape {given}, and {needed} by its config.json"
        raise UserError(f"{model_name} {problem}: {reason}")
    beyond = [n for n in unexpected if is_beyond(n, model)]
    if beyond:
        layers = getattr(model.config, "num_hidden_layers", "?")
        raise UserError(
            f"{model_name} has {len(beyond)} weights in its layers for which its config.json has "
            f"no place (num_hidden_layers: {layers}; the first: {beyond[0]}): correct it, or save "
            "the model again"
        )


def wrapper_of(name: str, unexpected: Iterable[str], base: str) -> str:
    """Return the prefix of WRAPPERS under which a checkpoint has an absent weight, or ''."""
    endings = {name, name.removeprefix(f"{base}.")}
    found = (w for w in WRAPPERS for ending in endings if w + ending in unexpected)
    return next(found, "")


def is_beyond(name: str, model: "PreTrainedModel") -> bool:
    """Return whether an unused weight belongs to a layer of the encoder, or to one more layer."""
    if re.search(BUFFERS, name):
        return False
    base = f"{model.base_model_prefix}."
    stacks = {
        layer_stack(n.removeprefix(base))
        for n, _ in model.named_parameters()
        if in_encoder(model, n)
    }
    stack = layer_stack(name.removeprefix(base))
    return stack is not None and stack in stacks


def layer_stack(name: str) -> str | None:
    """Return "encoder.layer" for "encoder.layer.3.output.dense.bias"; None outside of layers."""
    found = re.match(r"(.*?)\.\d+\.", name)
    return found and found[1]


def check_dtypes(model_name: str | Path, revision: str | None = None) -> None:
    """Check that weights are floats of at least 16 bits; transformers would cast any others.

    Raises:
        UserError: weights are quantized, and config.json does not say how.
    """
    for path in weight_files(model_name, revision):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                dtype = file.get_slice(name).get_dtype()
                weight = name.endswith((".weight", ".bias")) and not re.search(BUFFERS, name)
                if weight and dtype not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(
                        f"cannot load the model {model_name}: its weights are quantized "
                        f"({name} is {dtype}): give the float model"
                    )


def weight_files(model_name: str | Path, revision: str | None = None) -> list[Path]:
    """Return the paths of a checkpoint's safetensors files."""
    index = hub.find_file(model_name, "model.safetensors.index.json", revision)
    single = hub.find_file(model_name, "model.safetensors", revision)
    if single or not index:
        return [single] if single else []
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [index.with_name(name) for name in sorted(set(named))]


def check_finite(
    model: "PreTrainedModel", model_name: str | Path, initialized: Collection[str]
) -> None:
    """Check that all weights are finite, except for those that are initialized later.

    Raises:
        UserError: a weight is NaN or infinite.
    """
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
    """Log which weights of a checkpoint are kept, initialized, reordered and not used, in one line.

    Args:
        initialized, outputs: the result of `align_head`.
    """
    kept = {n for n in head_names(model) if n not in initialized}
    partly = {module_of(n) for n in kept} & {module_of(n) for n in initialized}
    random_modules = modules_of(n for n in absent if in_encoder(model, n))
    unused = sorted({".".join(module_of(n).split(".")[:2]) or n for n in info["unexpected_keys"]})
    parts = ["kept the encoder" + "".join(f", {name}" for name in modules_of(kept, partly))]
    if random_modules:
        parts.append(
            f"{', '.join(random_modules)} is absent: initialized at random, alike in all runs"
        )
    if initialized:
        parts.append(
            f"initialized from the run's seed: {', '.join(modules_of(initialized, partly))}"
        )
    parts += [outputs] if outputs else []
    if unused:
        more = f" and {len(unused) - 4} more" * (len(unused) > 4)
        parts.append(f"not used: {', '.join(unused[:4])}{more}")
    lost = any(in_encoder(model, n) and ".pooler." not in n and not re.search(BUFFERS, n)
               for n in info["unexpected_keys"])  # fmt: skip
    level = logging.WARNING if random_modules or outputs or lost else logging.INFO
    LOGGER.log(level, "weights of %s: %s", model_name, "; ".join(parts))


def module_of(name: str) -> str:
    """Return the name of a parameter's module."""
    return name.rpartition(".")[0]


def modules_of(names: Iterable[str], partly: Collection[str] = ()) -> list[str]:
    """Return the modules of parameters, and the parameters of the modules in `partly`."""
    return sorted({n if module_of(n) in partly else module_of(n) or n for n in names})
