"""dW_r = sum over i of Z_irᵀ · dO_i on implicit graphs, Z recomputed.

A program owns a part of dW of one relation and one split of the rows, in their order. Parts of
several splits are added up afterwards, in order: no atomics, the same bits every time.
"""

import triton
import triton.language as tl

from .conv_triton_tiles import (
    add_band,
    add_product,
    band_limits,
    heard_pairs,
    max_band,
    next_code,
    pair_rows,
)


@triton.jit
def hears_relation(table_ptr, key, relation, KEYS: tl.constexpr, PAIRS: tl.constexpr):
    """Whether rows of a key can hear a relation at all."""
    pair = tl.arange(0, PAIRS)
    heard = tl.load(table_ptr + key * 3 * KEYS + pair, mask=pair < 3 * KEYS, other=-1)
    return tl.max((heard == relation).to(tl.int32))


@triton.jit(do_not_specialize=["total", "split_rows", "past", "future"])
def relation_bands_weight_kernel(
    features_ptr,
    grad_ptr,
    out_ptr,
    order_ptr,
    position_ptr,
    group_ptr,
    start_ptr,
    table_ptr,
    feature_strides,
    grad_strides,
    split_stride,
    relation_stride,
    total,
    split_rows,
    past,
    future,
    zero: tl.float32,
    C: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    relation = tl.program_id(0)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_e = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(1) // (tiles_c * tiles_e)
    columns = tl.program_id(1) // tiles_e % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    columns_e = tl.program_id(1) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    features_ptr += block * C * feature_strides[1]
    grad_ptr += block * E * grad_strides[1]
    split = tl.program_id(2).to(tl.int64)
    row = split * split_rows
    split_end = tl.minimum(row + split_rows, total)

    acc = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    while row < split_end:
        group = tl.load(group_ptr + row)
        group_end = tl.minimum(tl.load(start_ptr + group + 1), split_end)
        tiles_end = row
        if hears_relation(table_ptr, group % KEYS, relation, KEYS, PAIRS):
            tiles_end = group_end
        for tile in tl.range(row, tiles_end, BLOCK_M, num_stages=1):
            rows = tile + tl.arange(0, BLOCK_M)
            owned = rows < group_end
            positions = tl.load(position_ptr + rows, mask=owned, other=0)
            first_position = tl.load(position_ptr + tile)
            last_position = tl.load(position_ptr + tl.minimum(tile + BLOCK_M, group_end) - 1)
            codes, begins, ends = heard_pairs(
                table_ptr, start_ptr, position_ptr, group, first_position, last_position, past,
                future, KEYS, PAIRS, BLOCK_N, False,
            )  # fmt: skip
            relation_end = (relation.to(tl.int64) + 1) * PAIRS
            code = next_code(codes, relation_end - PAIRS)
            if code < relation_end:
                sums = tl.full([BLOCK_M, BLOCK_C], float("-inf") if MAX else 0.0, tl.float32)
                counts = tl.zeros([BLOCK_M], tl.int32)
                while code < relation_end:
                    begin, end = pair_rows(codes, code, begins, ends)
                    low, high = band_limits(code % PAIRS % 3, past, future, False)
                    if MAX:
                        sums, counts = max_band(
                            sums, counts, features_ptr, feature_strides, order_ptr, position_ptr,
                            positions, begin, end, low, high, columns, C,
                        )  # fmt: skip
                    else:
                        sums, counts = add_band(
                            sums, counts, features_ptr, feature_strides, None, order_ptr,
                            position_ptr, positions, begin, end, low, high, columns, C, zero,
                            MEAN, BLOCK_N, PRECISION,
                        )  # fmt: skip
                    code = next_code(codes, code + 1)
                if MEAN:
                    sums = sums / tl.maximum(counts, 1)[:, None]
                if MAX:
                    # Rows behind the last one meet zeros, which don't hide what is not finite.
                    sums = tl.where((owned & (counts > 0))[:, None], sums, 0.0)
                node = tl.load(order_ptr + rows, mask=owned, other=0).to(tl.int64)
                places = node[:, None] * grad_strides[0] + columns_e[None, :] * grad_strides[1]
                seen = owned[:, None] & (columns_e[None, :] < E)
                grad = tl.load(grad_ptr + places, mask=seen, other=0.0)  # [BLOCK_M, BLOCK_E]
                sums = tl.trans(sums.to(grad.dtype))
                acc = add_product(acc, sums, grad, zero, PRECISION)
        row = group_end

    out_ptr += split * split_stride + relation.to(tl.int64) * relation_stride
    places = (block * C + columns[:, None]) * E + columns_e[None, :]
    tl.store(
        out_ptr + places,
        acc.to(out_ptr.dtype.element_ty),
        mask=(columns[:, None] < C) & (columns_e[None, :] < E),
    )
