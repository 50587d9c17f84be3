"""When an operation must be recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_recorded(*arguments: Any) -> bool:
    """Whether autograd would record an operation on these; what is no tensor does not count.

    Where it would not, an autograd function is left out: it takes longer than small problems.
    """
    return torch.is_grad_enabled() and any(
        x.requires_grad for x in arguments if isinstance(x, Tensor)
    )
