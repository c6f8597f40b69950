"""Fingerprints of a base model: hashes of weights, values of the config, hashes of the tokenizer.

Evaluators and args.json store fingerprints, which are compared when an evaluator is loaded or a run
is resumed. The config is stored as values, so that a message can name the change, and so that
another version of transformers, which may know other keys, can compare the common keys.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfit.model.trainable import in_encoder
from utils import UserError

if TYPE_CHECKING:  # -h imports this module and must not import torch
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Keys of a config that do not affect logits: names, labels, settings of memory and time.
IGNORED_KEYS = {
    "_name_or_path", "architectures", "auto_map", "dtype", "finetuning_task",
    "gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Parts of a tokenizer's file that do not affect tokens; tokenizing itself changes two of them.
IGNORED_PARTS = ("version", "truncation", "padding", "decoder")


def fingerprints_of(
    config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, dict]:
    """Return {"model_config": {key: value}, "tokenizer": {part: SHA-256}}."""
    import transformers

    content = json.loads(json.dumps(config.to_dict(), default=str))
    values = {"transformers_version": transformers.__version__} | flatten(content)
    return {"model_config": values, "tokenizer": tokenizer_hashes(tokenizer)}


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, keys joined by dots, without IGNORED_KEYS."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key in IGNORED_KEYS:
            continue
        nested = isinstance(value, dict)
        values |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def tokenizer_hashes(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return {part: SHA-256} of all parts of a tokenizer that affect the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # the tokenizer is written in Python
        merges = sorted(getattr(tokenizer, "bpe_ranks", {}).items())
        lower = getattr(tokenizer, "do_lower_case", None)
        parts = {"model": [tokenizer.get_vocab(), merges], "normalizer": lower}
    else:
        parts = json.loads(backend.to_str())
    parts = {name: part for name, part in parts.items() if name not in IGNORED_PARTS}
    parts["vocabulary"] = parts.pop("model")
    parts["special_tokens"] = tokenizer.special_tokens_map
    for name in ("padding_side", "truncation_side", "split_special_tokens", "model_input_names"):
        parts[name] = getattr(tokenizer, name, None)
    return {name: sha256_of_json(part) for name, part in parts.items()}


def sha256_of_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def describe_change(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return how two results of `fingerprints_of` differ in common parts, as text, or None."""
    messages = []
    for name, kind in (("model_config", "config"), ("tokenizer", "tokenizer")):
        before, after = (values.get(name) or {} for values in (old, new))
        keys = changed_keys(before, after) if before and after else []
        if keys and name == "model_config":
            texts = [f"{key} was {before.get(key)} and is now {after.get(key)}" for key in keys]
            keys = texts[:3] + [f"{len(texts) - 3} more"] * (len(texts) > 3)
        messages += [f"{kind} changed ({', '.join(keys)})"] * bool(keys)
    return " and its ".join(messages) or None


def base_error(folder: object, model_name: str, reason: str = "") -> UserError:
    """Return the error for a base model that a saved evaluator was not trained on."""
    base = f"another base model than {model_name}{reason}"
    return UserError(
        f"{folder} was trained on {base}: give the one it was trained on as --model-name"
    )


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys whose values differ, sorted.

    Keys that only one side has count only if the same version of transformers made both.
    """
    version = "transformers_version"
    same = old.get(version) == new.get(version)
    keys = (old.keys() | new.keys() if same else old.keys() & new.keys()) - {version}
    return sorted(key for key in keys if old.get(key) != new.get(key))


def fingerprint(model: "PreTrainedModel", head: bool = False) -> str:
    """Return the SHA-256 of the encoder's names and values, with `head` of the classifier's too."""
    return sha256(
        value
        for name, parameter in model.named_parameters()
        if head or in_encoder(model, name)
        for value in (name, parameter.detach())
    )


def sha256(values: Iterable["str | np.ndarray | torch.Tensor | None"]) -> str:
    """Return the SHA-256 of texts, arrays, tensors and Nones, including dtypes and shapes."""
    import torch

    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.cpu().contiguous().numpy()
        if isinstance(value, str):
            value = np.frombuffer(value.encode(), np.uint8)
        kind = "none" if value is None else f"{value.dtype} {value.shape}"
        digest.update(f"[{kind}]".encode())
        digest.update(b"" if value is None else np.ascontiguousarray(value).data)
    return digest.hexdigest()
