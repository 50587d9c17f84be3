"""Backward of relation attention on windows for sources: dvalue, and dlogit_src or dkey.

A tile of pairs has its sources in the rows, so that what it multiplies by stays in registers.
"""

import triton
import triton.language as tl

from .attention_triton_tiles import (
    ALIGNMENT,
    kept_pairs,
    load_logits,
    load_nodes,
    load_softmax,
    nodes_of,
    pair_gradients,
    pair_logits,
    relations_heard,
    softmax_of_pairs,
    store_nodes,
    target_ranges,
)


@triton.jit(do_not_specialize=["total", "keys", "heads", "relations", "seed", "threshold"])
def relation_attn_bwd_src_kernel(
    value_ptr,
    dst_ptr,
    src_ptr,
    rel_ptr,
    order_ptr,
    key_ptr,
    ranges_ptr,
    table_ptr,
    grad_ptr,
    delta_ptr,
    softmax_ptr,
    dvalue_ptr,
    dsrc_ptr,
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
    IS_DOT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    first_source = tl.program_id(0) // heads * BLOCK_N
    local_m = tl.arange(0, BLOCK_M)
    columns_d = tl.arange(0, BLOCK_D)
    columns_c = tl.arange(0, BLOCK_C)
    grad_ptr += head * grad_strides[1]
    rel_ptr += head * rel_strides[1]

    sources = first_source + tl.arange(0, BLOCK_N)
    inside = sources < total
    source_rows = tl.minimum(sources, total - 1)
    source_nodes = nodes_of(order_ptr, source_rows)
    source_key = tl.load(key_ptr + source_rows)
    values = load_nodes(
        value_ptr + head * value_strides[1], value_strides[0], source_nodes, columns_c, C
    )
    source_tile = None
    others = 0.0
    if IS_DOT:
        source_tile = load_nodes(
            src_ptr + head * src_strides[1], src_strides[0], source_nodes, columns_d, D
        )
        dst_ptr += head * dst_strides[1]
        own_grads = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    else:
        others = load_logits(src_ptr, src_strides, source_nodes, head)[:, None]
        own_grads = tl.zeros([BLOCK_N], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    length = tl.cast(total, tl.int64)
    last_source = tl.minimum(first_source + BLOCK_N, total) - 1
    begin = tl.load(ranges_ptr + 2 * length + first_source) // ALIGNMENT * ALIGNMENT
    stop = tl.load(ranges_ptr + 3 * length + last_source)
    for start in tl.range(begin, stop, BLOCK_M):
        rows = start + local_m
        first, end, same_first, same_end = target_ranges(ranges_ptr, rows, rows < total, total)
        rows = tl.minimum(rows, total - 1)
        nodes = nodes_of(order_ptr, rows)
        relation = relations_heard(
            table_ptr, keys, tl.load(key_ptr + rows)[None, :], source_key[:, None],
            first[None, :], end[None, :], same_first[None, :], same_end[None, :], sources[:, None],
        )  # [BLOCK_N, BLOCK_M]  # fmt: skip
        of_target = nodes * heads + head
        if delta_ptr is not None:
            exponent, factor = load_softmax(softmax_ptr + of_target[None, :], length * heads)
            delta = tl.load(delta_ptr + of_target)[None, :]
        else:
            exponent, factor, delta = softmax_of_pairs(
                softmax_ptr, length * heads * relations, of_target[None, :] * relations, relation
            )
        grads = load_nodes(grad_ptr, grad_strides[0], nodes, columns_c, C)
        products = 0.0
        own = 0.0
        if IS_DOT:
            queries = load_nodes(dst_ptr, dst_strides[0], nodes, columns_d, D)
            products = tl.dot(source_tile, tl.trans(queries), input_precision=PRECISION)
        else:
            own = load_logits(dst_ptr, dst_strides, nodes, head)[None, :]
        logits, rises = pair_logits(
            relation, rel_ptr, rel_strides[0], products, own, others, scale, negative_slope, IS_DOT
        )
        value_grads = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        keep = None
        if HAS_DROPOUT:
            keep = tl.trans(kept_pairs(seed, threshold, head, rows, first_source, BLOCK_N))
        kept, slopes = pair_gradients(
            logits, rises, value_grads, exponent, factor, delta, keep, inverse_kept,
            negative_slope, IS_DOT, HAS_DROPOUT,
        )  # fmt: skip
        dvalue = tl.dot(kept.to(grads.dtype), grads, dvalue, input_precision=PRECISION)
        if IS_DOT:
            own_grads = tl.dot(
                slopes.to(queries.dtype), queries, own_grads, input_precision=PRECISION
            )
        else:
            own_grads += tl.sum(slopes, 1)

    store_nodes(dvalue_ptr + head * C, heads * C, source_nodes, inside, columns_c, C, dvalue)
    if IS_DOT:
        store_nodes(
            dsrc_ptr + head * D, heads * D, source_nodes, inside, columns_d, D, own_grads * scale
        )
    else:
        own_grads = own_grads.to(dsrc_ptr.dtype.element_ty)
        tl.store(dsrc_ptr + source_nodes * heads + head, own_grads, mask=inside)
