"""Checkpoints: one safetensors file each, replaced as a whole, with the rest as JSON in its header.

Weights and training state are one file, so a kill at any moment leaves a consistent pair.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

STATE = "rdfkern"
CHECKSUM = "crc32"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, or leave it as it was.

    The content goes to a file beside it, reaches the disk, and then takes the name.

    Raises:
        CheckpointError: it could not be written; whatever `path` held is intact.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not save {path}: {error.strerror or error}; "
            f"{'the previous one is intact' if path.exists() else 'nothing was saved before'}"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, as `write_atomically` does."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: the file is missing, unreadable or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and JSON state as one file, as `write_atomically` does.

    Raises:
        CheckpointError: it could not be written.
    """
    held = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    text = json.dumps(state)
    metadata = {"format": "pt", STATE: text, CHECKSUM: str(_checksum(held, text))}
    write_atomically(path, save(held, metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote, as CPU tensors.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint of this package.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if not path.exists():
            raise CheckpointError(f"there is no checkpoint {path}") from error
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    if STATE not in metadata or CHECKSUM not in metadata:
        raise CheckpointError(f"{path} is not a checkpoint of rdfkern")
    if str(_checksum(tensors, metadata[STATE])) != metadata[CHECKSUM]:
        raise CheckpointError(f"checkpoint {path} is damaged: its content fails its checksum")
    return tensors, json.loads(metadata[STATE])


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/name`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `with_prefix` put there."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
