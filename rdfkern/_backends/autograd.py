"""When an operation must be recorded, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def is_recorded(*arguments: Any) -> bool:
    """Whether autograd would record an operation on these; what is no tensor does not count.

    Where it would not, an autograd function is left out: it takes longer than small problems. In
    forward mode, which the kernels do not have, that function raises; without it, tangents would
    be lost in silence.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return recorded or any(unpack_dual(x).tangent is not None for x in tensors)


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`.

    Compiled code passes a view of every tensor: torch.compile refuses an autograd function that
    gets one tensor twice, such as the cu_seqlens of self-attention.
    """
    if torch.compiler.is_compiling():
        arguments = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in arguments)
    return function.apply(*arguments)
