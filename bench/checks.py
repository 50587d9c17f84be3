"""Whether a candidate computes the operation, by the error rule of the package.

An error is counted in units of what plain torch at the same dtype errs against float64, plus one
rounding of the largest value. Implementations of rdfkern are held to about the limits of its
tests; a peer is red only where it computes something else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

OUTPUT_LIMIT, PEER_LIMIT = 2.0, 10.0
# One more than in the tests: with AVX2 only, torch's SDPA errs 3.1 times what eager torch does in
# the gradients of the tiniest shapes, and `torch` with it.
GRADIENT_LIMIT = 4.0
# Each number a sum over all rows or edges that nearly cancels: plain torch may be right by luck.
SUMS = ("lam", "embedding", "rel")
SUM_LIMIT = 30.0


@dataclass(frozen=True)
class Check:
    """How far a candidate is from the truth.

    Attributes:
        green: within the limit in every tensor.
        worst: the largest error in units of its limit; green up to 1.
        ratio: the same error in units of plain torch's own error and one rounding.
        tensor: where it is.
    """

    green: bool
    worst: float
    ratio: float
    tensor: str

    def as_info(self) -> dict[str, Any]:
        return asdict(self)


def check(
    actual: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], *, ours: bool
) -> Check:
    """Compare by name; `actual` may lack gradients, never the output."""
    worst = (-1.0, 0.0, "out")
    for name, value in actual.items():
        ratio = error_ratio(value, plain[name], truth[name])
        worst = max(worst, (ratio / _limit(name, ours), ratio, name))
    return Check(worst[0] <= 1.0, *worst)


def error_ratio(value: Tensor, plain: Tensor, truth: Tensor) -> float:
    """The largest error over plain torch's plus one rounding; infinite for another shape or NaN."""
    if value.shape != truth.shape or not bool(value.isfinite().all()):
        return float("inf")
    if value.numel() == 0:
        return 0.0
    error = (value.double() - truth).abs().max()
    allowed = (plain.double() - truth).abs().max()
    allowed += torch.finfo(plain.dtype).eps * truth.abs().max()
    return float(error / allowed) if allowed > 0 else (0.0 if error == 0 else float("inf"))


def _limit(name: str, ours: bool) -> float:
    if name in SUMS:
        return SUM_LIMIT
    if not ours:
        return PEER_LIMIT
    return OUTPUT_LIMIT if name == "out" else GRADIENT_LIMIT
