"""Faults planted in Triton kernels and in the values of the temporal form: tests catch each."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

FOLDER = "ops/diff_attention/"
UTILS = "_backends/triton_utils.py"
TILES = FOLDER + "triton_tiles.py"
FORWARD = FOLDER + "triton_fwd.py"
ROWS = FOLDER + "triton_bwd_rows.py"
KEYS = FOLDER + "triton_bwd_kv.py"
QUERIES = FOLDER + "triton_bwd_q.py"
DECODE = FOLDER + "triton_decode.py"
COMBINE = FOLDER + "triton_combine.py"
TEMPORAL = FOLDER + "temporal_values.py"

# File, what it says, what it says with the fault, and which tests have to fail.
MUTANTS = {
    "causal off by one": (UTILS, "rows + shift + after", "rows + shift + after + 1", "causal"),
    "window off by one": (UTILS, "rows + shift - before", "rows + shift - before + 1", "window"),
    "tile taken as seen whole": (
        UTILS,
        "full_end = tl.maximum(full_end // BLOCK",
        "full_end = tl.maximum(tl.cdiv(full_end, BLOCK)",
        "causal",
    ),
    "last tile skipped": (
        UTILS,
        "end = tl.cdiv(end, BLOCK) * BLOCK",
        "end = end // BLOCK * BLOCK",
        "plain",
    ),
    "first tile skipped": (
        UTILS,
        "begin = begin // BLOCK",
        "begin = tl.cdiv(begin, BLOCK)",
        "left",
    ),
    "keys beyond the end": (UTILS, "visible = columns < limit", "visible = columns >= 0", "plain"),
    "totals not rescaled": (UTILS, "total * decay + tl", "total + tl", "plain"),
    "accumulator not rescaled": (FORWARD, "acc2 * decay2[:, None]", "acc2", "plain"),
    "one mask for both maps": (
        UTILS,
        "uint_to_uniform_float(second)",
        "uint_to_uniform_float(first)",
        "dropout",
    ),
    "dropped weights not scaled up": (
        TILES,
        "weights * inverse_kept, 0.0",
        "weights, 0.0",
        "dropout",
    ),
    "dead rows not a number": (
        ROWS,
        "tl.where(alive, lse * LOG2E, 0.0)",
        "lse * LOG2E",
        "causal",
    ),
    "norm without epsilon": (TILES, "/ DV + norm_eps", "/ DV", "causal"),
    "norm's mean left out": (ROWS, "scaled - normed * mean[:, None]", "scaled", "norm"),
    "norm's gradient of dead rows": (
        ROWS,
        "exact = tl.where(alive[:, None], grad.to(tl.float32), 0.0)",
        "exact = grad.to(tl.float32)",
        "overflows",
    ),
    "sign of lam": (ROWS, "dlam_ptr + per_row, -tl.sum", "dlam_ptr + per_row, tl.sum", "plain"),
    "delta of the other map": (
        ROWS,
        "lse2, -lam, tl.sum(rounded * out2, 1)",
        "lse2, -lam, tl.sum(rounded * out1, 1)",
        "plain",
    ),
    "first map's keys in dq2": (
        KEYS,
        "dq2 = tl.dot(score_grads2, k2",
        "dq2 = tl.dot(score_grads2, k1",
        "plain",
    ),
    "value gradient of one map": (
        KEYS,
        "(combined + coefficient2[:, None] * kept2)",
        "combined",
        "plain",
    ),
    "group's last head only": (KEYS, "tl.range(0, group)", "tl.range(group - 1, group)", "groups"),
    "edge unmasked going back": (
        KEYS,
        "edge = start_m < full_begin",
        "edge = start_m < 0",
        "causal",
    ),
    "scale left out": (QUERIES, "dq1 * query_scale", "dq1", "two"),
    "sequence's rows ignored": (
        TILES,
        "(tl.load(cu_seqlens_ptr + sequence + 1) - start)",
        "(tl.load(cu_seqlens_ptr + sequence + 1) - 0 * start)",
        "packed",
    ),
    "floating mask in the wrong base": (TILES, "entries * LOG2E", "entries", "floating"),
    "padding let through": (TILES, "padded != 0", "padded > 1", "padding"),
    "maps saved in the wrong order": (
        FORWARD,
        "for rows in (o1, o2))",
        "for rows in (o2, o1))",
        "plain",
    ),
    "one map: its deltas and coefficients exchanged": (
        KEYS,
        "exponent1, delta1, coefficient1 = load",
        "exponent1, coefficient1, delta1 = load",
        "temporal and value",
    ),
    "one map: no gradient of the values": (
        KEYS,
        "combined.to(grad.dtype), dv_t",
        "combined.to(grad.dtype) * 0.0, dv_t",
        "temporal and value",
    ),
    "temporal: the last step is followed by the next dialogue": (
        TEMPORAL,
        "rank < counted[end]",
        "rank <= counted[end]",
        "loops and some and torch",
    ),
    "temporal: lam added": (TEMPORAL, "following, value=-1", "following, value=1", "loops"),
    "decode: heads of a group mixed up": (
        DECODE,
        "kv_head * group + packed_rows // len_q",
        "kv_head * group + packed_rows % group",
        "grouped",
    ),
    "decode: parts overlap": (DECODE, "begin + split * share", "begin + split", "one"),
    "decode: last tile of a part skipped": (
        DECODE,
        "first + share, end",
        "first + share - BLOCK_N, end",
        "one",
    ),
    "decode: normaliser without its peak": (
        DECODE,
        "peak2 + tl.math.log2(total2)",
        "tl.math.log2(total2)",
        "one",
    ),
    "decode: parts weighed alike": (COMBINE, "share[:, None] * values", "values", "one"),
    "decode: one part's rows for all": (COMBINE, "row += rows_total", "row += 0", "one"),
    "decode: maps exchanged": (COMBINE, "out1, out2, alpha", "out2, out1, alpha", "one"),
}


# One of them always, so that a run that tests something else than its fault is noticed early.
ONE = next(iter(MUTANTS))


@pytest.mark.parametrize(
    "mutant",
    [ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS if name != ONE)],
)
def test_fault_is_caught(mutant, catches):
    path, text, fault, tests = MUTANTS[mutant]
    suites = {DECODE: "diff_attention_decode", COMBINE: "diff_attention_decode"}
    suites[TEMPORAL] = "temporal_diff_attention"
    catches(path, text, fault, f"test_{suites.get(path, 'diff_attention_triton')}.py", tests)


def test_without_a_fault_the_same_tests_pass(run_with_fault):
    path, text, _, tests = MUTANTS[ONE]
    run = run_with_fault(path, text, text, "test_diff_attention_triton.py", tests)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
