"""Device functions of relation_conv's kernels on implicit graphs: tiles of rows, what they hear.

A tile is a run of sorted rows of one group, that is, of one dialogue and key. What it hears comes
in pairs (key of the others, direction), numbered key * 3 + direction; each is a band of one group.
A view is `TRANSPOSED` where the rows are sources and the others their targets (see bands.py). Lists
of edges share `add_product`.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(1 << 62)
PROBES = tl.constexpr(128)


@triton.jit
def tile_rows(start_ptr, tile, groups, BLOCK_M: tl.constexpr):
    """Group, first row and end of a tile; no rows where the tile has none.

    The tiles of group g are numbered from start[g] // BLOCK_M + g on. There are always at least as
    many numbers up to those of group g + 1 as g has tiles, so that the host need not count them:
    N // BLOCK_M + groups numbers are enough.
    """
    group = 0
    candidates = groups
    while candidates > 1:
        step = tl.cdiv(candidates, PROBES)
        probes = group + tl.arange(0, PROBES) * step
        inside = probes < group + candidates
        first = tl.load(start_ptr + probes, mask=inside, other=0) // BLOCK_M + probes
        passed = tl.sum((inside & (first <= tile)).to(tl.int32)) - 1
        candidates = tl.minimum(step, candidates - passed * step)
        group += passed * step
    begin = tl.load(start_ptr + group)
    end = tl.load(start_ptr + group + 1)
    row = begin + (tile - group - begin // BLOCK_M) * BLOCK_M
    return group, row, tl.minimum(row + BLOCK_M, end)


@triton.jit
def band_limits(direction, past, future, TRANSPOSED: tl.constexpr):
    """The smallest and the largest position of others, relative to the row's own."""
    if TRANSPOSED:
        low = tl.where(direction == 0, 1, tl.where(direction == 1, 0, -future))
        high = tl.where(direction == 0, past, tl.where(direction == 1, 0, -1))
    else:
        low = tl.where(direction == 0, -past, tl.where(direction == 1, 0, 1))
        high = tl.where(direction == 0, -1, tl.where(direction == 1, 0, future))
    return low, high


@triton.jit
def first_row_from(position_ptr, begin, end, origin, limit):
    """The first of the rows begin..end, by element, whose position is at least origin + limit."""
    while tl.max(end - begin) > 0:
        middle = begin + (end - begin) // 2
        open_ = begin < end
        # A difference cannot overflow where a sum could.
        gap = tl.load(position_ptr + middle, mask=open_, other=0) - origin
        before = open_ & (gap < limit)
        end = tl.where(before, end, middle)
        begin = tl.where(before, middle + 1, begin)
    return begin


