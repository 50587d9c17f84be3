"""Device functions that the kernels of relation attention share; see windows.py for the ranges.

Arguments that belong to targets and sources broadcast to a tile of pairs, whichever its rows are.
"""

import triton
import triton.language as tl

from ..._backends.triton_utils import LOG2E

# Where tiles of sources begin: a multiple of what one draw of dropout serves, and of vectors.
ALIGNMENT = tl.constexpr(16)
NO_RELATION = tl.constexpr(0x7FFFFFFF)


@triton.jit
def nodes_of(order_ptr, rows):
    """The nodes that stand at these rows, int64; without an order, the rows themselves."""
    return rows.to(tl.int64) if order_ptr is None else tl.load(order_ptr + rows)


@triton.jit
def target_ranges(ranges_ptr, rows, inside, total):
    """first, end, same_first, same_end of target rows; those not inside hear nothing."""
    length = tl.cast(total, tl.int64)
    first = tl.load(ranges_ptr + rows, mask=inside, other=0)
    end = tl.load(ranges_ptr + length + rows, mask=inside, other=0)
    same_first = tl.load(ranges_ptr + 4 * length + rows, mask=inside, other=0)
    same_end = tl.load(ranges_ptr + 5 * length + rows, mask=inside, other=0)
    return first, end, same_first, same_end


@triton.jit
def load_nodes(base, stride, nodes, columns, COLUMNS: tl.constexpr):
    """Rows of these nodes of a matrix whose rows are dense; zeros from column COLUMNS on."""
    pointers = base + nodes[:, None] * stride + columns[None, :]
    if columns.shape[0] == COLUMNS:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=columns[None, :] < COLUMNS, other=0.0)
    return tile


@triton.jit
def store_nodes(base, stride, nodes, inside, columns, COLUMNS: tl.constexpr, values):
    """Store rows of these nodes, as the matrix's dtype, where inside and below COLUMNS."""
    tl.store(
        base + nodes[:, None] * stride + columns[None, :],
        values.to(base.dtype.element_ty),
        mask=inside[:, None] & (columns[None, :] < COLUMNS),
    )


@triton.jit
def load_logits(pointer, strides, nodes, head):
    """What these nodes add to the logits of a head, float32."""
    return tl.load(pointer + nodes * strides[0] + head * strides[1]).to(tl.float32)


@triton.jit
def relations_heard(
    table_ptr, keys, target_key, source_key, first, end, same_first, same_end, sources
):
    """The relation of every pair, -1 where the target does not hear the source."""
    visible = (sources >= first) & (sources < end)
    direction = (sources >= same_first).to(tl.int32) + (sources >= same_end).to(tl.int32)
    entries = (target_key * keys + source_key) * 3 + direction
    return tl.load(table_ptr + entries, mask=visible, other=-1)


@triton.jit
def pair_logits(
    relation,
    rel_base,
    rel_stride,
    products,
    target_logits,
    source_logits,
    scale,
    negative_slope,
    IS_DOT: tl.constexpr,
):
    """Logits of pairs, -inf where nothing is heard, and which slope the LeakyReLU has there.

    In the dot form of the `products` of queries and keys, else of the parts of either side.
    """
    heard = relation >= 0
    of_relation = tl.load(rel_base + relation.to(tl.int64) * rel_stride, mask=heard, other=0.0)
    if IS_DOT:
        logits = products * scale + of_relation.to(tl.float32)
        rises = heard
    else:
        logits = target_logits + source_logits + of_relation.to(tl.float32)
        rises = logits > 0.0
        logits = tl.where(rises, logits, logits * negative_slope)
    return tl.where(heard, logits, float("-inf")), rises


