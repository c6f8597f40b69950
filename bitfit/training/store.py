"""Entries on disk: metadata and tensors, of checkpoints and of saved evaluators.

The tensors are a safetensors file. The metadata are a JSON file that is written after the tensors
and holds the checksums of both. Each file is written under a temporary name, flushed and renamed,
so an entry is complete if its JSON file exists. A torn or edited file does not have its checksum
and is refused.
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


def write_entry(
    path: str | Path,
    metadata: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    tensors_name: str | None = None,
) -> None:
    """Write an entry: the tensors, if there are any, and then the metadata.

    Args:
        path: of the JSON file.
        tensors: {name: tensor on the host}.
        tensors_name: file name of the tensors; None: like `path`, with suffix .safetensors.

    Raises:
        OSError: the entry could not be written.
    """
    data = Path(path).with_name(tensors_name or f"{Path(path).stem}.safetensors")
    metadata = {"format": FORMAT} | metadata
    with atomic_file(path) as new_metadata:
        if not tensors:
            new_metadata.write_text(dump(metadata | {"sha256": sha256(metadata)}), encoding="utf-8")
            return
        with atomic_file(data) as new_data:  # Both are written before one gets its final name.
            save_tensors(tensors, new_data)
            metadata |= {"tensors": data.name, "tensors_sha256": file_sha256(new_data)}
            new_metadata.write_text(dump(metadata | {"sha256": sha256(metadata)}), encoding="utf-8")


def save_tensors(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a safetensors file; errors of safetensors become OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None


def read_entry(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the (metadata, tensors) of an entry.

    Raises:
        CorruptFile: a file is missing or differs from what was written.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
        metadata = json.loads(text)
        if metadata["format"] != FORMAT:
            other = f"(format {metadata['format']}, not {FORMAT})"
            raise CorruptFile(f"{path} was written by another version of this program {other}")
        digest = metadata.pop("sha256")
        if digest != sha256(metadata) or dump(metadata | {"sha256": digest}).encode() != text:
            raise ValueError("its checksum is wrong")
        if "tensors" not in metadata:
            return metadata, {}
        data = path.with_name(metadata.pop("tensors"))
        if metadata.pop("tensors_sha256") != file_sha256(data):
            raise ValueError(f"the checksum of {data.name} is wrong")
        return metadata, load_file(data)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            SafetensorError) as error:  # fmt: skip
        raise CorruptFile(f"{path} is damaged: {error}") from None


def dump(metadata: dict[str, Any]) -> str:
    """Return metadata as JSON, always formatted alike: the checksum then covers every byte."""
    return json.dumps(metadata, indent=2) + "\n"


def sha256(metadata: dict[str, Any]) -> str:
    """Return the checksum of metadata."""
    return hashlib.sha256(dump(metadata).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
