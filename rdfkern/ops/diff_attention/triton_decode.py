"""Forward of a few queries over many keys: keys are split among programs, then combined.

All query heads of a group and all their queries share one tile, so that keys and values are read
once. Each part of the keys gives its own softmax; lam, alpha and the norm come in when all are
together. No dropout, and nothing is saved for a backward pass.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..._backends.triton_device import architecture, processors
from ..._backends.triton_utils import Launch, load_tile, online_softmax, visible_tiles
from . import config
from .triton_arguments import Problem, padded_width
from .triton_combine import combine_launch
from .triton_tiles import head_start, mask_scores, sequence_rows


@triton.jit(do_not_specialize=["len_q", "len_k", "left", "right", "splits", "rows_total"])
def diff_attn_split_kernel(
    q1_ptr,
    k1_ptr,
    q2_ptr,
    k2_ptr,
    v_ptr,
    mask_ptr,
    padding_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    parts_ptr,
    part_lse_ptr,
    q1_strides,
    k1_strides,
    q2_strides,
    k2_strides,
    v_strides,
    v_part_stride,
    mask_strides,
    padding_stride,
    row_strides,
    heads,
    group,
    len_q,
    len_k,
    left,
    right,
    splits,
    rows_total,
    scale_log2: tl.float32,
    D: tl.constexpr,
    DV: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of A1 V and A2 V over one part of the keys, and the logarithms of their normalisers."""
    blocks = tl.cdiv(group * len_q, BLOCK_M)
    start_m = tl.program_id(0) % blocks * BLOCK_M
    kv_heads = heads // group
    sequence = tl.program_id(0) // blocks // kv_heads
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    split = tl.program_id(1)
    row_start, len_q = sequence_rows(cu_seqlens_q_ptr, sequence, len_q)
    key_start, len_k = sequence_rows(cu_seqlens_k_ptr, sequence, len_k)
    if start_m >= group * len_q:
        return
    batch = (sequence if cu_seqlens_q_ptr is None else 0 * sequence).to(tl.int64)
    shift = len_k - len_q

    columns_d = tl.arange(0, BLOCK_D)
    columns_dv = tl.arange(0, BLOCK_DV)
    local_n = tl.arange(0, BLOCK_N)
    packed_rows = start_m + tl.arange(0, BLOCK_M)
    inside = packed_rows < group * len_q
    packed_rows = tl.minimum(packed_rows, group * len_q - 1)
    rows = packed_rows % len_q
    head = kv_head * group + packed_rows // len_q  # [BLOCK_M]
    places = row_start + rows
    q1_rows = head_start(q1_ptr, q1_strides, batch, head, places)
    q2_rows = head_start(q2_ptr, q2_strides, batch, head, places)
    in_width = columns_d[None, :] < D
    q1 = tl.load(q1_rows[:, None] + columns_d[None, :], mask=in_width, other=0.0)
    q2 = tl.load(q2_rows[:, None] + columns_d[None, :], mask=in_width, other=0.0)
    k1_base = head_start(k1_ptr, k1_strides, batch, kv_head, key_start)
    k2_base = head_start(k2_ptr, k2_strides, batch, kv_head, key_start)
    v_base = head_start(v_ptr, v_strides, batch, kv_head, key_start)
    if PART < DV:  # the way from where a column would be if parts lay side by side
        v_base += ((columns_dv // PART).to(tl.int64) * (v_part_stride - PART))[None, :]
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = (mask_ptr + batch * mask_strides[0] + head * mask_strides[1])[:, None]
    padding_base = padding_ptr
    if padding_ptr is not None:
        padding_base = padding_ptr + batch * padding_stride + key_start
    FACTORED: tl.constexpr = mask_ptr is None or mask_ptr.dtype.element_ty == tl.uint8
    factor = scale_log2 if FACTORED else 1.0
    MASKED: tl.constexpr = mask_ptr is not None or padding_ptr is not None

    peak1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    peak2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total1 = tl.zeros([BLOCK_M], tl.float32)
    total2 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    begin, full_begin, full_end, end = visible_tiles(
        0, len_q - 1, shift, left, right, HAS_LEFT, HAS_RIGHT, len_k, BLOCK_N
    )
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    first = begin + split * share
    for start_n in tl.range(first, tl.minimum(first + share, end), BLOCK_N):
        columns = start_n + local_n
        edge = start_n < full_begin or start_n >= full_end
        k1 = load_tile(k1_base, k1_strides[2], columns, len_k, columns_d, D)
        k2 = load_tile(k2_base, k2_strides[2], columns, len_k, columns_d, D)
        scores1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        scores2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        if edge or MASKED:
            scores1 = mask_scores(
                scores1, rows[:, None], columns[None, :], shift, len_q, len_k, left, right,
                scale_log2, mask_base, mask_strides, padding_base, HAS_LEFT, HAS_RIGHT, True,
            )  # fmt: skip
            scores2 = mask_scores(
                scores2, rows[:, None], columns[None, :], shift, len_q, len_k, left, right,
                scale_log2, mask_base, mask_strides, padding_base, HAS_LEFT, HAS_RIGHT, True,
            )  # fmt: skip
        v = load_tile(v_base, v_strides[2], columns, len_k, columns_dv, DV)
        weights1, decay1, peak1, total1 = online_softmax(scores1, factor, peak1, total1)
        weights2, decay2, peak2, total2 = online_softmax(scores2, factor, peak2, total2)
        acc1 = tl.dot(weights1.to(v.dtype), v, acc1 * decay1[:, None], input_precision=PRECISION)
        acc2 = tl.dot(weights2.to(v.dtype), v, acc2 * decay2[:, None], input_precision=PRECISION)

    per_row = batch * row_strides[0] + head * row_strides[1] + places
    first_map = split.to(tl.int64) * rows_total + per_row
    second_map = first_map + splits.to(tl.int64) * rows_total
    inverse1 = tl.where(total1 > 0.0, 1.0 / total1, 0.0)
    inverse2 = tl.where(total2 > 0.0, 1.0 / total2, 0.0)
    tl.store(part_lse_ptr + first_map, peak1 + tl.math.log2(total1), mask=inside)
    tl.store(part_lse_ptr + second_map, peak2 + tl.math.log2(total2), mask=inside)
    kept = inside[:, None] & (columns_dv[None, :] < DV)
    parts1 = parts_ptr + first_map[:, None] * DV + columns_dv[None, :]
    parts2 = parts_ptr + second_map[:, None] * DV + columns_dv[None, :]
    tl.store(parts1, acc1 * inverse1[:, None], mask=kept)
    tl.store(parts2, acc2 * inverse2[:, None], mask=kept)


def decodes(problem: Problem) -> bool:
    """Whether these queries are so few and their keys so many that splitting the keys pays."""
    rows = problem.heads // problem.kv_heads * problem.len_q
    few = rows <= config.MAX_DECODED_ROWS and problem.len_k >= config.MIN_SPLIT_KEYS
    return few and problem.maps == 2 and problem.dropout_p == 0.0


def decode(
    problem: Problem,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse` of a problem without dropout."""
    device = problem.q1.device
    widths = (padded_width(problem.head_dim), padded_width(problem.value_dim))
    tiles = config.tiles("split", *widths, problem.q1.dtype, architecture(device))
    rows = problem.heads // problem.kv_heads * problem.len_q
    if rows > tiles.block_m:
        tiles = replace(tiles, block_m=2 * tiles.block_m, num_warps=2 * tiles.num_warps)
    programs = problem.sequences * problem.kv_heads * triton.cdiv(rows, tiles.block_m)
    splits = config.splits(programs, problem.len_k, processors(device))
    shape = (2, splits, *problem.rows)
    parts = lse.new_empty(*shape, problem.value_dim)
    part_lse = lse.new_empty(shape)
    split_launch(problem, parts, part_lse, tiles).run(device)
    combine_launch(
        problem, parts, part_lse, norm_weight, norm_eps, out_scale, out, lse
    ).run(device)  # fmt: skip


def split_launch(problem: Problem, parts: Tensor, part_lse: Tensor, tiles: config.Tiles) -> Launch:
    """The launch that fills `parts` (2, splits, B, H, Lq, Dv) and `part_lse`, the same less Dv."""
    group, splits = problem.heads // problem.kv_heads, parts.shape[1]
    programs = problem.sequences * problem.kv_heads
    arguments = problem.kernel_arguments(tiles)
    for name in ("seed", "dropout_p", "MAPS", "HAS_DROPOUT"):
        del arguments[name]
    return Launch(
        diff_attn_split_kernel,
        lambda meta: (programs * triton.cdiv(group * problem.len_q, meta["BLOCK_M"]), splits),
        {
            **arguments,
            "v_part_stride": problem.v.stride(3) if problem.v.dim() == 5 else 0,
            "PART": problem.v.shape[-1],
            "parts_ptr": parts,
            "part_lse_ptr": part_lse,
            "row_strides": part_lse.stride()[2:4],
            "splits": splits,
            "rows_total": part_lse.stride(1),
        },
    )
