"""Forward of differential attention in Triton: (alpha softmax(Q1 K1ᵀ) - lam softmax(Q2 K2ᵀ)) V.

With MAPS of 1 the second map is left out, and so is every pointer to it.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton_device import architecture
from ..._backends.triton_utils import (
    LN2,
    Launch,
    dropout_pair,
    load_tile,
    online_softmax,
    store_tile,
    visible_tiles,
)
from . import config
from .triton_arguments import Problem, describe, padded_width, row_strides
from .triton_decode import decode, decodes
from .triton_tiles import head_start, mask_scores, sequence_rows, subtract_and_norm


@triton.jit
def finish_map(acc, peak, total, kept, lse_rows, inside):
    """Rows of one map; writes the logarithms of its normalisers."""
    lse = tl.where(total > 0.0, (peak + tl.math.log2(total)) * LN2, float("-inf"))
    tl.store(lse_rows, lse, mask=inside)
    return acc * tl.where(total > 0.0, 1.0 / (total * kept), 0.0)[:, None]


@triton.jit(do_not_specialize=["len_q", "len_k", "left", "right", "seed"])
def diff_attn_fwd_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    v_ptr,
    lam_ptr,
    alpha_ptr,
    mask_ptr,
    padding_ptr,
    weight_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    lse_ptr,
    o1_ptr,
    o2_ptr,
    q1_strides,
    k1_strides,
    q2_strides,
    k2_strides,
    v_strides,
    lam_strides,
    alpha_strides,
    mask_strides,
    padding_stride,
    out_strides,
    map_strides,
    lse_strides,
    lse_map_stride,
    heads,
    group,
    len_q,
    len_k,
    left,
    right,
    seed: tl.int64,
    scale_log2: tl.float32,
    dropout_p: tl.float32,
    norm_eps: tl.float32,
    out_scale: tl.float32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAPS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(len_q, BLOCK_M)
    # Under a causal mask the last queries see most keys: the longest programs start first.
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    sequence_head = tl.program_id(0) // blocks
    sequence = sequence_head // heads
    row_start, len_q = sequence_rows(cu_seqlens_q_ptr, sequence, len_q)
    key_start, len_k = sequence_rows(cu_seqlens_k_ptr, sequence, len_k)
    if start_m >= len_q:
        return
    batch = (sequence if cu_seqlens_q_ptr is None else 0 * sequence).to(tl.int64)
    head = (sequence_head % heads).to(tl.int64)
    kv_head = head // group
    row_start += start_m
    shift = len_k - len_q

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns_d = tl.arange(0, BLOCK_D)
    columns_dv = tl.arange(0, BLOCK_DV)
    rows_left = len_q - start_m
    rows = start_m + local_m

    q1_base = head_start(q1_ptr, q1_strides, batch, head, row_start)
    k1_base = head_start(k1_ptr, k1_strides, batch, kv_head, key_start)
    if MAPS == 2:
        q2_base = head_start(q2_ptr, q2_strides, batch, head, row_start)
        k2_base = head_start(k2_ptr, k2_strides, batch, kv_head, key_start)
    v_base = head_start(v_ptr, v_strides, batch, kv_head, key_start)
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
    padding_base = padding_ptr
    if padding_ptr is not None:
        padding_base = padding_ptr + batch * padding_stride + key_start
    FACTORED: tl.constexpr = mask_ptr is None or mask_ptr.dtype.element_ty == tl.uint8
    factor = scale_log2 if FACTORED else 1.0
    MASKED: tl.constexpr = mask_ptr is not None or padding_ptr is not None

    q1 = load_tile(q1_base, q1_strides[2], local_m, rows_left, columns_d, D)
    peak1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total1 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if MAPS == 2:
        q2 = load_tile(q2_base, q2_strides[2], local_m, rows_left, columns_d, D)
        peak2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total2 = tl.zeros([BLOCK_M], tl.float32)
        acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    last = tl.minimum(start_m + BLOCK_M, len_q) - 1
    begin, full_begin, full_end, end = visible_tiles(
        start_m, last, shift, left, right, HAS_LEFT, HAS_RIGHT, len_k, BLOCK_N
    )
    for start_n in tl.range(begin, end, BLOCK_N):
        columns = start_n + local_n
        edge = start_n < full_begin or start_n >= full_end
        k1 = load_tile(k1_base, k1_strides[2], columns, len_k, columns_d, D)
        if MAPS == 2:
            k2 = load_tile(k2_base, k2_strides[2], columns, len_k, columns_d, D)
        scores1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MAPS == 2:
            scores2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        if edge or MASKED:
            scores1 = mask_scores(
                scores1, rows[:, None], columns[None, :], shift, len_q, len_k, left, right,
                scale_log2, mask_base, mask_strides, padding_base, HAS_LEFT, HAS_RIGHT, True,
            )  # fmt: skip
            if MAPS == 2:
                scores2 = mask_scores(
                    scores2, rows[:, None], columns[None, :], shift, len_q, len_k, left, right,
                    scale_log2, mask_base, mask_strides, padding_base, HAS_LEFT, HAS_RIGHT, True,
                )  # fmt: skip
        v = load_tile(v_base, v_strides[2], columns, len_k, columns_dv, DV)
        if HAS_DROPOUT:
            keep1, keep2 = dropout_pair(
                seed, sequence_head, rows[:, None], columns[None, :], dropout_p
            )
        weights1, decay1, peak1, total1 = online_softmax(scores1, factor, peak1, total1)
        if MAPS == 2:
            weights2, decay2, peak2, total2 = online_softmax(scores2, factor, peak2, total2)
        if HAS_DROPOUT:
            weights1 = tl.where(keep1, weights1, 0.0)
            if MAPS == 2:
                weights2 = tl.where(keep2, weights2, 0.0)
        acc1 = tl.dot(weights1.to(v.dtype), v, acc1 * decay1[:, None], input_precision=PRECISION)
        if MAPS == 2:
            acc2 = tl.dot(
                weights2.to(v.dtype), v, acc2 * decay2[:, None], input_precision=PRECISION
            )

    kept = 1.0 - dropout_p if HAS_DROPOUT else 1.0
    inside = local_m < rows_left
    alpha_base = head_start(alpha_ptr, alpha_strides, batch, head, row_start)
    alpha = tl.load(alpha_base + local_m * alpha_strides[2], mask=inside, other=0.0).to(tl.float32)
    lse_base = lse_ptr + batch * lse_strides[0] + head * lse_strides[1] + row_start + local_m
    out1 = finish_map(acc1, peak1, total1, kept, lse_base, inside)
    out2 = None
    lam = None
    if MAPS == 2:
        lam_base = head_start(lam_ptr, lam_strides, batch, head, row_start)
        lam = tl.load(lam_base + local_m * lam_strides[2], mask=inside, other=0.0).to(tl.float32)
        out2 = finish_map(acc2, peak2, total2, kept, lse_base + lse_map_stride, inside)
    if o1_ptr is not None:
        o1_base = head_start(o1_ptr, map_strides, batch, head, row_start)
        store_tile(o1_base, map_strides[2], local_m, columns_dv, rows_left, DV, out1)
        if MAPS == 2:
            o2_base = head_start(o2_ptr, map_strides, batch, head, row_start)
            store_tile(o2_base, map_strides[2], local_m, columns_dv, rows_left, DV, out2)
    out = subtract_and_norm(
        out1, out2, alpha, lam, weight_ptr, columns_dv, norm_eps, out_scale, DV, HAS_NORM
    )
    out_base = head_start(out_ptr, out_strides, batch, head, row_start)
    store_tile(out_base, out_strides[2], local_m, columns_dv, rows_left, DV, out)


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
) -> None:
    """Output, log-sum-exps, and what backward needs besides.

    Args:
        q1, q2: (B, H, Lq, D). k1, k2: (B, Hkv, Lk, D). v: (B, Hkv, Lk, Dv). With cu_seqlens
            B is 1 and L the total length. None of the sizes is 0. With one map q2, k2 and lam are
            None.
        lam, alpha: (B, H, Lq) float32, any strides.
        out: (B, H, Lq, Dv), filled, as all that follow.
        lse: (maps, B, H, Lq) float32, natural logarithm.
        o2, o1: A2 V and A1 V, shaped like out, in float32: rounded, they would leave dlam, dalpha
            and dnorm_weight imprecise. Or both empty, where `backward` will not be called, and o2
            with one map.
        attn_mask: (B, H, Lq, Lk) bool or floating, any strides; a floating one at or below -1e30
            hides its key.
        key_padding_mask: (B, Lk), or (T,) with cu_seqlens, bool, True is padding.
        left, right: keys on each side that a query sees, -1 is unlimited.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), with max_seqlen_q and max_seqlen_k.
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
    maps = tuple(rows if rows.numel() else None for rows in (o1, o2))
    if maps == (None, None) and decodes(problem):
        decode(problem, norm_weight, norm_eps, out_scale, out, lse)
        return
    problem = replace(problem, v=problem.v.flatten(3))
    widths = (padded_width(problem.head_dim), padded_width(problem.value_dim))
    tiles = config.tiles("forward", *widths, q1.dtype, architecture(q1.device))
    forward_launch(problem, norm_weight, norm_eps, out_scale, out, lse, *maps, tiles).run(q1.device)


