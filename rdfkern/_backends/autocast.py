"""What autocast means for an operation: inputs in its dtype, inner arithmetic left alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AVAILABLE = ("cpu", "cuda")  # in every torch; asking takes longer than the rest


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the autocast dtype of the first one's device, if autocast is on there.

    As in torch, float64 and integers stay what they are; None and other objects pass through.
    """
    first = next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)
    if first is None or not _is_on(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and _is_cast(tensor) else tensor
        for tensor in tensors
    )


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Context in which an implementation's own matrix products keep their dtype."""
    return torch.autocast(device_type, enabled=False) if _is_on(device_type) else nullcontext()


def _is_on(device_type: str) -> bool:
    available = device_type in _AVAILABLE or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
