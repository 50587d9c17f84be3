"""Faults planted in the CUDA kernels of differential attention: the emulated tests notice each."""

import pytest

TESTS = "tests/ops/test_diff_attention_cuda.py"
SANITIZED = (
    "test_error_budget[one key-dtype0]",
    "test_error_budget[odd widths-dtype2]",
    "test_strided_views_without_unit_strides_too[dtype1]",
    "test_packed_sequences[options2-dtype0]",
    *(
        f"test_rows_of_which_four_elements_cannot_be_read_at_once[{case}-dtype{at}]"
        for at, case in enumerate(("start", "row stride"))
    ),
    "test_error_budget[bias and all masks-dtype1]",
    "test_every_schedule_gives_the_same_bits[eager warps-1]",
)
CASES = (
    "grouped",
    "causal, more keys",
    "window",
    "padding, dead sequence",
    "bias with a dead row",
    "negative scale",
    "norm without weight",
    "many keys",
)
SELECTED = (
    *SANITIZED,
    *(f"test_error_budget[{case}-dtype0]" for case in CASES),
    *(f"test_error_budget[{case}-dtype{at}]" for case in CASES[:5] for at in (1, 2)),
    "test_rows_of_which_four_elements_cannot_be_read_at_once[width-dtype1]",
    "test_what_is_not_a_number_stays[dtype1]",
    "test_every_schedule_gives_the_same_bits[reverse-0]",
    "test_every_schedule_gives_the_same_bits[eager warps-2]",
    "test_every_schedule_gives_the_same_bits[random-1]",
    "test_dropout_is_that_of_the_cpu_kernels[20]",
)
BWD, FWD = "diff_attention_bwd.cuh", "diff_attention_fwd.cuh"
SHARED, TERMS = "diff_attention.cuh", "diff_attention_terms.cuh"
TILES, FRAGMENTS, ROWS = "tiles.cuh", "fragments.cuh", "rows.cuh"

BARRIERS = {
    "before pieces are loaded": (
        TILES,
        "__syncthreads();\n    load<kColumns>(rows",
        "load<kColumns>(rows",
    ),
    "after pieces are loaded": (
        TILES,
        "stage.pieces.columns);\n    __syncthreads();",
        "stage.pieces.columns);",
    ),
    "after a tile": (TILES, "tile[i][j] = sum; });\n  __syncthreads();", "tile[i][j] = sum; });"),
    "before whole rows are loaded": (
        TILES,
        "static_assert(WIDTH <= STAGE_WIDTH);\n  __syncthreads();",
        "",
    ),
    "after whole rows are loaded": (
        TILES,
        "stage.whole);\n  __syncthreads();",
        "stage.whole);",
    ),
    "before gradients are staged": (
        TILES,
        "__syncthreads();\n    stage_rows",
        "stage_rows",
    ),
    "after gradients are staged": (
        TILES,
        "0, stage);\n    __syncthreads();",
        "0, stage);",
    ),
    "before products are staged": (
        FWD,
        "i < ROWS / kSide; ++i) {\n    __syncthreads();",
        "i < ROWS / kSide; ++i) {",
    ),
    "after products are staged": (
        FWD,
        "memory.stage);\n    __syncthreads();\n    const int query",
        "memory.stage);\n    const int query",
    ),
    "before the partial sums of warps": (
        TERMS,
        "__syncthreads();\n  if (!gradients.norm_partials)",
        "if (!gradients.norm_partials)",
    ),
}
OUT_OF_BOUNDS = {
    "rows behind the last one are read": (
        "rows.cuh",
        "if (row >= count || column >= width) return 0.0f;",
        "if (column >= width) return 0.0f;",
    ),
    "columns behind the last one are read": (
        "rows.cuh",
        "if (row >= count || column >= width) return 0.0f;",
        "if (row >= count) return 0.0f;",
    ),
    "four columns of rows behind the last one are read": (
        TILES,
        "if (row < strip.count && column < width) values",
        "if (column < width) values",
    ),
    "four columns behind the last one are read": (
        TILES,
        "if (row < strip.count && column < width) values",
        "if (row < strip.count) values",
    ),
    "rows behind the last one are written": (TILES, "if (row >= target.count) continue;", ""),
    "terms of rows that are not there": (
        BWD,
        "if (query >= place.sequence.queries) continue;",
        "",
    ),
}
MISALIGNED = {
    "rows that begin anywhere are read by fours": (
        ROWS,
        "reinterpret_cast<uintptr_t>(start) % (4 * size) == 0 && rows",
        "rows",
    ),
    "rows at any distance are read by fours": (ROWS, "rows.row_stride % 4 == 0 &&", ""),
}
WRONG = {
    "widths that are no multiple of 4 are read by fours": (
        ROWS,
        "&&\n           width % 4 == 0;",
        ";",
    ),
    "the second and third element of a fragment swapped": (
        FRAGMENTS,
        "group + i % 2 * 8, k + place + i / 2 * 4",
        "group + i / 2 * 8, k + place + i % 2 * 4",
    ),
    "only half of the terms on tensor cores": (
        FRAGMENTS,
        "right(k + place + 4, 8 * n + group)",
        "0",
    ),
    "what tensor cores cut off is lost": (TILES, "if (wide_rows || wide_columns)", "if (false)"),
    "what is not a number rounded to 0": (FRAGMENTS, "return value == value ?", "return true ?"),
    "columns of another warp": (FRAGMENTS, "% kAcross * kFragments * 8", "% kAcross * 8"),
    "causal is one key off": (SHARED, "+ right + 1;", "+ right;"),
    "the window is one key off": (
        SHARED,
        "sequence.queries - left;",
        "sequence.queries - left + 1;",
    ),
    "the sign of the scale": (SHARED, "scale < 0 ? -product : product", "product"),
    "heads of another group": (
        SHARED,
        "return head / (heads / kv_heads);",
        "return head % kv_heads;",
    ),
    "keys of the first sequence": (
        FWD,
        "problem.kv_head(place.head), sequence.first_key + key,",
        "problem.kv_head(place.head), key,",
    ),
    "old products are not rescaled": (FWD, "products[map].scale(memory.rescale[map]);", ";"),
    "old sums are not rescaled": (
        FWD,
        "fmaf(total[map][i], shrink, sum)",
        "total[map][i] + sum",
    ),
    "a sum misses half of the lanes": (
        "rows.cuh",
        "value += __shfl_xor_sync(kAllLanes, value, step, kSide);",
        "if (step > 1) value += __shfl_xor_sync(kAllLanes, value, step, kSide);",
    ),
    "lse in binary logarithms": (FWD, "float(kLn2 * (top", "float((top"),
    "norm gradient without its mean": (TERMS, "(grad - o * shared)", "grad"),
    "norm gradient without out_scale": (
        TERMS,
        "grad *= problem.out_scale;",
        "grad *= problem.norm_weight ? problem.norm_weight[d] : 1.0f;",
    ),
    "D1 of the wrong rows": (
        TERMS,
        "(overlaps[0] + lam * overlaps[1]) / alpha",
        "(overlaps[0] - lam * overlaps[1]) / alpha",
    ),
    "dS2 without lam": (TERMS, "problem.scale * lam * (p2", "problem.scale * (p2"),
    "dlam with the wrong sign": (BWD, "gradients.lam[flat] = -", "gradients.lam[flat] = "),
    "dropout missing in dv": (TERMS, "lam * (p2 * kept[1])", "lam * p2"),
    "dropout of one map for both": (
        "dropout.cuh",
        "(key % 2 ? counter[3] : counter[1])",
        "(key % 2 ? counter[2] : counter[0])",
    ),
    "one head of a group": (
        BWD,
        "head < (place.head + 1) * group; ++head",
        "head < place.head * group + 1; ++head",
    ),
    "queries begin too late": (
        BWD,
        "max(aligned - problem.right,",
        "max(aligned - problem.right + 1,",
    ),
    "queries end too early": (
        BWD,
        "aligned + count + problem.left,",
        "aligned + count + problem.left - 1,",
    ),
    "exact terms are kept for dq only": (
        BWD,
        "term_of(problem, gradients, term, map, flat) = values[term][map][row];",
        "(void)flat;",
    ),
}