def forward_launch(
    problem: Problem,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    out: Tensor,
    lse: Tensor,
    o1: Tensor | None,
    o2: Tensor | None,
    tiles: config.Tiles,
) -> Launch:
    """The launch that fills `out`, `lse` and, where given, `o1` and `o2`."""
    rows = problem.sequences * problem.heads
    return Launch(
        diff_attn_fwd_kernel,
        lambda meta: (rows * triton.cdiv(problem.len_q, meta["BLOCK_M"]),),
        {
            **problem.kernel_arguments(tiles),
            "lam_ptr": problem.lam,
            "alpha_ptr": problem.alpha,
            "lam_strides": row_strides(problem.lam),
            "alpha_strides": problem.alpha.stride(),
            "weight_ptr": norm_weight,
            "out_ptr": out,
            "lse_ptr": lse,
            "o1_ptr": o1,
            "o2_ptr": o2,
            "out_strides": out.stride()[:3],
            "map_strides": row_strides(o1),
            "lse_strides": lse.stride()[1:3],
            "lse_map_stride": lse.stride(0),
            "norm_eps": 0.0 if norm_eps is None else norm_eps,
            "out_scale": out_scale,
            "HAS_NORM": norm_eps is not None,
        },
        **problem.tuning("forward", tiles),
    )
