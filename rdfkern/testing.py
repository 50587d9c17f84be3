"""The error rule of every implementation, for tests and benches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

MANY = 64


def assert_within_budget(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    factor: float = 2.0,
    rms: float = 2.0,
) -> None:
    """Each tensor errs at most `factor` times as much as plain torch does, plus one rounding.

    The error of a tensor is its largest absolute difference from the truth; one rounding is the
    dtype's epsilon times the largest magnitude of the truth. The largest of many errors is one draw
    of noise, and plain torch draws another: a tensor of `MANY` elements or more also errs at most
    `rms` times as much in the root mean square, which does not depend on luck.

    Args:
        actual: outputs and gradients of the implementation, by name.
        plain: the same from the formula in plain torch at the same dtype.
        truth: the same from the reference in float64.

    Raises:
        AssertionError: naming the tensor, its error and its budget; also for wrong shapes, wrong
            dtypes and values that are not finite where the truth is.
    """
    assert actual.keys() == plain.keys() == truth.keys(), "the three runs name different tensors"
    for name, value in actual.items():
        expected, allowed = truth[name], plain[name]
        assert value.shape == expected.shape, f"{name}: shape {value.shape}, not {expected.shape}"
        assert value.dtype == allowed.dtype, f"{name}: dtype {value.dtype}, not {allowed.dtype}"
        if value.numel() == 0:
            continue
        finite = expected.isfinite()
        assert torch.equal(value[~finite].double(), expected[~finite].double()), (
            f"{name}: infinities"
        )
        if not finite.any():
            continue
        exact = expected[finite].double()
        errors, plain_errors = (x[finite].double() - exact for x in (value, allowed))
        epsilon = torch.finfo(value.dtype).eps
        rules = [("largest", factor, lambda x: x.abs().max())]
        if exact.numel() >= MANY:
            rules.append(("root mean square", rms, lambda x: x.square().mean().sqrt()))
        for what, times, norm in rules:
            error, budget = norm(errors), times * (norm(plain_errors) + epsilon * norm(exact))
            assert error <= budget, f"{name}: {what} error {error:.3e} exceeds {budget:.3e}"


def worst_of(*runs: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of several runs of the same formula in plain torch, each tensor with the largest error.

    Where sums nearly cancel, or where everything fits into the dtype, one way to write the formula
    can be right by luck.
    """

    def error(name: str, value: Tensor) -> float:
        finite = truth[name].isfinite()
        differences = value[finite].double() - truth[name][finite].double()
        return float(differences.abs().max()) if finite.any() else 0.0

    return {name: max((run[name] for run in runs), key=partial(error, name)) for name in truth}