@triton.jit
def sources_heard(
    sources,
    total,
    order_ptr,
    key_ptr,
    table_ptr,
    keys,
    target_key,
    first,
    end,
    same_first,
    same_end,
    own,
    src_ptr,
    src_strides,
    rel_ptr,
    rel_stride,
    head,
    columns_d,
    scale,
    negative_slope,
    D: tl.constexpr,
    IS_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of source rows against targets, whose queries or own parts of the logits `own` is.

    Returns the sources' nodes and keys (0 in the additive form); relations, logits and where those
    rise [BLOCK_M, BLOCK_N]. src is that of the head in the dot form, rel in both.
    """
    rows = tl.minimum(sources, total - 1)
    nodes = nodes_of(order_ptr, rows)
    source_key = tl.load(key_ptr + rows)[None, :]
    relation = relations_heard(
        table_ptr, keys, target_key[:, None], source_key,
        first[:, None], end[:, None], same_first[:, None], same_end[:, None], sources[None, :],
    )  # fmt: skip
    source_tile = 0.0
    if IS_DOT:
        source_tile = load_nodes(src_ptr, src_strides[0], nodes, columns_d, D)
        products = tl.dot(own, tl.trans(source_tile), input_precision=PRECISION)
        logits, rises = pair_logits(
            relation, rel_ptr, rel_stride, products, 0.0, 0.0, scale, negative_slope, IS_DOT
        )
    else:
        others = load_logits(src_ptr, src_strides, nodes, head)[None, :]
        logits, rises = pair_logits(
            relation, rel_ptr, rel_stride, 0.0, own[:, None], others, scale, negative_slope, IS_DOT
        )
    return nodes, source_tile, relation, logits, rises


@triton.jit
def store_softmax(places, size, inside, peak, sums):
    """Store what the softmax of these rows is made of again, at places in two tensors of `size`
    elements: the weight of a logit is exp2(logit in base 2 - exponent) times a factor.

    The sum is no part of the exponent, whose rounding would be an error of every weight. Rows
    without any weight have an infinite exponent.
    """
    dead = sums == 0.0
    tl.store(places, tl.where(dead, float("inf"), peak), mask=inside)
    tl.store(places + size, tl.where(dead, 0.0, 1.0 / sums), mask=inside)


@triton.jit
def load_softmax(places, size):
    """Exponents and factors as `store_softmax` left them."""
    return tl.load(places), tl.load(places + size)


@triton.jit
def softmax_of_pairs(softmax_ptr, size, places, relation):
    """Exponent, factor and D of the softmax that each pair is part of, from three tensors of `size`
    elements, the relations of a target at its place."""
    heard = relation >= 0
    places = softmax_ptr + places + relation
    exponent = tl.load(places, mask=heard, other=0.0)
    factor = tl.load(places + size, mask=heard, other=0.0)
    delta = tl.load(places + 2 * size, mask=heard, other=0.0)
    return exponent, factor, delta


@triton.jit
def pair_gradients(
    logits,
    rises,
    value_grads,
    exponent,
    factor,
    delta,
    keep,
    inverse_kept,
    negative_slope,
    IS_DOT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """Weights after dropout, and the gradients of the logits before the LeakyReLU."""
    weights = tl.math.exp2(logits * LOG2E - exponent) * factor
    kept = weights
    if HAS_DROPOUT:
        kept = tl.where(keep, weights * inverse_kept, 0.0)
        value_grads = tl.where(keep, value_grads * inverse_kept, 0.0)
    slopes = weights * (value_grads - delta)
    if not IS_DOT:
        slopes = tl.where(rises, slopes, slopes * negative_slope)
    return kept, slopes


@triton.jit
def kept_pairs(seed, threshold, head, targets, first_source, SOURCES: tl.constexpr):
    """Which weights of targets [M] and SOURCES sources, the first a multiple of 4, are kept.

    A function of the seed, the head and the rows of both alone, the same as on the CPU: each draw
    of four words serves four sources.
    """
    fours = first_source // 4 + tl.arange(0, SOURCES // 4)
    zero = targets[:, None] * 0 + fours[None, :] * 0
    word0, word1, word2, word3 = tl.philox(
        seed, zero + targets[:, None], zero + fours[None, :], zero + head.to(tl.int32), zero
    )
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return words >= threshold.to(tl.uint32)  # [M, SOURCES]


@triton.jit
def add_by_relation(
    sums,
    slopes,
    relation,
    first_relation,
    FEW: tl.constexpr,
    RELATIONS: tl.constexpr,
):
    """Add the slopes of every relation from first_relation on to its column of `sums`.

    With FEW relations, row by row: sums is [BLOCK_M, RELATIONS]. Else only the relations that occur
    are visited, and sums is [1, RELATIONS].
    """
    columns = tl.arange(0, RELATIONS)[None, :]
    if FEW > 0:
        for r in tl.static_range(FEW):
            share = tl.sum(tl.where(relation == r, slopes, 0.0), 1)
            sums += tl.where(columns == r, share[:, None], 0.0)
    else:
        relation -= first_relation
        relation = tl.where((relation >= 0) & (relation < RELATIONS), relation, NO_RELATION)
        r = tl.min(relation)
        while r < RELATIONS:
            share = tl.sum(tl.where(relation == r, slopes, 0.0))
            sums += tl.where(columns == r, share, 0.0)
            r = tl.min(tl.where(relation > r, relation, NO_RELATION))
    return sums