def run_selected(emulator, library, names):
    return emulator.run_tests(library, *(f"{TESTS}::{name}" for name in names))


def slow_but_first(faults):
    return [
        pytest.param(fault, id=name, marks=[pytest.mark.slow] if at else [])
        for at, (name, fault) in enumerate(faults.items())
    ]


@pytest.mark.parametrize("fault", slow_but_first(BARRIERS))
def test_removed_barrier(fault, cuda_emulator, tmp_path):
    library = cuda_emulator.build("diff_attention.cu", tmp_path, faults=(fault,))
    done = run_selected(cuda_emulator, library, SELECTED)
    assert "1 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", OUT_OF_BOUNDS | MISALIGNED)
def test_access_that_sanitizers_report(name, cuda_emulator, tmp_path):
    fault = (OUT_OF_BOUNDS | MISALIGNED)[name]
    library = cuda_emulator.build("diff_attention.cu", tmp_path, sanitize=True, faults=(fault,))
    done = run_selected(cuda_emulator, library, SANITIZED)
    report = "misaligned address" if name in MISALIGNED else "AddressSanitizer: "
    assert report in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    assert name in MISALIGNED or "in void rdfkern::" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG)
def test_wrong_arithmetic(fault, cuda_emulator, tmp_path):
    library = cuda_emulator.build("diff_attention.cu", tmp_path, faults=(fault,))
    done = run_selected(cuda_emulator, library, SELECTED)
    assert "1 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_nothing_is_out_of_bounds(cuda_emulator, tmp_path):
    library = cuda_emulator.build("diff_attention.cu", tmp_path, sanitize=True)
    done = run_selected(cuda_emulator, library, SANITIZED)
    assert f"{len(SANITIZED)} passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_half_types_without_tensor_cores(cuda_emulator, tmp_path):
    """As on sm_75."""
    no_tensor_cores = (FRAGMENTS, "__CUDA_ARCH__) && __CUDA_ARCH__ < 800", "__GNUC__)")
    library = cuda_emulator.build("diff_attention.cu", tmp_path, faults=(no_tensor_cores,))
    names = [f"test_error_budget[{case}-dtype1]" for case in CASES]
    done = run_selected(cuda_emulator, library, names)
    assert f"{len(names)} passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
