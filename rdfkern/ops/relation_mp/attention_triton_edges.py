"""Relation attention on lists of edges: forward, one program for each target and head.

A softmax is taken over runs of edges: all of a target's, or those of one relation at a time, which
stand together.
"""

import triton
import triton.language as tl

from ..._backends.triton_utils import LOG2E


@triton.jit
def load_row(base, columns, COLUMNS: tl.constexpr):
    """One dense row as float32, zeros from column COLUMNS on."""
    return tl.load(base + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def load_rows_of(base, stride, nodes, member, columns, COLUMNS: tl.constexpr):
    """Rows of these nodes as float32, zeros for edges that are no members."""
    inside = member[:, None] & (columns[None, :] < COLUMNS)
    rows = tl.load(base + nodes[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def edge_logits(
    edges,
    stop,
    source_ptr,
    relation_ptr,
    src_ptr,
    src_stride,
    rel_ptr,
    rel_stride,
    own,
    columns_d,
    scale,
    negative_slope,
    D: tl.constexpr,
    IS_DOT: tl.constexpr,
):
    """Of edges below `stop`: sources, their keys if any, logits, where those rise; -inf for others.

    `own` is the target's query or what it adds to the logits; src and rel are those of the head.
    """
    member = edges < stop
    source = tl.load(source_ptr + edges, mask=member, other=0).to(tl.int64)
    relation = tl.load(relation_ptr + edges, mask=member, other=0).to(tl.int64)
    logits = tl.load(rel_ptr + relation * rel_stride, mask=member, other=0.0).to(tl.float32)
    source_keys = 0.0
    rises = member
    if IS_DOT:
        source_keys = load_rows_of(src_ptr, src_stride, source, member, columns_d, D)
        logits += tl.sum(own[None, :] * source_keys, 1) * scale
    else:
        logits += own + tl.load(src_ptr + source * src_stride, mask=member, other=0.0)
        rises = logits > 0.0
        logits = tl.where(rises, logits, logits * negative_slope)
    return source, source_keys, tl.where(member, logits, float("-inf")), rises


@triton.jit
def edge_softmax(logits, peak, total):
    """One step of the streaming softmax in base 2: weights, decay, new peak and total."""
    new_peak = tl.maximum(peak, tl.max(logits) * LOG2E)
    finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.math.exp2(logits * LOG2E - finite_peak)
    decay = tl.math.exp2(peak - finite_peak)
    return weights, decay, new_peak, total * decay + tl.sum(weights)


@triton.jit
def kept_edges(seed, threshold, head, numbers):
    """Which weights of the edges of these numbers are kept, the same as on the CPU."""
    numbers = numbers.to(tl.int64)
    low = (numbers & 0xFFFFFFFF).to(tl.uint32)
    high = (numbers >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero + head.to(tl.uint32), zero + 1)
    return word >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["heads", "seed", "threshold"])
def relation_attn_edges_fwd_kernel(
    value_ptr,
    dst_ptr,
    src_ptr,
    rel_ptr,
    start_ptr,
    source_ptr,
    relation_ptr,
    edge_ptr,
    count_ptr,
    out_ptr,
    value_strides,
    dst_strides,
    src_strides,
    rel_strides,
    heads,
    seed: tl.int64,
    threshold: tl.int64,
    scale: tl.float32,
    negative_slope: tl.float32,
    inverse_kept: tl.float32,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    IS_DOT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WITHIN: tl.constexpr,
):
    target = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    local = tl.arange(0, BLOCK_E)
    columns_d = tl.arange(0, BLOCK_D)
    columns_c = tl.arange(0, BLOCK_C)
    value_ptr += head * value_strides[1]
    src_ptr += head * src_strides[1]
    rel_ptr += head * rel_strides[1]
    dst_ptr += target * dst_strides[0] + head * dst_strides[1]
    own = load_row(dst_ptr, columns_d, D) if IS_DOT else tl.load(dst_ptr).to(tl.float32)

    at = tl.load(start_ptr + target)
    stop = tl.load(start_ptr + target + 1)
    out = tl.zeros([BLOCK_C], tl.float32)
    while at < stop:
        run_end = at + tl.load(count_ptr + at) if WITHIN else stop
        peak = float("-inf")
        total = 0.0
        acc = tl.zeros([BLOCK_C], tl.float32)
        for first in tl.range(at, run_end, BLOCK_E):
            edges = first + local
            source, _, logits, _ = edge_logits(
                edges, run_end, source_ptr, relation_ptr, src_ptr, src_strides[0], rel_ptr,
                rel_strides[0], own, columns_d, scale, negative_slope, D, IS_DOT,
            )  # fmt: skip
            weights, decay, peak, total = edge_softmax(logits, peak, total)
            member = edges < run_end
            if HAS_DROPOUT:
                numbers = tl.load(edge_ptr + edges, mask=member, other=0)
                weights = tl.where(kept_edges(seed, threshold, head, numbers), weights, 0.0)
            values = load_rows_of(value_ptr, value_strides[0], source, member, columns_c, C)
            acc = acc * decay + tl.sum(weights[:, None] * values, 0)
        out += acc * tl.where(total == 0.0, 0.0, inverse_kept / total)
        at = run_end

    row = target * heads + head
    tl.store(out_ptr + row * C + columns_c, out.to(out_ptr.dtype.element_ty), mask=columns_c < C)