@triton.jit
def heard_pairs(
    table_ptr,
    start_ptr,
    position_ptr,
    group,
    first_position,
    last_position,
    past,
    future,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """What rows of a group at positions first..last hear, by pair.

    Returns codes, begins, ends [PAIRS]: relation * PAIRS + pair, or NONE where nothing is heard,
    and rows among which all that is heard of the pair lies.
    """
    pair = tl.arange(0, PAIRS)
    other = pair // 3
    exists = pair < 3 * KEYS
    key = group % KEYS
    entry = (other * KEYS + key) * 3 + pair % 3 if TRANSPOSED else key * 3 * KEYS + pair
    relation = tl.load(table_ptr + entry, mask=exists, other=-1)
    others = start_ptr + group - key + other
    begins = tl.load(others, mask=exists, other=0)
    ends = tl.load(others + 1, mask=exists, other=0)
    low, high = band_limits(pair % 3, past, future, TRANSPOSED)
    if tl.max(ends - begins) > BLOCK_N:
        all_begins = begins
        begins = first_row_from(position_ptr, begins, ends, first_position, low)
        ends = first_row_from(position_ptr, all_begins, ends, last_position, high + 1)
    heard = (relation >= 0) & (begins < ends) & (low <= high)
    codes = tl.where(heard, relation.to(tl.int64) * PAIRS + pair, NONE)
    return codes, begins, ends


@triton.jit
def next_code(codes, bound):
    """The smallest code from `bound` on, or NONE."""
    return tl.min(tl.where(codes >= bound, codes, NONE))


@triton.jit
def pair_rows(codes, code, begins, ends):
    """begins and ends of the pair with this code."""
    here = codes == code
    return tl.sum(tl.where(here, begins, 0)), tl.sum(tl.where(here, ends, 0))


@triton.jit
def in_band(positions, other_positions, inside, low, high):
    """Which others [BLOCK_N], where inside, each row [BLOCK_M] hears."""
    gap = other_positions[None, :] - positions[:, None]
    return inside[None, :] & (gap >= low) & (gap <= high)


@triton.jit
def share_slot(
    table_ptr,
    key,
    relation,
    KEYS: tl.constexpr,
    PAIRS: tl.constexpr,
    BY_RELATION: tl.constexpr,
):
    """Where the shares of a relation among what `key` hears stand: one of min(R, 3 K) slots."""
    slot = relation
    if not BY_RELATION:
        pair = tl.arange(0, PAIRS)
        heard = tl.load(table_ptr + key * 3 * KEYS + pair, mask=pair < 3 * KEYS, other=-1)
        slot = tl.min(tl.where(heard == relation, pair, PAIRS)).to(tl.int64)
    return slot


@triton.jit
def add_product(sums, a, b, zero, PRECISION: tl.constexpr):
    """sums + a · b. Float32 products are added up before they join the sums, which rounds less.

    `zero` is 0; were that known to the compiler, it would make one chain of all additions again.
    """
    if a.dtype == tl.float32:
        product = tl.full(sums.shape, zero, tl.float32)
        sums += tl.dot(a, b, product, input_precision=PRECISION)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def add_band(
    sums,
    counts,
    features_ptr,
    feature_strides,
    share_ptr,
    order_ptr,
    position_ptr,
    positions,
    begin,
    end,
    low,
    high,
    columns,
    column_end,
    zero,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to sums the features of the others that each row hears, times their shares if given."""
    for start in tl.range(begin, end, BLOCK_N):
        others = start + tl.arange(0, BLOCK_N)
        inside = others < end
        other_positions = tl.load(position_ptr + others, mask=inside, other=0)
        node = tl.load(order_ptr + others, mask=inside, other=0).to(tl.int64)
        band = in_band(positions, other_positions, inside, low, high)  # [BLOCK_M, BLOCK_N]
        places = node[:, None] * feature_strides[0] + columns[None, :] * feature_strides[1]
        seen = inside[:, None] & (columns[None, :] < column_end)
        features = tl.load(features_ptr + places, mask=seen, other=0.0)  # [BLOCK_N, BLOCK_C]
        if share_ptr is None:
            weights = tl.where(band, 1.0, 0.0)
        else:
            share = tl.load(share_ptr + others, mask=inside, other=0.0)
            weights = tl.where(band, share[None, :], 0.0)
        sums = add_product(sums, weights.to(features.dtype), features, zero, PRECISION)
        if COUNT:
            counts += tl.sum(band.to(tl.int32), 1)
    return sums, counts


@triton.jit
def larger(a, b):
    """The larger of two tiles; what is not a number stays."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def heard_features(
    other,
    features_ptr,
    feature_strides,
    order_ptr,
    position_ptr,
    positions,
    low,
    high,
    columns,
    column_end,
):
    """Features [1, BLOCK_C] of one other, and which rows hear it, [BLOCK_M, 1]."""
    gap = tl.load(position_ptr + other) - positions
    node = tl.load(order_ptr + other).to(tl.int64)
    places = node * feature_strides[0] + columns * feature_strides[1]
    features = tl.load(features_ptr + places, mask=columns < column_end, other=0.0)
    heard = (gap >= low) & (gap <= high)
    return features.to(tl.float32)[None, :], heard[:, None]


@triton.jit
def max_band(
    highest,
    counts,
    features_ptr,
    feature_strides,
    order_ptr,
    position_ptr,
    positions,
    begin,
    end,
    low,
    high,
    columns,
    column_end,
):
    """The elementwise maximum of highest and of what each row hears, and how much that is."""
    for other in tl.range(begin, end):
        features, heard = heard_features(
            other, features_ptr, feature_strides, order_ptr, position_ptr, positions, low, high,
            columns, column_end,
        )  # fmt: skip
        highest = tl.where(heard, larger(highest, features), highest)
        counts += tl.sum(heard.to(tl.int32), 1)
    return highest, counts
