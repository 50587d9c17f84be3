"""Backward of relation attention on windows for targets and relations.

dlogit_ij = P_ij (dO_i · value_j - D_i) with D_i = dO_i · out_i, times the slope of the LeakyReLU.
"""

import triton
import triton.language as tl

from .attention_triton_tiles import (
    ALIGNMENT,
    add_by_relation,
    kept_pairs,
    load_logits,
    load_nodes,
    load_softmax,
    nodes_of,
    pair_gradients,
    sources_heard,
    store_nodes,
    target_ranges,
)


@triton.jit(do_not_specialize=["total", "keys", "heads", "relations", "seed", "threshold"])
def relation_attn_bwd_dst_kernel(
    value_ptr,
    dst_ptr,
    src_ptr,
    rel_ptr,
    order_ptr,
    key_ptr,
    ranges_ptr,
    table_ptr,
    grad_ptr,
    out_ptr,
    softmax_ptr,
    delta_ptr,
    ddst_ptr,
    parts_ptr,
    value_strides,
    dst_strides,
    src_strides,
    rel_strides,
    grad_strides,
    total,
    keys,
    heads,
    relations,
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
    FEW: tl.constexpr,
    RELATIONS: tl.constexpr,
    IS_DOT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads
    first_row = tile * BLOCK_M
    first_relation = tl.program_id(1) * RELATIONS
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
    grads = load_nodes(grad_ptr + head * grad_strides[1], grad_strides[0], nodes, columns_c, C)
    outs = load_nodes(out_ptr + head * C, heads * C, nodes, columns_c, C)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    length = tl.cast(total, tl.int64)
    exponent, factor = load_softmax(softmax_ptr + nodes * heads + head, length * heads)
    if IS_DOT:
        own = load_nodes(dst_ptr + head * dst_strides[1], dst_strides[0], nodes, columns_d, D)
        src_ptr += head * src_strides[1]
        own_grads = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        own = load_logits(dst_ptr, dst_strides, nodes, head)
        own_grads = tl.zeros([BLOCK_M], tl.float32)
    by_relation = tl.zeros([BLOCK_M if FEW > 0 else 1, RELATIONS], tl.float32)

    last_row = tl.minimum(first_row + BLOCK_M, total) - 1
    begin = tl.load(ranges_ptr + first_row) // ALIGNMENT * ALIGNMENT
    stop = tl.load(ranges_ptr + length + last_row)
    for start in tl.range(begin, stop, BLOCK_N):
        sources = start + local_n
        source_nodes, source_tile, relation, logits, rises = sources_heard(
            sources, total, order_ptr, key_ptr, table_ptr, keys, target_key, first, end, same_first,
            same_end, own, src_ptr, src_strides, rel_ptr, rel_strides[0], head, columns_d, scale,
            negative_slope, D, IS_DOT, PRECISION,
        )  # fmt: skip
        values = load_nodes(value_ptr, value_strides[0], source_nodes, columns_c, C)
        value_grads = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        keep = None
        if HAS_DROPOUT:
            keep = kept_pairs(seed, threshold, head, rows, start, BLOCK_N)
        _, slopes = pair_gradients(
            logits, rises, value_grads, exponent[:, None], factor[:, None], delta[:, None],
            keep, inverse_kept, negative_slope, IS_DOT, HAS_DROPOUT,
        )  # fmt: skip
        if IS_DOT:
            own_grads = tl.dot(
                slopes.to(source_tile.dtype), source_tile, own_grads, input_precision=PRECISION
            )
        else:
            own_grads += tl.sum(slopes, 1)
        by_relation = add_by_relation(by_relation, slopes, relation, first_relation, FEW, RELATIONS)

    numbers = first_relation + tl.arange(0, RELATIONS)
    part = (tl.program_id(0).to(tl.int64) * relations) + numbers
    tl.store(parts_ptr + part, tl.sum(by_relation, 0), mask=numbers < relations)
    if first_relation == 0:
        tl.store(delta_ptr + nodes * heads + head, delta, mask=inside)
        if IS_DOT:
            store_nodes(
                ddst_ptr + head * D, heads * D, nodes, inside, columns_d, D, own_grads * scale
            )
        else:
            places = ddst_ptr + nodes * heads + head
            tl.store(places, own_grads.to(ddst_ptr.dtype.element_ty), mask=inside)
