"""Tensors and options in the form that the C++ operators take, on the CPU and with CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_CHUNK = 256  # keys


def unit_stride(x: Tensor | None) -> Tensor | None:
    """x, or a copy of it where its last stride is not 1."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def filled(*outputs: Tensor) -> tuple[Tensor | None, ...]:
    """The outputs that are asked for; None in the place of empty ones."""
    return tuple(output if output.numel() else None for output in outputs)


def kv_tasks(k: Tensor, cu_seqlens_k: Tensor | None) -> int:
    """Pairs of a sequence and a head of keys."""
    return (k.shape[0] if cu_seqlens_k is None else cu_seqlens_k.shape[0] - 1) * k.shape[1]


def backward_chunks(tasks: int, longest: int, packed: bool, threads: int) -> int:
    """Into how many parts the CPU cuts such a pair, so that every thread has work.

    `longest` is the largest number of keys.
    """
    even = not packed and tasks % threads == 0
    if threads == 1 or tasks >= 4 * threads or even:
        return 1
    return max(1, min(-(-4 * threads // max(1, tasks)), longest // MIN_CHUNK))


def native_options(
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    norm_weight: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    norm_eps: float | None,
    out_scale: float,
) -> tuple[Any, ...]:
    """The options of a kernel as the operators' arguments from attn_mask to seed."""
    if norm_weight is not None:
        norm_weight = norm_weight.to(torch.float32).contiguous()
    return (
        attn_mask,
        key_padding_mask,
        None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        norm_weight,
        left,
        right,
        scale,
        -1.0 if norm_eps is None else norm_eps,
        out_scale,
        dropout_p,
        seed or 0,
    )
