"""Gradients of weights and of edge weights on lists of edges.

dW_r = sum over i of Z_irᵀ · dO_i, by target: a program owns a part of dW of one relation and one
split of the targets, which are added up afterwards in order. df_e = <x_j · W_r, dO_i> over the
number of e's companions, by source. No atomics: every element of an output has one program.
"""

import triton
import triton.language as tl

from .conv_triton_edges import NO_RELATION, add_edges, edge_factors, edge_relations
from .conv_triton_tiles import add_product


@triton.jit
def first_edge_of(relation_ptr, begin, end, relation):
    """The first of the edges begin..end, by element, of this relation or a later one."""
    while tl.max(end - begin) > 0:
        middle = begin + (end - begin) // 2
        open_ = begin < end
        before = open_ & (tl.load(relation_ptr + middle, mask=open_, other=0) < relation)
        end = tl.where(before, end, middle)
        begin = tl.where(before, middle + 1, begin)
    return begin


@triton.jit(do_not_specialize=["total", "split_rows"])
def relation_edges_weight_kernel(
    features_ptr,
    grad_ptr,
    factor_ptr,
    out_ptr,
    start_ptr,
    other_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    feature_strides,
    grad_strides,
    split_stride,
    relation_stride,
    total,
    split_rows,
    zero: tl.float32,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    relation = tl.program_id(0).to(tl.int64)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_e = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(1) // (tiles_c * tiles_e)
    columns = tl.program_id(1) // tiles_e % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    columns_e = tl.program_id(1) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    features_ptr += block * C * feature_strides[1]
    grad_ptr += block * E * grad_strides[1]
    split = tl.program_id(2).to(tl.int64)
    split_start = split * split_rows
    split_end = tl.minimum(split_start + split_rows, total)

    acc = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for tile in tl.range(split_start, split_end, BLOCK_M, num_stages=1):
        rows = tile + tl.arange(0, BLOCK_M)
        owned = rows < split_end
        begin = tl.load(start_ptr + rows, mask=owned, other=0)
        end = tl.load(start_ptr + rows + 1, mask=owned, other=0)
        at = first_edge_of(relation_ptr, begin, end, relation)
        heard = edge_relations(relation_ptr, at, end) == relation
        if tl.max(heard.to(tl.int32)) > 0:
            sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            sums, at = add_edges(
                sums, at, end, relation, features_ptr, feature_strides, factor_ptr, other_ptr,
                relation_ptr, edge_ptr, count_ptr, columns, C, MEAN, MAX,
            )  # fmt: skip
            places = rows[:, None] * grad_strides[0] + columns_e[None, :] * grad_strides[1]
            seen = owned[:, None] & (columns_e[None, :] < E)
            grad = tl.load(grad_ptr + places, mask=seen, other=0.0)  # [BLOCK_M, BLOCK_E]
            sums = tl.trans(sums.to(grad.dtype))
            acc = add_product(acc, sums, grad, zero, PRECISION)

    out_ptr += split * split_stride + relation * relation_stride
    places = (block * C + columns[:, None]) * E + columns_e[None, :]
    tl.store(
        out_ptr + places,
        acc.to(out_ptr.dtype.element_ty),
        mask=(columns[:, None] < C) & (columns_e[None, :] < E),
    )


@triton.jit(do_not_specialize=["total", "edges"])
def relation_edges_factor_kernel(
    features_ptr,
    weight_ptr,
    grad_ptr,
    out_ptr,
    start_ptr,
    other_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    feature_strides,
    weight_strides,
    grad_strides,
    total,
    edges,
    zero: tl.float32,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[part, e]: what the columns of one part of the output add to df_e."""
    tiles_e = tl.cdiv(E, BLOCK_E)
    part = tl.program_id(1).to(tl.int64)
    block = tl.program_id(1) // tiles_e
    columns_e = tl.program_id(1) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    features_ptr += block * C * feature_strides[1]
    weight_ptr += block * weight_strides[1]
    grad_ptr += block * E * grad_strides[1]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    owned = rows < total
    at = tl.load(start_ptr + rows, mask=owned, other=0)
    end = tl.load(start_ptr + rows + 1, mask=owned, other=0)

    relation = tl.min(edge_relations(relation_ptr, at, end))
    while relation < NO_RELATION:
        products = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for start_c in tl.range(0, C, BLOCK_C):
            columns = start_c + tl.arange(0, BLOCK_C)
            places = rows[:, None] * feature_strides[0] + columns[None, :] * feature_strides[1]
            seen = owned[:, None] & (columns[None, :] < C)
            features = tl.load(features_ptr + places, mask=seen, other=0.0)
            places = columns[:, None] * weight_strides[2] + columns_e[None, :] * weight_strides[3]
            weight = tl.load(
                weight_ptr + relation * weight_strides[0] + places,
                mask=(columns[:, None] < C) & (columns_e[None, :] < E),
                other=0.0,
            )
            weight = weight.to(features.dtype)
            products = add_product(products, features, weight, zero, PRECISION)
        active = edge_relations(relation_ptr, at, end) == relation
        while tl.max(active.to(tl.int32)) > 0:
            other = tl.load(other_ptr + at, mask=active, other=0).to(tl.int64)
            places = other[:, None] * grad_strides[0] + columns_e[None, :] * grad_strides[1]
            seen = active[:, None] & (columns_e[None, :] < E)
            grad = tl.load(grad_ptr + places, mask=seen, other=0.0).to(tl.float32)
            value = tl.sum(grad * products, 1)
            value *= edge_factors(None, edge_ptr, count_ptr, at, active, MEAN)
            edge = tl.load(edge_ptr + at, mask=active, other=0)
            tl.store(out_ptr + part * edges + edge, value, mask=active)
            at += active.to(at.dtype)
            active = active & (edge_relations(relation_ptr, at, end) == relation)
        relation = tl.min(edge_relations(relation_ptr, at, end))
