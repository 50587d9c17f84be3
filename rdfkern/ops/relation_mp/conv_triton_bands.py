"""out_i = addend_i + sum over r of (AGG over j heard as r of x_j) · W_r, on implicit graphs.

Neighbours are summed by tensor cores, as products with 0/1 bands made in registers, and what a
relation's sum makes of its weight follows at once: it never leaves the program. Seen from the
sources, with W_r transposed and the gradient's rows weighted by their shares, the same kernel
computes dx. A maximum goes through the neighbours of a tile one by one.

A band multiplies by 0 what stands near the rows that are heard without being heard itself. Where
that is not finite, it makes NaN of sums it has no part in, always within its own dialogue.
"""

import triton
import triton.language as tl

from .conv_triton_tiles import (
    NONE,
    add_band,
    add_product,
    band_limits,
    heard_pairs,
    in_band,
    max_band,
    next_code,
    pair_rows,
    share_slot,
    tile_rows,
)


@triton.jit(do_not_specialize=["groups", "total", "past", "future"])
def relation_bands_kernel(
    features_ptr,
    weight_ptr,
    addend_ptr,
    share_ptr,
    out_ptr,
    order_ptr,
    position_ptr,
    start_ptr,
    table_ptr,
    feature_strides,
    weight_strides,
    addend_strides,
    out_stride,
    groups,
    total,
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
    TRANSPOSED: tl.constexpr,
    BY_RELATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, first_row, row_end = tile_rows(start_ptr, tl.program_id(0), groups, BLOCK_M)
    if first_row >= row_end:
        return
    tiles_e = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(1) // tiles_e
    columns_e = tl.program_id(1) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    features_ptr += block * C * feature_strides[1]
    weight_ptr += block * weight_strides[1]

    rows = first_row + tl.arange(0, BLOCK_M)
    owned = rows < row_end
    positions = tl.load(position_ptr + rows, mask=owned, other=0)
    first_position = tl.load(position_ptr + first_row)
    last_position = tl.load(position_ptr + row_end - 1)
    codes, begins, ends = heard_pairs(
        table_ptr, start_ptr, position_ptr, group, first_position, last_position, past, future,
        KEYS, PAIRS, BLOCK_N, TRANSPOSED,
    )  # fmt: skip

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    code = tl.min(codes)
    while code < NONE:
        relation = code // PAIRS
        relation_end = (relation + 1) * PAIRS
        for start_c in tl.range(0, C, BLOCK_C, num_stages=1):
            columns = start_c + tl.arange(0, BLOCK_C)
            sums = tl.full([BLOCK_M, BLOCK_C], float("-inf") if MAX else 0.0, tl.float32)
            counts = tl.zeros([BLOCK_M], tl.int32)
            pair_code = code
            while pair_code < relation_end:
                pair = pair_code % PAIRS
                begin, end = pair_rows(codes, pair_code, begins, ends)
                low, high = band_limits(pair % 3, past, future, TRANSPOSED)
                shares = share_ptr
                if share_ptr is not None:
                    slot = share_slot(table_ptr, pair // 3, relation, KEYS, PAIRS, BY_RELATION)
                    shares = share_ptr + slot * total
                if MAX:
                    sums, counts = max_band(
                        sums, counts, features_ptr, feature_strides, order_ptr, position_ptr,
                        positions, begin, end, low, high, columns, C,
                    )  # fmt: skip
                else:
                    sums, counts = add_band(
                        sums, counts, features_ptr, feature_strides, shares, order_ptr,
                        position_ptr, positions, begin, end, low, high, columns, C, zero,
                        MEAN and not TRANSPOSED, BLOCK_N, PRECISION,
                    )  # fmt: skip
                pair_code = next_code(codes, pair_code + 1)
            if MEAN and not TRANSPOSED:
                sums = sums / tl.maximum(counts, 1)[:, None]
            if MAX:
                sums = tl.where(counts[:, None] > 0, sums, 0.0)
            places = columns[:, None] * weight_strides[2] + columns_e[None, :] * weight_strides[3]
            weight = tl.load(
                weight_ptr + relation * weight_strides[0] + places,
                mask=(columns[:, None] < C) & (columns_e[None, :] < E),
                other=0.0,
            )  # [BLOCK_C, BLOCK_E]
            dtype = features_ptr.dtype.element_ty
            acc = add_product(acc, sums.to(dtype), weight.to(dtype), zero, PRECISION)
        code = next_code(codes, relation_end)

    node = tl.load(order_ptr + rows, mask=owned, other=0).to(tl.int64)
    stored = owned[:, None] & (columns_e[None, :] < E)
    columns_e += block * E
    if addend_ptr is not None:
        places = node[:, None] * addend_strides[0] + columns_e[None, :] * addend_strides[1]
        acc += tl.load(addend_ptr + places, mask=stored, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + node[:, None] * out_stride + columns_e[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=stored,
    )


@triton.jit(do_not_specialize=["groups", "total", "past", "future"])
def relation_shares_kernel(
    share_ptr,
    position_ptr,
    start_ptr,
    table_ptr,
    groups,
    total,
    past,
    future,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_RELATION: tl.constexpr,
):
    """share[slot of r, i] = 1 / |N_r(i)|, where i hears r; the rest is left as it is."""
    group, first_row, row_end = tile_rows(start_ptr, tl.program_id(0), groups, BLOCK_M)
    if first_row >= row_end:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    owned = rows < row_end
    positions = tl.load(position_ptr + rows, mask=owned, other=0)
    first_position = tl.load(position_ptr + first_row)
    last_position = tl.load(position_ptr + row_end - 1)
    codes, begins, ends = heard_pairs(
        table_ptr, start_ptr, position_ptr, group, first_position, last_position, past, future,
        KEYS, PAIRS, BLOCK_N, False,
    )  # fmt: skip
    code = tl.min(codes)
    while code < NONE:
        relation = code // PAIRS
        relation_end = (relation + 1) * PAIRS
        counts = tl.zeros([BLOCK_M], tl.int32)
        while code < relation_end:
            begin, end = pair_rows(codes, code, begins, ends)
            low, high = band_limits(code % PAIRS % 3, past, future, False)
            for start in tl.range(begin, end, BLOCK_N):
                others = start + tl.arange(0, BLOCK_N)
                inside = others < end
                other_positions = tl.load(position_ptr + others, mask=inside, other=0)
                band = in_band(positions, other_positions, inside, low, high)
                counts += tl.sum(band.to(tl.int32), 1)
            code = next_code(codes, code + 1)
        slot = share_slot(table_ptr, group % KEYS, relation, KEYS, PAIRS, BY_RELATION)
        tl.store(share_ptr + slot * total + rows, 1.0 / tl.maximum(counts, 1), mask=owned)
