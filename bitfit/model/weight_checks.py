"""Checks of loaded weights, and the initialization of the classifier's parameters."""

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
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "base_model.model.",
)  # of DataParallel, compile, peft
# Buffers of older checkpoints, which transformers computes today.
BUFFERS = r"\.(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|(cos|sin)_cached)$"


def check_weights(model: "PreTrainedModel", model_name: str | Path, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose encoder is not the one that config.json describes.

    A pooler may be absent (MLM checkpoints have none); any other encoder weight may not.

    Args:
        info: transformers' lists of missing, unexpected and mismatched names.
    """
    shapes = {name: (tuple(ours), tuple(own)) for name, ours, own in info["mismatched_keys"]}
    absent = sorted(
        n
        for n in info["missing_keys"] | shapes.keys()
        if in_encoder(model, n) and ".pooler." not in n
    )
    unexpected = sorted(info["unexpected_keys"])
    if absent:
        what = f"lacks {len(absent)} encoder weights (the first: {absent[0]})"
        why = "it is not a checkpoint of the architecture in its config.json"
        differing = next((n for n in absent if n in shapes), None)
        if wrapper := wrapper_of(absent[0], unexpected, model.base_model_prefix):
            why = f"all names in it begin with `{wrapper}`: save the model inside the wrapper, "
            why += "as with `model.module.save_pretrained(folder)`"
        elif differing:
            own, expected = shapes[differing]
            why = f"{differing} has the shape {own}, and {expected} by its config.json"
        raise UserError(f"{model_name} {what}: {why}")
    beyond = [n for n in unexpected if is_beyond(n, model)]
    if beyond:
        layers = getattr(model.config, "num_hidden_layers", "?")
        what = f"has {len(beyond)} weights in its layers for which its config.json has no place"
        why = f"(num_hidden_layers: {layers}; the first: {beyond[0]}): correct it, or save "
        raise UserError(f"{model_name} {what} {why}the model that is meant")


def wrapper_of(name: str, unexpected: Iterable[str], base: str) -> str:
    """Return the wrapper's prefix under which a checkpoint has an absent weight, or ''."""
    endings = {name, name.removeprefix(f"{base}.")}
    found = (w for w in WRAPPERS for ending in endings if w + ending in unexpected)
    return next(found, "")


def is_beyond(name: str, model: "PreTrainedModel") -> bool:
    """Whether an unused weight lies in a layer: one more layer, or one more weight in it."""
    if re.search(BUFFERS, name):
        return False
    base = f"{model.base_model_prefix}."
    ours = {first_layer(n.removeprefix(base)) for n, _ in model.named_parameters()
            if in_encoder(model, n)}  # fmt: skip
    layer = first_layer(name.removeprefix(base))
    return layer is not None and layer in ours


def first_layer(name: str) -> str | None:
    """`encoder.layer.3.output.dense.bias` -> `encoder.layer`; None outside of layers."""
    found = re.match(r"(.*?)\.\d+\.", name)
    return found and found[1]


def check_dtypes(model_name: str | Path, revision: str | None = None) -> None:
    """Refuse integers and 8-bit floats where weights are meant: transformers would only cast them.

    Raises:
        UserError: they are quantized, and nothing says how.
    """
    for path in weight_files(model_name, revision):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                dtype = file.get_slice(name).get_dtype()
                weight = name.endswith((".weight", ".bias")) and not re.search(BUFFERS, name)
                if weight and dtype not in ("F64", "F32", "F16", "BF16"):
                    what = f"its weights are quantized ({name} is {dtype}): give the float model"
                    raise UserError(f"cannot load the model {model_name}: {what}")


def weight_files(model_name: str | Path, revision: str | None = None) -> list[Path]:
    """The paths of a checkpoint's safetensors files, one or many."""
    index = hub.find_file(model_name, "model.safetensors.index.json", revision)
    single = hub.find_file(model_name, "model.safetensors", revision)
    if single or not index:
        return [single] if single else []
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [index.with_name(name) for name in sorted(set(named))]


def check_finite(
    model: "PreTrainedModel", model_name: str | Path, initialized: Collection[str]
) -> None:
    """Refuse NaN and infinite weights, apart from those that are initialized later."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if name not in initialized and value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        what = f"{len(bad)} of its tensors hold NaN or infinite values (the first: {bad[0]})"
        raise UserError(f"cannot load the model {model_name}: {what}: fetch or save it again")


def start_head(
    model: "PreTrainedModel", task: Task, absent: Collection[str], raw: dict[str, Any]
) -> tuple[set[str], str]:
    """Decide what of a checkpoint's head is used, and bring its outputs into the task's order.

    As in transformers only absent parts are initialized. Its outputs are used where config.json
    names the task's labels, in whatever order.

    Args:
        absent: the names that the checkpoint lacks or has in another shape.
        raw: the dictionary in config.json.

    Returns:
        (names of the parameters to initialize, what was done with the outputs as text)
    """
    names = head_names(model)
    initialized, outputs = {n for n in names if n in absent}, set(output_names(model, task))
    if not outputs or outputs <= initialized:
        return initialized, ""
    old, new = label_names(raw), task.labels or ("score",)
    order = order_of(old, new)
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
    """The names of the parameters of the head's last layer, which has an output per label."""
    last = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not in_encoder(model, name)
        and module.out_features == task.num_labels
    ][-1:]
    return [n for n in head_names(model) if n.rpartition(".")[0] in last]


