"""Forward of relation attention on windows: out_i = sum of softmax_j(logits_ij) value_j."""

import triton
import triton.language as tl

from ..._backends.triton_utils import LOG2E, online_softmax
from .attention_triton_tiles import (
    ALIGNMENT,
    kept_pairs,
    load_logits,
    load_nodes,
    nodes_of,
    sources_heard,
    store_nodes,
    store_softmax,
    target_ranges,
)


@triton.jit(do_not_specialize=["total", "keys", "heads", "seed", "threshold"])
def relation_attn_fwd_kernel(
    value_ptr,
    dst_ptr,
    src_ptr,
    rel_ptr,
    order_ptr,
    key_ptr,
    ranges_ptr,
    table_ptr,
    out_ptr,
    softmax_ptr,
    value_strides,
    dst_strides,
    src_strides,
    rel_strides,
    total,
    keys,
    heads,
    seed: tl.int64,
    threshold: tl.int64,
    scale: tl.float32,
    negative_slope: tl.float32,
    inverse_kept: tl.float32,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_DOT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    first_row = tl.program_id(0) // heads * BLOCK_M
    local_n = tl.arange(0, BLOCK_N)
    columns_d = tl.arange(0, BLOCK_D)
    columns_c = tl.arange(0, BLOCK_C)
    value_ptr += head * value_strides[1]
    rel_ptr += head * rel_strides[1]

    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < total
    first, end, same_first, same_end = target_ranges(ranges_ptr, rows, inside, total)
    rows = tl.minimum(rows, total - 1)
    nodes = nodes_of(order_ptr, rows)
    target_key = tl.load(key_ptr + rows)
    if IS_DOT:
        own = load_nodes(dst_ptr + head * dst_strides[1], dst_strides[0], nodes, columns_d, D)
        src_ptr += head * src_strides[1]
    else:
        own = load_logits(dst_ptr, dst_strides, nodes, head)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    length = tl.cast(total, tl.int64)
    last_row = tl.minimum(first_row + BLOCK_M, total) - 1
    begin = tl.load(ranges_ptr + first_row) // ALIGNMENT * ALIGNMENT
    stop = tl.load(ranges_ptr + length + last_row)
    for start in tl.range(begin, stop, BLOCK_N):
        sources = start + local_n
        source_nodes, _, _, logits, _ = sources_heard(
            sources, total, order_ptr, key_ptr, table_ptr, keys, target_key, first, end, same_first,
            same_end, own, src_ptr, src_strides, rel_ptr, rel_strides[0], head, columns_d, scale,
            negative_slope, D, IS_DOT, PRECISION,
        )  # fmt: skip
        values = load_nodes(value_ptr, value_strides[0], source_nodes, columns_c, C)
        weights, decay, peak, sums = online_softmax(logits, LOG2E, peak, sums)
        if HAS_DROPOUT:
            keep = kept_pairs(seed, threshold, head, rows, start, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION
        )

    # What is not a number stays so: only rows that hear nothing have a sum of 0.
    inverse = tl.where(sums == 0.0, 0.0, inverse_kept / sums)
    store_softmax(softmax_ptr + nodes * heads + head, length * heads, inside, peak, sums)
    store_nodes(out_ptr + head * C, heads * C, nodes, inside, columns_c, C, acc * inverse[:, None])
