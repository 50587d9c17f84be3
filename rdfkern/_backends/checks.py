"""Argument checks that several operations share; each error names the argument and its value."""

from __future__ import annotations

import operator
from itertools import pairwise

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(tensors: dict[str, Tensor]) -> None:
    """All tensors are floating point, of one dtype and on one device.

    Raises:
        TypeError: an argument is no tensor or a DTensor, not floating point, or of another dtype.
        ValueError: the arguments are on different devices.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor, which no rdfkern operation shards: pass its to_local() part"
            )
        if tensor.dtype not in FLOATING:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}"
            )
        check_device(name, tensor, first_name, first)


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """`tensor` is on the device of `first`; raises ValueError otherwise."""
    if tensor.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name} ({first.device}), got {tensor.device}"
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], spelled: str) -> None:
    """`tensor` has the expected shape (None: any size); raises ValueError otherwise."""
    shape = tensor.shape
    fits = len(shape) == len(expected)
    if fits:
        # A loop: a generator would take as long as all other checks of a small problem.
        for have, want in zip(shape, expected, strict=True):
            if want is not None and have != want:
                fits = False
    if not fits:
        numbers = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{name} must have shape {spelled} = ({numbers}), got {tuple(tensor.shape)}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    """`cu_seqlens` is (B+1,), integer, starts at 0, never decreases and ends at `total`.

    On an accelerator the values are asserted on the device, so that no host sync is needed.

    Raises:
        TypeError: not an int32 or int64 tensor.
        ValueError: wrong shape or, on the CPU, wrong values.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape (B+1,), got {tuple(cu_seqlens.shape)}")
    if torch.compiler.is_compiling():
        return
    if cu_seqlens.device.type == "meta":
        return
    if cu_seqlens.device.type != "cpu":
        steps = cu_seqlens.diff()
        fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (steps >= 0).all()
        torch._assert_async(fits, f"{name} must start at 0, never decrease and end at {total}")
        return
    starts = cu_seqlens.tolist()  # a few operations of torch would take longer than small problems
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0, got {starts[0]}")
    if starts != sorted(starts):
        steps = enumerate(pairwise(starts))
        at, before, after = next((at, *step) for at, step in steps if step[1] < step[0])
        raise ValueError(f"{name} must not decrease, got {before} then {after} at index {at}")
    if starts[-1] != total:
        raise ValueError(
            f"{name} must end at the number of packed rows ({total}), got {starts[-1]}"
        )


def check_integers_in(name: str, values: Tensor, upper: int, what: str) -> None:
    """`values` are integers in [0, upper); raises TypeError or ValueError naming a bad one."""
    if values.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        raise TypeError(f"{name} must have an integer dtype, got {values.dtype}")
    if torch.compiler.is_compiling() or values.device.type == "meta":
        return
    bad = values < 0
    if upper <= torch.iinfo(values.dtype).max:  # beyond it, the comparison would wrap around
        bad = bad | (values >= upper)
    if values.device.type != "cpu":
        torch._assert_async(~bad.any(), f"{name} must be in [0, {upper}), the {what}")
        return
    if bad.any():
        flat = values.flatten()
        at = int(bad.flatten().nonzero()[0, 0])
        raise ValueError(
            f"{name} must be in [0, {upper}), the {what}; got {int(flat[at])} at flat index {at}"
        )


def check_window(window: tuple[int, int] | None) -> tuple[int, int] | None:
    """`window` is None or two integers of at least -1; returns it as a tuple.

    Raises:
        TypeError: not a pair of integers.
        ValueError: a side below -1.
    """
    if window is None:
        return None
    pair = tuple(window) if isinstance(window, tuple | list) else ()
    if len(pair) != 2 or not all(type(side) is int for side in pair):
        raise TypeError(f"window must be None or (left, right), two integers, got {window!r}")
    if min(pair) < -1:
        raise ValueError(f"window must have sides of at least -1 (unlimited), got {pair}")
    return pair


def check_max_seqlen(name: str, max_seqlen: int | None, cu_name: str, cu_seqlens: Tensor) -> None:
    """`max_seqlen` is an integer no smaller than the longest sequence of `cu_seqlens`.

    On an accelerator the length is asserted on the device, so that no host sync is needed.

    Raises:
        TypeError: not an integer.
        ValueError: negative or, on the CPU, shorter than the longest sequence.
    """
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool):
        raise TypeError(f"{name} must be an integer when {cu_name} is given, got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"{name} must not be negative, got {max_seqlen}")
    if torch.compiler.is_compiling() or cu_seqlens.device.type == "meta":
        return
    if cu_seqlens.device.type != "cpu":
        fits = (cu_seqlens.diff() <= max_seqlen).all()
        torch._assert_async(fits, f"{name} must be at least the longest sequence of {cu_name}")
        return
    starts = cu_seqlens.tolist()
    longest = max(map(operator.sub, starts[1:], starts), default=0)
    if longest > max_seqlen:
        raise ValueError(
            f"{name} must be at least the longest sequence of {cu_name} ({longest}), "
            f"got {max_seqlen}"
        )


def check_padding_mask(
    mask: Tensor, shape: tuple[int, ...], spelled: str, first_name: str, first: Tensor
) -> None:
    """`key_padding_mask` is bool, of the given shape and on the device of `first`.

    Raises:
        TypeError: not a bool tensor.
        ValueError: wrong shape or device.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"key_padding_mask must be a bool tensor (True is padding), got {got}")
    check_shape("key_padding_mask", mask, shape, spelled)
    check_device("key_padding_mask", mask, first_name, first)


def check_broadcastable(
    name: str, tensor: Tensor, shape: tuple[int, ...], spelled: str, hint: str
) -> None:
    """`tensor` broadcasts to `shape` without enlarging it; raises ValueError with a hint."""
    fits = tensor.dim() <= len(shape) and all(
        have in (1, want)
        for have, want in zip(reversed(tensor.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to {spelled} = {shape}, got {tuple(tensor.shape)}; {hint}"
        )


def check_number(name: str, value: float) -> None:
    """`value` is an int or a float; raises TypeError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
