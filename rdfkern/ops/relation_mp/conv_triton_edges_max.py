"""Gradients of maxima on lists of edges, for the relations first..last at a time.

Targets leave kept[0], their maxima, and kept[1], the gradient of each divided by the number of
edges that attain it; sources and edges collect from there. No atomics: every element has one
program.
"""

import triton
import triton.language as tl

from .conv_triton_bands_max import passed_on
from .conv_triton_edges import add_edges, edge_factors, edge_features, edge_relations
from .conv_triton_edges_weight import first_edge_of
from .conv_triton_tiles import add_product


@triton.jit(do_not_specialize=["total", "first", "last"])
def relation_edges_max_kernel(
    features_ptr,
    grad_ptr,
    weight_ptr,
    kept_ptr,
    factor_ptr,
    start_ptr,
    other_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    feature_strides,
    grad_strides,
    weight_strides,
    kept_size,
    width,
    total,
    first,
    last,
    zero: tl.float32,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill kept, (2, relations, target, width)."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(1) // tiles_c
    columns = tl.program_id(1) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    features_ptr += block * C * feature_strides[1]
    grad_ptr += block * E * grad_strides[1]
    weight_ptr += block * weight_strides[1]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    owned = rows < total
    begin = tl.load(start_ptr + rows, mask=owned, other=0)
    end = tl.load(start_ptr + rows + 1, mask=owned, other=0)
    at = first_edge_of(relation_ptr, begin, end, first)

    relation = tl.min(edge_relations(relation_ptr, at, end))
    while relation <= last:
        hearing = edge_relations(relation_ptr, at, end) == relation
        highest, moved = add_edges(
            tl.zeros([BLOCK_M, BLOCK_C], tl.float32), at, end, relation, features_ptr,
            feature_strides, factor_ptr, other_ptr, relation_ptr, edge_ptr, count_ptr, columns, C,
            MEAN, True,
        )  # fmt: skip
        ties = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        active = hearing
        while tl.max(active.to(tl.int32)) > 0:
            factor = edge_factors(factor_ptr, edge_ptr, count_ptr, at, active, MEAN)
            features = edge_features(
                at, active, features_ptr, feature_strides, other_ptr, columns, C
            )
            attains = active[:, None] & (features * factor[:, None] == highest)
            ties += tl.where(attains, 1.0, 0.0)
            at += active.to(at.dtype)
            active = active & (at < moved)
        gradients = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start_e in tl.range(0, E, BLOCK_E, num_stages=1):
            columns_e = start_e + tl.arange(0, BLOCK_E)
            places = rows[:, None] * grad_strides[0] + columns_e[None, :] * grad_strides[1]
            seen = owned[:, None] & (columns_e[None, :] < E)
            grad = tl.load(grad_ptr + places, mask=seen, other=0.0)  # [BLOCK_M, BLOCK_E]
            places = columns_e[:, None] * weight_strides[3] + columns[None, :] * weight_strides[2]
            weight = tl.load(
                weight_ptr + relation * weight_strides[0] + places,
                mask=(columns_e[:, None] < E) & (columns[None, :] < C),
                other=0.0,
            )  # [BLOCK_E, BLOCK_C]
            gradients = add_product(gradients, grad, weight.to(grad.dtype), zero, PRECISION)
        places = ((relation - first) * total + rows[:, None]) * width + block * C + columns[None, :]
        stored = hearing[:, None] & (columns[None, :] < C)
        tl.store(kept_ptr + places, highest, mask=stored)
        tl.store(kept_ptr + kept_size + places, gradients / ties, mask=stored)
        at = moved
        relation = tl.min(edge_relations(relation_ptr, at, end))


@triton.jit(do_not_specialize=["total", "targets", "edges", "first", "last"])
def relation_edges_collect_kernel(
    features_ptr,
    kept_ptr,
    dx_ptr,
    products_ptr,
    factor_ptr,
    start_ptr,
    other_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    feature_strides,
    kept_size,
    width,
    total,
    targets,
    edges,
    first,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MEAN: tl.constexpr,
):
    """What comes back through maxima: add it to dx, (source, width), and leave that of factors.

    The first relation sets dx; products[part, e] is what one part of the columns adds to df_e.
    """
    part = tl.program_id(1).to(tl.int64)
    columns = part * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < width
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    owned = rows < total
    stored = owned[:, None] & inside[None, :]
    begin = tl.load(start_ptr + rows, mask=owned, other=0)
    end = tl.load(start_ptr + rows + 1, mask=owned, other=0)
    places = rows[:, None] * feature_strides[0] + columns[None, :] * feature_strides[1]
    features = tl.load(features_ptr + places, mask=stored, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if dx_ptr is not None:
        dx_ptr += rows[:, None] * width + columns[None, :]
        if first > 0:
            sums = tl.load(dx_ptr, mask=stored, other=0.0)

    at = first_edge_of(relation_ptr, begin, end, first)
    relation = edge_relations(relation_ptr, at, end)
    active = relation <= last
    while tl.max(active.to(tl.int32)) > 0:
        target = tl.load(other_ptr + at, mask=active, other=0).to(tl.int64)
        factor = edge_factors(factor_ptr, edge_ptr, count_ptr, at, active, MEAN)[:, None]
        places = ((relation - first) * targets + target)[:, None] * width + columns[None, :]
        seen = active[:, None] & inside[None, :]
        passed = passed_on(features * factor, kept_ptr, kept_size, places, seen)
        if dx_ptr is not None:
            sums += tl.where(active[:, None], passed * factor, 0.0)
        if products_ptr is not None:
            edge = tl.load(edge_ptr + at, mask=active, other=0)
            value = tl.sum(passed * features, 1)
            tl.store(products_ptr + part * edges + edge, value, mask=active)
        at += active.to(at.dtype)
        relation = edge_relations(relation_ptr, at, end)
        active = relation <= last
    if dx_ptr is not None:
        tl.store(dx_ptr, sums, mask=stored)
