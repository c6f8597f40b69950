"""Facts and tensors on disk, whole or absent: checkpoints and saved evaluators alike.

The tensors are a safetensors file; the facts are JSON that a person can read, written after it,
with the checksums of both. Each is written under a temporary name, flushed and renamed, so an entry
is there when its facts are. A torn or edited file does not have its checksum and is refused.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitfit.files import atomic_file
from utils import FORMAT, CorruptFile


def write(
    path: str | Path,
    facts: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    beside: str | None = None,
) -> None:
    """Write {name: tensor on the host}, if there are any, and then the facts, to `path` (.json).

    Args:
        beside: the name of the tensors' file; None: that of `path`.

    Raises:
        OSError: it could not be written.
    """
    data = Path(path).with_name(beside or f"{Path(path).stem}.safetensors")
    facts = {"format": FORMAT} | facts
    with atomic_file(path) as new_facts:
        if not tensors:
            new_facts.write_text(dump(facts | {"sha256": sha256(facts)}), encoding="utf-8")
            return
        with atomic_file(data) as new_data:  # both are written before either gets its name
            save(tensors, new_data)
            facts |= {"tensors": data.name, "tensors_sha256": file_sha256(new_data)}
            new_facts.write_text(dump(facts | {"sha256": sha256(facts)}), encoding="utf-8")


def save(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """safetensors' own function, whose errors are OSError here."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(facts, tensors) as they were written.

    Raises:
        CorruptFile: for any file that is not as it was written.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
        facts = json.loads(text)
        if facts["format"] != FORMAT:
            other = f"(format {facts['format']}, not {FORMAT})"
            raise CorruptFile(f"{path} was written by another version of this program {other}")
        digest = facts.pop("sha256")
        if digest != sha256(facts) or dump(facts | {"sha256": digest}).encode() != text:
            raise ValueError("its checksum is wrong")
        if "tensors" not in facts:
            return facts, {}
        data = path.with_name(facts.pop("tensors"))
        if facts.pop("tensors_sha256") != file_sha256(data):
            raise ValueError(f"the checksum of {data.name} is wrong")
        return facts, load_file(data)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            SafetensorError) as error:  # fmt: skip
        raise CorruptFile(f"{path} is damaged: {error}") from None


def dump(facts: dict[str, Any]) -> str:
    """The one way to write facts, so that no byte of them can change unseen."""
    return json.dumps(facts, indent=2) + "\n"


def sha256(facts: dict[str, Any]) -> str:
    return hashlib.sha256(dump(facts).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
