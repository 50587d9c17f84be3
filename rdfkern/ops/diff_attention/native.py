"""Differential attention in C++ on the CPU (csrc/cpu/diff_attention_*.cpp)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._backends import jit
from ..._backends.dispatch import Arguments
from . import op, temporal
from .native_arguments import backward_chunks, filled, kv_tasks, native_options, unit_stride

diff_attention = partial(op.diff_attention, impl="cpu")
diff_attention_varlen = partial(op.diff_attention_varlen, impl="cpu")
temporal_diff_attention = partial(temporal.temporal_diff_attention, impl="cpu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LANES = 16


def can_run(arguments: Arguments | None) -> str | None:
    """Why these kernels cannot run, or None; the first question about real inputs builds them."""
    if arguments is None:
        return jit.unavailable("cpu", build=False)
    q1, attn_mask = arguments["q1"], arguments.get("attn_mask")
    if q1.device.type != "cpu":
        return f"inputs are on {q1.device.type}"
    if q1.dtype not in DTYPES:
        return f"computes in float32, inputs are {q1.dtype}"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient"
    return jit.unavailable("cpu", build=True)


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
    # The kernel reads parts of whole vectors only.
    if v.dim() == 5 and v.shape[-1] % LANES:
        v = v.flatten(3)
    inputs = [unit_stride(x) for x in (q1, k1, q2, k2, v)]
    jit.load("cpu")
    torch.ops.rdfkern._diff_attention_fwd_cpu(
        *inputs, lam, alpha, *native_options(**options), out, lse, *filled(o2, o)
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
    kept_o2, kept_o = filled(o2, o)
    if kept_o is None and options["norm_eps"] is None and out.dtype == lse.dtype:
        kept_o = out
    chunks = 1
    # Without these rows, a task takes all keys of its queries.
    if kept_o is not None and (q2 is None or kept_o2 is not None):
        longest = options["max_seqlen_k"] if packed else k1.shape[2]
        tasks = kv_tasks(k1, options["cu_seqlens_k"])
        chunks = backward_chunks(tasks, longest, packed, torch.get_num_threads())
    inputs = [unit_stride(x) for x in (q1, k1, q2, k2, v)]
    gradients = []
    for x in inputs:
        if x is None:
            gradients.append(None)
            continue
        width, dtype = x.shape[-1], x.dtype
        if chunks > 1:
            width, dtype = -(-width // LANES) * LANES, torch.float32
        gradients.append(x.new_empty((*x.shape[:-1], width), dtype=dtype))
    dlam, dalpha = (None if x is None else x.new_empty(x.shape) for x in (lam, alpha))
    dnorm_weight = None if norm_weight is None else torch.empty_like(norm_weight, dtype=lse.dtype)
    jit.load("cpu")
    torch.ops.rdfkern._diff_attention_bwd_cpu(
        unit_stride(grad_out),
        *inputs,
        lam,
        alpha,
        *native_options(**options),
        lse,
        kept_o2,
        kept_o,
        chunks,
        *gradients,
        dlam,
        dalpha,
        dnorm_weight,
    )
    if chunks > 1:
        # One after the other, so that no two wide gradients outlive their narrow copies.
        for at, x in enumerate(inputs):
            if x is not None:
                gradients[at] = _narrowed(gradients[at], x)
    return *gradients, dlam, dalpha, dnorm_weight


def _narrowed(padded: Tensor, x: Tensor) -> Tensor:
    if padded.shape == x.shape and padded.dtype == x.dtype:
        return padded
    return x.new_empty(x.shape).copy_(padded[..., : x.shape[-1]])
