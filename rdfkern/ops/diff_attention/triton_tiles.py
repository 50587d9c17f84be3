"""Device functions that the forward and backward kernels of differential attention share."""

import triton
import triton.language as tl

from ..._backends.triton_utils import HIDDEN, LOG2E, in_band

# Floats per query and head that the rows kernel hands on; a power of two, six are used.
ROW_VALUES = tl.constexpr(8)


@triton.jit
def sequence_rows(cu_seqlens_ptr, sequence, length):
    """First row of a sequence, int64, and its length; dense ones all start at row 0."""
    if cu_seqlens_ptr is None:
        start = tl.cast(0, tl.int64)
    else:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def head_start(pointer, strides, batch, head, row):
    """Where row `row` of a (batch, head) starts; `batch`, `head` and `row` are int64."""
    return pointer + batch * strides[0] + head * strides[1] + row * strides[2]


@triton.jit
def mask_scores(
    scores,
    rows,
    columns,
    shift,
    row_limit,
    column_limit,
    left,
    right,
    scale_log2,
    mask_base,
    mask_strides,
    padding_base,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Scores of one map with -inf for hidden keys; with a floating mask, scaled and biased.

    `rows` and `columns` hold the query's and the key's index and broadcast to the tile. Band and
    key limit matter where BOUNDED only.
    """
    if mask_base is not None:
        offsets = rows.to(tl.int64) * mask_strides[2] + columns.to(tl.int64) * mask_strides[3]
        inside = (rows < row_limit) & (columns < column_limit)
        entries = tl.load(mask_base + offsets, mask=inside, other=0)
        if mask_base.dtype.element_ty == tl.uint8:
            scores = tl.where(entries != 0, scores, float("-inf"))
        else:
            entries = entries.to(tl.float32)
            biased = scores * scale_log2 + entries * LOG2E
            scores = tl.where(entries > HIDDEN, biased, float("-inf"))
    if padding_base is not None:
        padded = tl.load(padding_base + columns, mask=columns < column_limit, other=1)
        scores = tl.where(padded != 0, float("-inf"), scores)
    if BOUNDED:
        visible = in_band(rows, columns, shift, left, right, HAS_LEFT, HAS_RIGHT, column_limit)
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def subtract_and_norm(
    out1,
    out2,
    alpha,
    lam,
    weight_ptr,
    columns,
    norm_eps,
    out_scale,
    DV: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Rows of alpha · O1 - lam · O2; with the norm, O / sqrt(mean(O²) + eps) · scale · weight.

    Without a second map, `out2` is None.
    """
    out = out1 * alpha[:, None]
    if out2 is not None:
        out -= out2 * lam[:, None]
    if HAS_NORM:
        inverse_rms = tl.math.rsqrt(tl.sum(out * out, 1) / DV + norm_eps) * out_scale
        out = out * inverse_rms[:, None]
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, mask=columns < DV, other=0.0)
            out = out * weight.to(tl.float32)[None, :]
    return out


@triton.jit
def map_gradients(weights, value_grads, coefficient, delta, keep, inverse_kept):
    """Weights after dropout, and the gradient of the scores.

    `coefficient` is alpha, or -lam for the second map, and delta is coefficient · rowsum(dO ∘ O_i),
    both times what the weights lack.
    """
    if keep is None:
        kept = weights
        products = weights * value_grads
    else:
        kept = tl.where(keep, weights * inverse_kept, 0.0)
        products = kept * value_grads
    return kept, coefficient * products - weights * delta


@triton.jit
def load_row_values(rows_ptr, rows, row_count):
    """What the rows kernel left of one map: exponents, deltas and coefficients.

    `rows_ptr` points at the first row's values of the first map, and one further of the second.
    Rows past `row_count` get exponents of infinity, and so weigh nothing.
    """
    inside = rows < row_count
    values = rows_ptr + tl.minimum(rows, row_count - 1).to(tl.int64) * ROW_VALUES
    exponent = tl.load(values, mask=inside, other=float("inf"))
    delta = tl.load(values + 2, mask=inside, other=0.0)
    coefficient = tl.load(values + 4, mask=inside, other=0.0)
    return exponent, delta, coefficient
