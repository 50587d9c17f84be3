"""The error rule of every implementation, for tests and benches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_within_budget(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    factor: float = 2.0,
) -> None:
    """Each tensor errs at most `factor` times as much as plain torch does, plus one rounding.

    The error of a tensor is its largest absolute difference from the truth; one rounding is the
    dtype's epsilon times the largest magnitude of the truth.

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
        error = (value[finite].double() - expected[finite].double()).abs().max()
        plain_error = (allowed[finite].double() - expected[finite].double()).abs().max()
        rounding = torch.finfo(value.dtype).eps * expected[finite].abs().max().double()
        budget = factor * (plain_error + rounding)
        assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e}"
