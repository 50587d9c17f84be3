"""Backward of differential attention for keys and values, and in the one-pass form for queries.

dS1 = P1 (alpha dP - alpha D1) and dS2 = lam P2 (D2 - dP) share dP = dO Vᵀ, and
dV = (alpha P1 - lam P2)ᵀ dO: one pass takes 10 products where two attentions take 14. With MAPS of
1 the second map is left out.
"""

import triton
import triton.language as tl

from ..._backends.triton_utils import (
    add_tile,
    dropout_pair,
    load_tile,
    store_tile,
    visible_tiles,
)
from .triton_tiles import (
    ROW_VALUES,
    head_start,
    load_row_values,
    map_gradients,
    mask_scores,
    sequence_rows,
)


@triton.jit(do_not_specialize=["len_q", "len_k", "left", "right", "seed"])
def diff_attn_bwd_kv_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    v_ptr,
    mask_ptr,
    padding_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    grad_ptr,
    rows_ptr,
    dq1_ptr,
    dq2_ptr,
    dk1_ptr,
    dk2_ptr,
    dv_ptr,
    q1_strides,
    k1_strides,
    q2_strides,
    k2_strides,
    v_strides,
    mask_strides,
    padding_stride,
    grad_strides,
    row_strides,
    dk1_strides,
    dk2_strides,
    dv_strides,
    heads,
    group,
    len_q,
    len_k,
    left,
    right,
    seed: tl.int64,
    scale: tl.float32,
    scale_log2: tl.float32,
    dropout_p: tl.float32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAPS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(len_k, BLOCK_N)
    start_n = tl.program_id(0) % blocks * BLOCK_N
    kv_heads = heads // group
    sequence = tl.program_id(0) // blocks // kv_heads
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    row_start, len_q = sequence_rows(cu_seqlens_q_ptr, sequence, len_q)
    key_start, len_k = sequence_rows(cu_seqlens_k_ptr, sequence, len_k)
    if start_n >= len_k:
        return
    batch = (sequence if cu_seqlens_q_ptr is None else 0 * sequence).to(tl.int64)
    shift = len_k - len_q

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns_d = tl.arange(0, BLOCK_D)
    columns_dv = tl.arange(0, BLOCK_DV)
    keys_left = len_k - start_n
    columns = start_n + local_n
    block_start = key_start + start_n
    k1_base = head_start(k1_ptr, k1_strides, batch, kv_head, block_start)
    v_base = head_start(v_ptr, v_strides, batch, kv_head, block_start)
    k1 = load_tile(k1_base, k1_strides[2], local_n, keys_left, columns_d, D)
    if MAPS == 2:
        k2_base = head_start(k2_ptr, k2_strides, batch, kv_head, block_start)
        k2 = load_tile(k2_base, k2_strides[2], local_n, keys_left, columns_d, D)
    v = load_tile(v_base, v_strides[2], local_n, keys_left, columns_dv, DV)
    dk1_t = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if MAPS == 2:
        dk2_t = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dv_t = tl.zeros([BLOCK_DV, BLOCK_N], tl.float32)
    padding_base = padding_ptr
    if padding_ptr is not None:
        padding_base = padding_ptr + batch * padding_stride + key_start
    mask_base = mask_ptr
    FACTORED: tl.constexpr = mask_ptr is None or mask_ptr.dtype.element_ty == tl.uint8
    factor = scale_log2 if FACTORED else 1.0
    MASKED: tl.constexpr = mask_ptr is not None or padding_ptr is not None
    inverse_kept = 1.0 / (1.0 - dropout_p)

    # Seen from a key, the window is mirrored: it reaches `right` queries back and `left` ahead.
    last = tl.minimum(start_n + BLOCK_N, len_k) - 1
    begin, full_begin, full_end, end = visible_tiles(
        start_n, last, -shift, right, left, HAS_RIGHT, HAS_LEFT, len_q, BLOCK_M
    )
    if keys_left < BLOCK_N:
        full_begin = end
        full_end = end
    for member in tl.range(0, group):
        head = kv_head * group + member
        sequence_head = (sequence * heads + head).to(tl.int32)
        q1_base = head_start(q1_ptr, q1_strides, batch, head, row_start)
        if MAPS == 2:
            q2_base = head_start(q2_ptr, q2_strides, batch, head, row_start)
        grad_base = head_start(grad_ptr, grad_strides, batch, head, row_start)
        first_row = batch * row_strides[0] + head * row_strides[1] + row_start
        if mask_ptr is not None:
            mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
        for start_m in tl.range(begin, end, BLOCK_M):
            rows = start_m + local_m
            edge = start_m < full_begin or start_m >= full_end
            q1 = load_tile(q1_base, q1_strides[2], rows, len_q, columns_d, D)
            if MAPS == 2:
                q2 = load_tile(q2_base, q2_strides[2], rows, len_q, columns_d, D)
            grad = load_tile(grad_base, grad_strides[2], rows, len_q, columns_dv, DV)
            values_base = rows_ptr + first_row * ROW_VALUES
            exponent1, delta1, coefficient1 = load_row_values(values_base, rows, len_q)
            if MAPS == 2:
                exponent2, delta2, coefficient2 = load_row_values(values_base + 1, rows, len_q)
            keep1 = None
            keep2 = None
            if HAS_DROPOUT:
                keep1, keep2 = dropout_pair(
                    seed, sequence_head, rows[:, None], columns[None, :], dropout_p
                )
            scores1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            value_grads = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if edge or MASKED:
                scores1 = mask_scores(
                    scores1, rows[:, None], columns[None, :], shift, len_q, len_k, left, right,
                    scale_log2, mask_base, mask_strides, padding_base, HAS_LEFT, HAS_RIGHT, True,
                )  # fmt: skip
            weights1 = tl.math.exp2(scores1 * factor - exponent1[:, None])
            kept1, score_grads1 = map_gradients(
                weights1, value_grads, coefficient1[:, None], delta1[:, None], keep1, inverse_kept
            )
            combined = coefficient1[:, None] * kept1
            score_grads1 = score_grads1.to(q1.dtype)
            dk1_t = tl.dot(tl.trans(q1), score_grads1, dk1_t, input_precision=PRECISION)
            if dq1_ptr is not None:
                dq1 = tl.dot(score_grads1, k1, input_precision=PRECISION)
                add_tile(dq1_ptr + first_row * D, D, rows, len_q, columns_d, D, dq1)
            if MAPS == 2:
                scores2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
                if edge or MASKED:
                    scores2 = mask_scores(
                        scores2, rows[:, None], columns[None, :], shift, len_q, len_k,
                        left, right, scale_log2, mask_base, mask_strides, padding_base,
                        HAS_LEFT, HAS_RIGHT, True,
                    )  # fmt: skip
                weights2 = tl.math.exp2(scores2 * factor - exponent2[:, None])
                kept2, score_grads2 = map_gradients(
                    weights2,
                    value_grads,
                    coefficient2[:, None],
                    delta2[:, None],
                    keep2,
                    inverse_kept,
                )
                combined = (combined + coefficient2[:, None] * kept2).to(grad.dtype)
                score_grads2 = score_grads2.to(q2.dtype)
                dk2_t = tl.dot(tl.trans(q2), score_grads2, dk2_t, input_precision=PRECISION)
                if dq1_ptr is not None:
                    dq2 = tl.dot(score_grads2, k2, input_precision=PRECISION)
                    add_tile(dq2_ptr + first_row * D, D, rows, len_q, columns_d, D, dq2)
            dv_t = tl.dot(tl.trans(grad), combined.to(grad.dtype), dv_t, input_precision=PRECISION)

    dk1_base = head_start(dk1_ptr, dk1_strides, batch, kv_head, block_start)
    dv_base = head_start(dv_ptr, dv_strides, batch, kv_head, block_start)
    store_tile(dk1_base, dk1_strides[2], local_n, columns_d, keys_left, D, tl.trans(dk1_t) * scale)
    store_tile(dv_base, dv_strides[2], local_n, columns_dv, keys_left, DV, tl.trans(dv_t))
    if MAPS == 2:
        dk2_base = head_start(dk2_ptr, dk2_strides, batch, kv_head, block_start)
        dk2 = tl.trans(dk2_t) * scale
        store_tile(dk2_base, dk2_strides[2], local_n, columns_d, keys_left, D, dk2)
