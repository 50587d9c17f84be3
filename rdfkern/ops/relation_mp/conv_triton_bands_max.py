"""Gradients of maxima on implicit graphs, for the relations first..last at a time.

Targets leave kept[0], their maxima, and kept[1], the gradient of each divided by the number of
neighbours that attain it; sources collect from there. No atomics: every element has one program.
"""

import triton
import triton.language as tl

from .conv_triton_tiles import (
    add_product,
    band_limits,
    heard_features,
    heard_pairs,
    max_band,
    next_code,
    pair_rows,
    tile_rows,
)


@triton.jit
def passed_on(features, kept_ptr, kept_size, places, seen):
    """What one neighbour's features get of the gradient of maxima, times its own factor.

    Where a maximum is not a number nothing attains it, and 0 times its infinite share is not a
    number either.
    """
    highest = tl.load(kept_ptr + places, mask=seen, other=0.0)
    share = tl.load(kept_ptr + kept_size + places, mask=seen, other=0.0)
    return tl.where(features == highest, 1.0, 0.0) * share


@triton.jit(do_not_specialize=["groups", "total", "past", "future", "first", "last"])
def relation_bands_max_kernel(
    features_ptr,
    grad_ptr,
    weight_ptr,
    kept_ptr,
    order_ptr,
    position_ptr,
    start_ptr,
    table_ptr,
    feature_strides,
    grad_strides,
    weight_strides,
    kept_size,
    width,
    groups,
    total,
    past,
    future,
    first,
    last,
    zero: tl.float32,
    C: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill kept, (2, relations, target, width)."""
    group, first_row, row_end = tile_rows(start_ptr, tl.program_id(0), groups, BLOCK_M)
    if first_row >= row_end:
        return
    tiles_c = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(1) // tiles_c
    columns = tl.program_id(1) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    features_ptr += block * C * feature_strides[1]
    grad_ptr += block * E * grad_strides[1]
    weight_ptr += block * weight_strides[1]

    rows = first_row + tl.arange(0, BLOCK_M)
    owned = rows < row_end
    positions = tl.load(position_ptr + rows, mask=owned, other=0)
    node = tl.load(order_ptr + rows, mask=owned, other=0).to(tl.int64)
    first_position = tl.load(position_ptr + first_row)
    last_position = tl.load(position_ptr + row_end - 1)
    codes, begins, ends = heard_pairs(
        table_ptr, start_ptr, position_ptr, group, first_position, last_position, past, future,
        KEYS, PAIRS, BLOCK_N, False,
    )  # fmt: skip

    code = next_code(codes, tl.cast(first, tl.int64) * PAIRS)
    while code < (tl.cast(last, tl.int64) + 1) * PAIRS:
        relation = code // PAIRS
        relation_end = (relation + 1) * PAIRS
        highest = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
        counts = tl.zeros([BLOCK_M], tl.int32)
        pair_code = code
        while pair_code < relation_end:
            begin, end = pair_rows(codes, pair_code, begins, ends)
            low, high = band_limits(pair_code % PAIRS % 3, past, future, False)
            highest, counts = max_band(
                highest, counts, features_ptr, feature_strides, order_ptr, position_ptr, positions,
                begin, end, low, high, columns, C,
            )  # fmt: skip
            pair_code = next_code(codes, pair_code + 1)
        ties = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        pair_code = code
        while pair_code < relation_end:
            begin, end = pair_rows(codes, pair_code, begins, ends)
            low, high = band_limits(pair_code % PAIRS % 3, past, future, False)
            for other in tl.range(begin, end):
                features, heard = heard_features(
                    other, features_ptr, feature_strides, order_ptr, position_ptr, positions, low,
                    high, columns, C,
                )  # fmt: skip
                ties += tl.where(heard & (features == highest), 1.0, 0.0)
            pair_code = next_code(codes, pair_code + 1)
        gradients = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for start_e in tl.range(0, E, BLOCK_E, num_stages=1):
            columns_e = start_e + tl.arange(0, BLOCK_E)
            places = node[:, None] * grad_strides[0] + columns_e[None, :] * grad_strides[1]
            seen = owned[:, None] & (columns_e[None, :] < E)
            grad = tl.load(grad_ptr + places, mask=seen, other=0.0)  # [BLOCK_M, BLOCK_E]
            places = columns_e[:, None] * weight_strides[3] + columns[None, :] * weight_strides[2]
            weight = tl.load(
                weight_ptr + relation * weight_strides[0] + places,
                mask=(columns_e[:, None] < E) & (columns[None, :] < C),
                other=0.0,
            )  # [BLOCK_E, BLOCK_C]
            gradients = add_product(gradients, grad, weight.to(grad.dtype), zero, PRECISION)
        places = ((relation - first) * total + node[:, None]) * width + block * C + columns[None, :]
        stored = owned[:, None] & (counts[:, None] > 0) & (columns[None, :] < C)
        tl.store(kept_ptr + places, highest, mask=stored)
        tl.store(kept_ptr + kept_size + places, gradients / ties, mask=stored)
        code = next_code(codes, relation_end)


@triton.jit(do_not_specialize=["groups", "total", "past", "future", "first", "last"])
def relation_bands_collect_kernel(
    features_ptr,
    kept_ptr,
    dx_ptr,
    order_ptr,
    position_ptr,
    start_ptr,
    table_ptr,
    feature_strides,
    kept_size,
    width,
    groups,
    total,
    past,
    future,
    first,
    last,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add to dx, (source, width), what comes back through maxima; the first relation sets it."""
    group, first_row, row_end = tile_rows(start_ptr, tl.program_id(0), groups, BLOCK_M)
    if first_row >= row_end:
        return
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < width
    rows = first_row + tl.arange(0, BLOCK_M)
    owned = rows < row_end
    stored = owned[:, None] & inside[None, :]
    positions = tl.load(position_ptr + rows, mask=owned, other=0)
    node = tl.load(order_ptr + rows, mask=owned, other=0).to(tl.int64)
    first_position = tl.load(position_ptr + first_row)
    last_position = tl.load(position_ptr + row_end - 1)
    codes, begins, ends = heard_pairs(
        table_ptr, start_ptr, position_ptr, group, first_position, last_position, past, future,
        KEYS, PAIRS, BLOCK_N, True,
    )  # fmt: skip
    places = node[:, None] * feature_strides[0] + columns[None, :] * feature_strides[1]
    features = tl.load(features_ptr + places, mask=stored, other=0.0).to(tl.float32)
    dx_ptr += node[:, None] * width + columns[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if first > 0:
        sums = tl.load(dx_ptr, mask=stored, other=0.0)

    code = next_code(codes, tl.cast(first, tl.int64) * PAIRS)
    while code < (tl.cast(last, tl.int64) + 1) * PAIRS:
        begin, end = pair_rows(codes, code, begins, ends)
        low, high = band_limits(code % PAIRS % 3, past, future, True)
        of_relation = (code // PAIRS - first) * total
        for target in tl.range(begin, end):
            gap = tl.load(position_ptr + target) - positions
            heard = (gap >= low) & (gap <= high)
            kept_places = (of_relation + tl.load(order_ptr + target)) * width + columns[None, :]
            passed = passed_on(features, kept_ptr, kept_size, kept_places, inside[None, :])
            sums += tl.where(heard[:, None], passed, 0.0)
        code = next_code(codes, code + 1)
    tl.store(dx_ptr, sums, mask=stored)
