"""out_i = addend_i + sum over r of (AGG over edges e = (j -> i) of r of f_e x_j) · W_r, on lists.

Edges of a row are ordered by relation. The rows of a tile go through them side by side, relation
after relation; what a relation's sum makes of its weight follows at once. f_e is the weight of the
edge, over the number of its companions for a mean. By source instead of by target, with W_r
transposed, the same kernel computes dx.
"""

import triton
import triton.language as tl

from .conv_triton_tiles import add_product, larger

NO_RELATION = tl.constexpr(1 << 62)


@triton.jit
def edge_relations(relation_ptr, at, end):
    """Relations of one edge of each row, NO_RELATION past the row's end."""
    relation = tl.load(relation_ptr + at, mask=at < end, other=0).to(tl.int64)
    return tl.where(at < end, relation, NO_RELATION)


@triton.jit
def edge_factors(factor_ptr, edge_ptr, count_ptr, at, active, MEAN: tl.constexpr):
    """f_e of one edge of each row, 0 where there is none."""
    factor = active.to(tl.float32)
    if factor_ptr is not None:
        edge = tl.load(edge_ptr + at, mask=active, other=0)
        factor = tl.load(factor_ptr + edge, mask=active, other=0.0).to(tl.float32)
    if MEAN:
        factor = factor / tl.load(count_ptr + at, mask=active, other=1)
    return factor


@triton.jit
def edge_features(
    at,
    active,
    features_ptr,
    feature_strides,
    other_ptr,
    columns,
    column_end,
):
    """Features of the other end of one edge of each row, float32, 0 where there is none."""
    other = tl.load(other_ptr + at, mask=active, other=0).to(tl.int64)
    places = other[:, None] * feature_strides[0] + columns[None, :] * feature_strides[1]
    seen = active[:, None] & (columns[None, :] < column_end)
    return tl.load(features_ptr + places, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def add_edges(
    sums,
    at,
    end,
    relation,
    features_ptr,
    feature_strides,
    factor_ptr,
    other_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    columns,
    column_end,
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
):
    """Add to sums of 0 what each row hears as `relation` from its edge `at` on, or its maximum.

    `at` moves past that.
    """
    active = edge_relations(relation_ptr, at, end) == relation
    if MAX:
        sums = tl.where(active[:, None], float("-inf"), sums)
    while tl.max(active.to(tl.int32)) > 0:
        factor = edge_factors(factor_ptr, edge_ptr, count_ptr, at, active, MEAN)
        features = edge_features(
            at, active, features_ptr, feature_strides, other_ptr, columns, column_end
        )
        if MAX:
            highest = larger(sums, features * factor[:, None])
            sums = tl.where(active[:, None], highest, sums)
        else:
            sums += features * factor[:, None]
        at += active.to(at.dtype)
        active = active & (edge_relations(relation_ptr, at, end) == relation)
    return sums, at


@triton.jit(do_not_specialize=["total"])
def relation_edges_kernel(
    features_ptr,
    weight_ptr,
    addend_ptr,
    factor_ptr,
    out_ptr,
    start_ptr,
    other_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    feature_strides,
    weight_strides,
    addend_strides,
    out_stride,
    total,
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
    tiles_e = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(1) // tiles_e
    columns_e = tl.program_id(1) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    features_ptr += block * C * feature_strides[1]
    weight_ptr += block * weight_strides[1]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    owned = rows < total
    at = tl.load(start_ptr + rows, mask=owned, other=0)
    end = tl.load(start_ptr + rows + 1, mask=owned, other=0)

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    relation = tl.min(edge_relations(relation_ptr, at, end))
    while relation < NO_RELATION:
        moved = at
        for start_c in tl.range(0, C, BLOCK_C, num_stages=1):
            columns = start_c + tl.arange(0, BLOCK_C)
            sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            sums, moved = add_edges(
                sums, at, end, relation, features_ptr, feature_strides, factor_ptr, other_ptr,
                relation_ptr, edge_ptr, count_ptr, columns, C, MEAN, MAX,
            )  # fmt: skip
            places = columns[:, None] * weight_strides[2] + columns_e[None, :] * weight_strides[3]
            weight = tl.load(
                weight_ptr + relation * weight_strides[0] + places,
                mask=(columns[:, None] < C) & (columns_e[None, :] < E),
                other=0.0,
            )  # [BLOCK_C, BLOCK_E]
            dtype = features_ptr.dtype.element_ty
            acc = add_product(acc, sums.to(dtype), weight.to(dtype), zero, PRECISION)
        at = moved
        relation = tl.min(edge_relations(relation_ptr, at, end))

    stored = owned[:, None] & (columns_e[None, :] < E)
    columns_e += block * E
    if addend_ptr is not None:
        places = rows[:, None] * addend_strides[0] + columns_e[None, :] * addend_strides[1]
        acc += tl.load(addend_ptr + places, mask=stored, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + rows[:, None] * out_stride + columns_e[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=stored,
    )
