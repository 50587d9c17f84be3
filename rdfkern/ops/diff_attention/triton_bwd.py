"""Backward of differential attention in Triton: the row values, then one pass, or two.

The one-pass form adds to dq with float32 atomics; the two-pass form is deterministic.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..._backends.triton_device import architecture
from ..._backends.triton_utils import Launch, unit_stride
from . import config
from .op import empty_like_rows
from .triton_arguments import Problem, describe, padded_width, row_strides
from .triton_bwd_kv import diff_attn_bwd_kv_kernel
from .triton_bwd_q import diff_attn_bwd_q_kernel
from .triton_bwd_rows import rows_launch
from .triton_tiles import ROW_VALUES


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
    o1: Tensor,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    seed: int | None,
    scale: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    deterministic: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q1, k1, q2, k2, v, lam, alpha and norm_weight from those of the output.

    Args:
        grad_out: (B, H, Lq, Dv). out, lse, o2, o1: what `forward` returned; the rest is its input.
        deterministic: take the two-pass form, whose results are bitwise equal over repeats.

    Returns:
        dq1, dk1, dq2, dk2, dv like their tensors; dlam, dalpha (B, H, Lq) and dnorm_weight (Dv,)
        in float32, the latter None without a weight, and with one map those of q2, k2 and lam.
    """
    problem = describe(
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        alpha,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        left=left,
        right=right,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    device, packed = q1.device, cu_seqlens_q is not None
    grad_out = unit_stride(grad_out)
    grad = grad_out
    if norm_eps is not None:
        grad = empty_like_rows(grad_out, problem.value_dim, packed, v.dtype)
    dlam, dalpha = (None if x is None else lse.new_empty(problem.rows) for x in (lam, alpha))
    rows = lse.new_empty(*problem.rows, ROW_VALUES.value)
    block_m = config.row_block(padded_width(problem.value_dim))
    programs = problem.sequences * problem.heads * triton.cdiv(problem.len_q, block_m)
    partial = None if norm_weight is None else lse.new_zeros(programs, problem.value_dim)
    rows_launch(
        problem, grad_out, o1, None if lam is None else o2, lse, norm_weight, norm_eps, out_scale,
        grad, rows, dlam, dalpha, partial, block_m,
    ).run(device)  # fmt: skip

    widths = (padded_width(problem.head_dim), padded_width(problem.value_dim))
    sizes = (*widths, q1.dtype, architecture(device))
    dq1, dk1, dq2, dk2, dv = (
        None if x is None else empty_like_rows(x, x.shape[3], packed, x.dtype)
        for x in (q1, k1, q2, k2, v)
    )
    if deterministic:
        tiles = config.tiles("keys", *sizes)
        kv_launch(problem, grad, rows, None, None, dk1, dk2, dv, tiles).run(device)
        tiles = config.tiles("queries", *sizes)
        q_launch(problem, grad, rows, dq1, dq2, tiles).run(device)
    else:
        tiles = config.tiles("one_pass", *sizes)
        sums = lse.new_zeros(problem.maps, *problem.rows, problem.head_dim)
        second = None if dq2 is None else sums[1]
        kv_launch(problem, grad, rows, sums[0], second, dk1, dk2, dv, tiles).run(device)
        torch.mul(sums[0], problem.query_scale, out=dq1)
        if dq2 is not None:
            torch.mul(second, problem.query_scale, out=dq2)
    dnorm_weight = None if partial is None else partial.sum(dim=0)
    return dq1, dk1, dq2, dk2, dv, dlam, dalpha, dnorm_weight


def kv_launch(
    problem: Problem,
    grad: Tensor,
    rows: Tensor,
    dq1: Tensor | None,
    dq2: Tensor | None,
    dk1: Tensor,
    dk2: Tensor | None,
    dv: Tensor,
    tiles: config.Tiles,
) -> Launch:
    """The launch that fills dk and dv and, where given, adds to dense float32 dq, without scale."""
    heads = problem.sequences * problem.kv_heads
    return Launch(
        diff_attn_bwd_kv_kernel,
        lambda meta: (heads * triton.cdiv(problem.len_k, meta["BLOCK_N"]),),
        {
            **problem.kernel_arguments(tiles),
            **_row_arguments(grad, rows),
            "dq1_ptr": dq1,
            "dq2_ptr": dq2,
            "dk1_ptr": dk1,
            "dk2_ptr": dk2,
            "dv_ptr": dv,
            "dk1_strides": dk1.stride()[:3],
            "dk2_strides": row_strides(dk2),
            "dv_strides": dv.stride()[:3],
            "scale": problem.scale,
        },
        **problem.tuning("keys" if dq1 is None else "one_pass", tiles),
        sums=("dq1_ptr", "dq2_ptr"),
    )


def q_launch(
    problem: Problem,
    grad: Tensor,
    rows: Tensor,
    dq1: Tensor,
    dq2: Tensor | None,
    tiles: config.Tiles,
) -> Launch:
    """The launch that fills dq1 and dq2."""
    heads = problem.sequences * problem.heads
    return Launch(
        diff_attn_bwd_q_kernel,
        lambda meta: (heads * triton.cdiv(problem.len_q, meta["BLOCK_M"]),),
        {
            **problem.kernel_arguments(tiles),
            **_row_arguments(grad, rows),
            "dq1_ptr": dq1,
            "dq2_ptr": dq2,
            "dq1_strides": dq1.stride()[:3],
            "dq2_strides": row_strides(dq2),
            "query_scale": problem.query_scale,
        },
        **problem.tuning("queries", tiles),
    )


def _row_arguments(grad: Tensor, rows: Tensor) -> dict[str, Any]:
    return {
        "grad_ptr": grad,
        "rows_ptr": rows,
        "grad_strides": grad.stride()[:3],
        # Strides of a (B, H, Lq) tensor, as it is before the values of a row.
        "row_strides": (rows.stride(0) // rows.shape[-1], rows.stride(1) // rows.shape[-1]),
    }