def label_names(raw: dict[str, Any]) -> list[str]:
    """The labels in a config.json, by their numbers; none where it does not number all."""
    try:
        named = {int(number): str(name) for number, name in raw["id2label"].items()}
    except (LookupError, ValueError, TypeError, AttributeError):
        return []
    return [named[n] for n in range(len(named))] if set(named) == set(range(len(named))) else []


def order_of(old: Sequence[str], new: Sequence[str]) -> list[int] | None:
    """Where each new label is among the old ones; None where they are not the same labels.

    Names may differ in case and punctuation (`NOT-ENTAILMENT`, `not_entailment`).
    """
    for key in (str, lambda name: re.sub(r"[\W_]+", " ", name.casefold()).strip()):
        a, b = [*map(key, old)], [*map(key, new)]
        if len(set(a)) == len(a) and sorted(a) == sorted(b):
            return [a.index(name) for name in b]
    return None


def report(
    model: "PreTrainedModel",
    model_name: str | Path,
    info: dict[str, Any],
    absent: Collection[str],
    initialized: Collection[str],
    outputs: str,
) -> None:
    """Log one line: what of a checkpoint was kept, initialized, reordered and left unused.

    Args:
        initialized, outputs: what `start_head` gave.
    """
    kept = {n for n in head_names(model) if n not in initialized}
    both = {owner_of(n) for n in kept} & {owner_of(n) for n in initialized}
    alike = modules_of(n for n in absent if in_encoder(model, n))
    unused = sorted({".".join(owner_of(n).split(".")[:2]) or n for n in info["unexpected_keys"]})
    parts = ["kept the encoder" + "".join(f", {name}" for name in modules_of(kept, both))]
    if alike:
        parts.append(f"{', '.join(alike)} is absent: initialized at random, alike in all runs")
    if initialized:
        parts.append(f"initialized from the run's seed: {', '.join(modules_of(initialized, both))}")
    parts += [outputs] if outputs else []
    if unused:
        more = f" and {len(unused) - 4} more" * (len(unused) > 4)
        parts.append(f"not used: {', '.join(unused[:4])}{more}")
    lost = any(in_encoder(model, n) and ".pooler." not in n and not re.search(BUFFERS, n)
               for n in info["unexpected_keys"])  # fmt: skip
    level = logging.WARNING if alike or outputs or lost else logging.INFO
    LOGGER.log(level, "weights of %s: %s", model_name, "; ".join(parts))


def owner_of(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


def modules_of(names: Iterable[str], partly: Collection[str] = ()) -> list[str]:
    """The modules of some parameters, each once; of those in `partly` the parameters."""
    return sorted({n if owner_of(n) in partly else owner_of(n) or n for n in names})
