"""Backward of differential attention for queries, in the two-pass form, which needs no atomics."""

import triton
import triton.language as tl

from ..._backends.triton_utils import dropout_pair, load_tile, store_tile, visible_tiles
from .triton_tiles import (
    ROW_VALUES,
    head_start,
    load_row_values,
    map_gradients,
    mask_scores,
    sequence_rows,
)


@triton.jit(do_not_specialize=["len_q", "len_k", "left", "right", "seed"])
def diff_attn_bwd_q_kernel(
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
    q1_strides,
    k1_strides,
    q2_strides,
    k2_strides,
    v_strides,
    mask_strides,
    padding_stride,
    grad_strides,
    row_strides,
    dq1_strides,
    dq2_strides,
    heads,
    group,
    len_q,
    len_k,
    left,
    right,
    seed: tl.int64,
    query_scale: tl.float32,
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
    blocks = tl.cdiv(len_q, BLOCK_M)
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
    grad_base = head_start(grad_ptr, grad_strides, batch, head, row_start)
    k1_base = head_start(k1_ptr, k1_strides, batch, kv_head, key_start)
    v_base = head_start(v_ptr, v_strides, batch, kv_head, key_start)
    first_row = batch * row_strides[0] + head * row_strides[1] + row_start
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
    padding_base = padding_ptr
    if padding_ptr is not None:
        padding_base = padding_ptr + batch * padding_stride + key_start
    FACTORED: tl.constexpr = mask_ptr is None or mask_ptr.dtype.element_ty == tl.uint8
    factor = scale_log2 if FACTORED else 1.0
    MASKED: tl.constexpr = mask_ptr is not None or padding_ptr is not None
    inverse_kept = 1.0 / (1.0 - dropout_p)

    q1 = load_tile(q1_base, q1_strides[2], local_m, rows_left, columns_d, D)
    grad = load_tile(grad_base, grad_strides[2], local_m, rows_left, columns_dv, DV)
    values_base = rows_ptr + first_row * ROW_VALUES
    exponent1, delta1, coefficient1 = load_row_values(values_base, local_m, rows_left)
    dq1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MAPS == 2:
        q2_base = head_start(q2_ptr, q2_strides, batch, head, row_start)
        k2_base = head_start(k2_ptr, k2_strides, batch, kv_head, key_start)
        q2 = load_tile(q2_base, q2_strides[2], local_m, rows_left, columns_d, D)
        exponent2, delta2, coefficient2 = load_row_values(values_base + 1, local_m, rows_left)
        dq2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

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
        v = load_tile(v_base, v_strides[2], columns, len_k, columns_dv, DV)
        keep1 = None
        keep2 = None
        if HAS_DROPOUT:
            keep1, keep2 = dropout_pair(
                seed, sequence_head, rows[:, None], columns[None, :], dropout_p
            )
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
        weights1 = tl.math.exp2(scores1 * factor - exponent1[:, None])
        value_grads = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        _, score_grads1 = map_gradients(
            weights1, value_grads, coefficient1[:, None], delta1[:, None],
            keep1, inverse_kept,
        )  # fmt: skip
        dq1 = tl.dot(score_grads1.to(k1.dtype), k1, dq1, input_precision=PRECISION)
        if MAPS == 2:
            weights2 = tl.math.exp2(scores2 * factor - exponent2[:, None])
            _, score_grads2 = map_gradients(
                weights2, value_grads, coefficient2[:, None], delta2[:, None],
                keep2, inverse_kept,
            )  # fmt: skip
            dq2 = tl.dot(score_grads2.to(k2.dtype), k2, dq2, input_precision=PRECISION)

    dq1_base = head_start(dq1_ptr, dq1_strides, batch, head, row_start)
    store_tile(dq1_base, dq1_strides[2], local_m, columns_d, rows_left, D, dq1 * query_scale)
    if MAPS == 2:
        dq2_base = head_start(dq2_ptr, dq2_strides, batch, head, row_start)
        store_tile(dq2_base, dq2_strides[2], local_m, columns_d, rows_left, D, dq2 * query_scale)
