"""What the backward pass of differential attention needs of each row, and gradients of rows."""

import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton_utils import LOG2E, Launch, load_tile, store_tile
from .triton_arguments import Problem, padded_width, row_strides
from .triton_tiles import ROW_VALUES, head_start, sequence_rows


@triton.jit
def store_map(values, lse, coefficient, product, inside):
    """Exponent, delta and coefficient of one map, such that its weights are exp2(score - exponent).

    The exponent is the whole part of the log-sum-exp, so that the difference rounds little where
    the weight is large; the rest is a factor of what the weights are multiplied by.
    """
    alive = lse > float("-inf")
    exact = tl.where(alive, lse * LOG2E, 0.0)
    exponent = tl.math.floor(exact)
    coefficient = coefficient * tl.math.exp2(exponent - exact)
    tl.store(values, tl.where(alive, exponent, float("inf")), mask=inside)
    tl.store(values + 2, coefficient * product, mask=inside)
    tl.store(values + 4, coefficient, mask=inside)


@triton.jit(do_not_specialize=["len_q"])
def diff_attn_bwd_rows_kernel(
    grad_out_ptr,
    o1_ptr,
    o2_ptr,
    lse_ptr,
    lam_ptr,
    alpha_ptr,
    weight_ptr,
    cu_seqlens_q_ptr,
    grad_ptr,
    rows_ptr,
    dlam_ptr,
    dalpha_ptr,
    dweight_ptr,
    grad_out_strides,
    map_strides,
    grad_strides,
    lam_strides,
    alpha_strides,
    row_strides,
    lse_map_stride,
    heads,
    len_q,
    norm_eps: tl.float32,
    out_scale: tl.float32,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """dO from the norm; dalpha = rowsum(dO ∘ O1), dlam = -rowsum(dO ∘ O2); the rows' values."""
    blocks = tl.cdiv(len_q, BLOCK_M)
    start_m = tl.program_id(0) % blocks * BLOCK_M
    sequence_head = tl.program_id(0) // blocks
    sequence = sequence_head // heads
    row_start, len_q = sequence_rows(cu_seqlens_q_ptr, sequence, len_q)
    if start_m >= len_q:
        return
    batch = (sequence if cu_seqlens_q_ptr is None else 0 * sequence).to(tl.int64)
    head = (sequence_head % heads).to(tl.int64)
    row_start += start_m
    local_m = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DV)
    rows_left = len_q - start_m
    inside = local_m < rows_left

    grad_out_base = head_start(grad_out_ptr, grad_out_strides, batch, head, row_start)
    o1_base = head_start(o1_ptr, map_strides, batch, head, row_start)
    alpha_base = head_start(alpha_ptr, alpha_strides, batch, head, row_start)
    grad = load_tile(grad_out_base, grad_out_strides[2], local_m, rows_left, columns, DV)
    out1 = load_tile(o1_base, map_strides[2], local_m, rows_left, columns, DV)
    if MAPS == 2:
        o2_base = head_start(o2_ptr, map_strides, batch, head, row_start)
        lam_base = head_start(lam_ptr, lam_strides, batch, head, row_start)
        out2 = load_tile(o2_base, map_strides[2], local_m, rows_left, columns, DV)
        lam = tl.load(lam_base + local_m * lam_strides[2], mask=inside, other=0.0)
    alpha = tl.load(alpha_base + local_m * alpha_strides[2], mask=inside, other=0.0)
    per_row = batch * row_strides[0] + head * row_strides[1] + row_start + local_m
    lse1 = tl.load(lse_ptr + per_row, mask=inside, other=float("-inf"))
    alive = lse1 > float("-inf")
    # A dead row is a row of zeros, whose norm has a gradient that must go nowhere.
    exact = tl.where(alive[:, None], grad.to(tl.float32), 0.0)
    rounded = exact
    if HAS_NORM:
        out = out1 * alpha[:, None]
        if MAPS == 2:
            out -= out2 * lam[:, None]
        inverse_rms = tl.math.rsqrt(tl.sum(out * out, 1) / DV + norm_eps)
        normed = out * inverse_rms[:, None]
        scaled = exact * out_scale
        if weight_ptr is not None:
            tl.store(
                dweight_ptr + tl.program_id(0).to(tl.int64) * DV + columns,
                tl.sum(scaled * normed, 0),
                mask=columns < DV,
            )
            weight = tl.load(weight_ptr + columns, mask=columns < DV, other=0.0)
            scaled = scaled * weight.to(tl.float32)[None, :]
        mean = tl.sum(scaled * normed, 1) / DV
        exact = (scaled - normed * mean[:, None]) * inverse_rms[:, None]
        stored = exact.to(grad_ptr.dtype.element_ty)
        rounded = stored.to(tl.float32)
        grad_base = head_start(grad_ptr, grad_strides, batch, head, row_start)
        store_tile(grad_base, grad_strides[2], local_m, columns, rows_left, DV, stored)
    tl.store(dalpha_ptr + per_row, tl.sum(exact * out1, 1), mask=inside)
    values = rows_ptr + per_row * ROW_VALUES
    store_map(values, lse1, alpha, tl.sum(rounded * out1, 1), inside)
    if MAPS == 2:
        lse2 = tl.load(lse_ptr + lse_map_stride + per_row, mask=inside, other=float("-inf"))
        tl.store(dlam_ptr + per_row, -tl.sum(exact * out2, 1), mask=inside)
        store_map(values + 1, lse2, -lam, tl.sum(rounded * out2, 1), inside)


def rows_launch(
    problem: Problem,
    grad_out: Tensor,
    o1: Tensor,
    o2: Tensor | None,
    lse: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    grad: Tensor,
    rows: Tensor,
    dlam: Tensor | None,
    dalpha: Tensor,
    partial: Tensor | None,
    block_m: int,
) -> Launch:
    """The launch that fills `grad` (with a norm), the rows, and the partial sums of the weight."""
    heads = problem.sequences * problem.heads
    return Launch(
        diff_attn_bwd_rows_kernel,
        lambda meta: (heads * triton.cdiv(problem.len_q, meta["BLOCK_M"]),),
        {
            "grad_out_ptr": grad_out,
            "o1_ptr": o1,
            "o2_ptr": o2,
            "lse_ptr": lse,
            "lam_ptr": problem.lam,
            "alpha_ptr": problem.alpha,
            "weight_ptr": norm_weight,
            "cu_seqlens_q_ptr": problem.cu_seqlens_q,
            "grad_ptr": grad,
            "rows_ptr": rows,
            "dlam_ptr": dlam,
            "dalpha_ptr": dalpha,
            "dweight_ptr": partial,
            "grad_out_strides": grad_out.stride()[:3],
            "map_strides": o1.stride()[:3],
            "grad_strides": grad.stride()[:3],
            "lam_strides": row_strides(problem.lam),
            "alpha_strides": problem.alpha.stride(),
            "row_strides": dalpha.stride()[:2],
            "lse_map_stride": lse.stride(0),
            "heads": problem.heads,
            "len_q": problem.len_q,
            "norm_eps": 0.0 if norm_eps is None else norm_eps,
            "out_scale": out_scale,
            "DV": problem.value_dim,
            "BLOCK_DV": padded_width(problem.value_dim),
            "BLOCK_M": block_m,
            "MAPS": problem.maps,
            "HAS_NORM": norm_eps is not None,
            "num_warps": 4,
            "num_stages": 1,
        },
    )
