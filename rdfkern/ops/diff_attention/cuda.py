"""Differential attention in plain CUDA C++ (csrc/cuda/diff_attention*), where Triton cannot run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._backends import jit
from ..._backends.dispatch import Arguments
from . import op, temporal
from .formula import dim_of_values
from .native_arguments import filled, native_options, unit_stride

diff_attention = partial(op.diff_attention, impl="cuda")
diff_attention_varlen = partial(op.diff_attention_varlen, impl="cuda")
temporal_diff_attention = partial(temporal.temporal_diff_attention, impl="cuda")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256


def can_run(arguments: Arguments | None) -> str | None:
    """Why these kernels cannot run, or None; the first question about real inputs builds them."""
    if arguments is None:
        return jit.unavailable("cuda", build=False)
    q1, v, attn_mask = arguments["q1"], arguments["v"], arguments.get("attn_mask")
    if q1.device.type != "cuda":
        return f"inputs are on {q1.device.type}"
    if q1.dtype not in DTYPES:
        return f"computes in float32, inputs are {q1.dtype}"
    dims = (q1.shape[-1], dim_of_values(v))
    if max(dims) > MAX_WIDTH:
        return f"head dims go up to {MAX_WIDTH}, inputs have {dims[0]} and {dims[1]}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient"
    return jit.unavailable("cuda", build=True)


def forward(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor | None,
    alpha: Tensor,
    out: Tensor,
    lse: Tensor,
    o2: Tensor,
    o: Tensor,
    **options: Any,
) -> None:
    """Fills out, lse and what else of the last four is not empty."""
    longest = _longest(q1, options["max_seqlen_q"])
    jit.load("cuda")
    torch.ops.rdfkern._diff_attention_fwd_cuda(
        *(unit_stride(x) for x in (q1, k1, q2, k2, v.flatten(3))),
        lam,
        alpha,
        *native_options(**options),
        longest,
        out,
        lse,
        *filled(o2, o),
    )


def backward(
    grad_out: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor | None,
    alpha: Tensor,
    out: Tensor,
    lse: Tensor,
    o2: Tensor,
    o: Tensor,
    *,
    deterministic: bool,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of q1, k1, q2, k2, v, lam, alpha and norm_weight; always deterministic."""
    packed, norm_weight = options["cu_seqlens_q"] is not None, options["norm_weight"]
    inputs = [unit_stride(x) for x in (q1, k1, q2, k2, v)]
    gradients = [
        None if x is None else op.empty_like_rows(x, x.shape[-1], packed, x.dtype) for x in inputs
    ]
    dlam, dalpha = (None if x is None else x.new_empty(x.shape) for x in (lam, alpha))
    jit.load("cuda")
    norm_partials = torch.ops.rdfkern._diff_attention_bwd_cuda(
        unit_stride(grad_out),
        *inputs,
        lam,
        alpha,
        *native_options(**options),
        _longest(q1, options["max_seqlen_q"]),
        _longest(k1, options["max_seqlen_k"]),
        lse,
        *filled(o2),
        o if o.numel() else out,
        *gradients,
        dlam,
        dalpha,
    )
    return *gradients, dlam, dalpha, None if norm_weight is None else norm_partials.sum(0)


def _longest(x: Tensor, max_seqlen: int | None) -> int:
    return x.shape[2] if max_seqlen is None else min(max_seqlen, x.shape[2])
