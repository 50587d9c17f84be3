"""Faults planted in the CUDA kernels of relation convolution: the emulated tests notice each."""

import signal

import pytest

TESTS = "tests/ops/test_relation_conv_cuda.py"
SANITIZED = (
    "test_implicit_graphs[window-mean]",
    "test_implicit_graphs[just over a tile-sum]",
    "test_explicit_graphs[bipartite-blocks-mean]",
    "test_explicit_graphs[no edges-full-sum]",
    "test_strided_inputs[True]",
    "test_half_types[basis-mean-dtype0]",
    "test_explicit_graphs[bipartite-blocks-max]",
    "test_implicit_graphs[just over a tile-max]",
    "test_every_schedule_gives_the_same_bits[eager warps-1-mean]",
)
SELECTED = (
    *SANITIZED,
    "test_implicit_graphs[unsorted positions-mean]",
    "test_implicit_graphs[random rule-sum]",
    "test_wide_edge_weight_gradients",
    "test_weight_gradients_in_any_number_of_chunks",
    "test_every_schedule_gives_the_same_bits[reverse-0-mean]",
    "test_every_schedule_gives_the_same_bits[random-2-mean]",
    "test_every_schedule_gives_the_same_bits[reverse-0-max]",
    "test_edges_that_tie_share_the_gradient_of_the_maximum",
    "test_maxima_that_are_not_finite",
    "test_maxima_of_any_number_of_relations_at_a_time",
)
CONV, MAX = "relation_conv.cuh", "relation_conv_max.cuh"
VIEWS, TILES = "relation_views.cuh", "tiles.cuh"

BARRIERS = {
    "after the lowest relation": (
        VIEWS,
        "__syncthreads();\n    return relation;",
        "return relation;",
    ),
    "before sums are overwritten": (
        CONV,
        "__syncthreads();\n    }\n    memory.walk.advance",
        "}\n    memory.walk.advance",
    ),
    "before runs are overwritten": (
        VIEWS,
        "__syncthreads();\n    if (threadIdx.x < kTileRows) {",
        "if (threadIdx.x < kTileRows) {",
    ),
    "after runs are found": (
        VIEWS,
        "__syncthreads();\n    return any;",
        "return any;",
    ),
    "after rows are loaded": (
        CONV,
        "__syncthreads();\n    add_product(&memory.z,",
        "add_product(&memory.z,",
    ),
    "before gradients are overwritten": (
        CONV,
        "start += kColumns) {\n    __syncthreads();",
        "start += kColumns) {",
    ),
    "before the runs of edges advance": (
        CONV,
        "first_in += width;\n    }\n    __syncthreads();",
        "first_in += width;\n    }",
    ),
    "before pieces are loaded": (
        TILES,
        "static_assert(WIDTH <= STAGE_WIDTH);\n  __syncthreads();",
        "",
    ),
    "after pieces are loaded": (TILES, "stage.whole);\n  __syncthreads();", "stage.whole);"),
    "before products are staged": (
        CONV,
        "__syncthreads();\n  sums[0].for_each",
        "sums[0].for_each",
    ),
    "after products are staged": (
        CONV,
        "whole[i][j] = sum; });\n  __syncthreads();",
        "whole[i][j] = sum; });",
    ),
}
OUT_OF_BOUNDS = {
    "rows behind the last one begin": (
        VIEWS,
        "row < view.rows ? next_run(view, row, view.first_entry(row))\n"
        "                                        : Run{0, 0, 0, kNoRelation};",
        "next_run(view, row, view.first_entry(row));",
    ),
    "rows behind the last one are written": (
        CONV,
        "if (first_row + local >= view.rows || first_column",
        "if (first_column",
    ),
    "columns behind the last one are read": (CONV, "if (column + kSide * n < width) {", "{"),
    "maxima of columns behind the last one": (
        MAX,
        "if (kSide * n < width) {\n        given.maxima",
        "{\n        given.maxima",
    ),
    "sources behind the last one": (
        MAX,
        "row < min(first_row + kTileRows, view.rows)",
        "row < first_row + kTileRows",
    ),
    "edges behind the last one": (
        MAX,
        "entry < end && view.relation_of(entry) < given.end",
        "view.relation_of(entry) < given.end",
    ),
    "columns behind the last one are written": (
        CONV,
        "view.rows || first_column + column >= given.width_out) return;",
        "view.rows) return;",
    ),
}
WRONG = {
    "the past is one position short": (
        VIEWS,
        "direction == 0 ? -behind :",
        "direction == 0 ? 1 - behind :",
    ),
    "the future is one position long": (
        VIEWS,
        "direction == 2 ? ahead + 1 :",
        "direction == 2 ? ahead + 2 :",
    ),
    "the same position counts as later": (
        VIEWS,
        "-behind : direction - 1;",
        "-behind : 0;",
    ),
    "groups of the first dialogue": (
        VIEWS,
        "heard = mine - mine % keys + other;",
        "heard = other;",
    ),
    "counts of one band only": (
        VIEWS,
        "run.count += view.size_of(row, run.end);",
        "run.count = max(run.count, view.size_of(row, run.end));",
    ),
    "weights of the opposite direction": (VIEWS, "* 3 + 2 - entries", "* 3 + entries"),
    "edge weights in the wrong order": (
        VIEWS,
        "edge.at(entry) * weight_stride",
        "entry * weight_stride",
    ),
    "means are sums for sources": (VIEWS, "return shares ? weight", "return false ? weight"),
    "means are sums": (
        CONV,
        "aggregation == Aggregation::kMean ? 1.0f / float(run.count) : 1.0f;\n#pragma unroll\n"
        "      for (int n",
        "1.0f;\n#pragma unroll\n      for (int n",
    ),
    "no addend": (CONV, "if (given.addend.data)", "if (false)"),
    "the first diagonal block for all": (
        CONV,
        "load_whole<WIDTH>(Strip{weight, relation, block, first",
        "load_whole<WIDTH>(Strip{weight, relation, 0, first",
    ),
    "the first columns of every matrix": (
        CONV,
        "from_column(given.weight, first_column)",
        "from_column(given.weight, 0)",
    ),
    "chunks overlap": (CONV, "int64_t(given.chunks) * kTileRows)", "int64_t(kTileRows))"),
    "gradients of sorted rows": (
        CONV,
        "view.node(first_row + local) * given.grad_out.row_stride +\n"
        "                         int64_t(block) * given.width_out + column);\n"
        "      memory.stage",
        "(first_row + local) * given.grad_out.row_stride +\n"
        "                         int64_t(block) * given.width_out + column);\n"
        "      memory.stage",
    ),
    "gradients of maxima of sorted rows": (
        CONV,
        "view.node(first_row + local) * given.grad_out.row_stride +\n"
        "                         int64_t(block) * given.width_out + column);\n"
        "      memory.grad_out",
        "(first_row + local) * given.grad_out.row_stride +\n"
        "                         int64_t(block) * given.width_out + column);\n"
        "      memory.grad_out",
    ),
    "edge gradients of the last part only": (
        CONV,
        "first_in ? target + share * sum : share * sum",
        "share * sum",
    ),
    "maxima are at least 0": (CONV, "sums[n] = kLowest;", "sums[n] = 0.0f;"),
    "maxima without edge weights": (
        CONV,
        "larger(sums[n], weight * value)",
        "larger(sums[n], value)",
    ),
    "maxima leave out what is not a number": (CONV, "b > a || b != b ? b : a", "b > a ? b : a"),
    "ties do not share": (MAX, "gradients[kSide * n] / ties[n];", "gradients[kSide * n];"),
    "maxima stand at sorted rows": (
        MAX,
        "given.at(relation, view.node(row))",
        "given.at(relation, row)",
    ),
    "every edge attains the maximum": (MAX, "(message == maxima[place] ? 1.0f : 0.0f)", "1.0f"),
    "maxima pass on nothing that is not a number": (
        MAX,
        "(message == maxima[place] ? 1.0f : 0.0f) * shares[place]",
        "(message == maxima[place] ? shares[place] : 0.0f)",
    ),
    "gradients of later relations overwrite": (
        MAX,
        "if (given.first) sums[n]",
        "if (false) sums[n]",
    ),
    "the last of some relations is missing": (
        MAX,
        "run.relation < given.end;",
        "run.relation < given.end - 1;",
    ),
    "edge weights are missing in dx": (
        MAX,
        "weight * values[n]), weight, sums[n])",
        "weight * values[n]), 1.0f, sums[n])",
    ),
    "columns of the first block only": (
        MAX,
        "int64_t(block) * back.width_in + first_in + thread_x();",
        "first_in + thread_x();",
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
    library = cuda_emulator.build("relation_conv.cu", tmp_path, faults=(fault,))
    done = run_selected(cuda_emulator, library, SELECTED)
    # Rows that are not found yet can also end in a segmentation fault.
    noticed = "1 failed" in done.stdout or done.returncode == -signal.SIGSEGV
    assert noticed, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_access_out_of_bounds(fault, cuda_emulator, tmp_path):
    library = cuda_emulator.build("relation_conv.cu", tmp_path, sanitize=True, faults=(fault,))
    done = run_selected(cuda_emulator, library, SANITIZED)
    assert "AddressSanitizer: " in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG)
def test_wrong_arithmetic(fault, cuda_emulator, tmp_path):
    library = cuda_emulator.build("relation_conv.cu", tmp_path, faults=(fault,))
    done = run_selected(cuda_emulator, library, SELECTED)
    assert "1 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_nothing_is_out_of_bounds(cuda_emulator, tmp_path):
    library = cuda_emulator.build("relation_conv.cu", tmp_path, sanitize=True)
    done = run_selected(cuda_emulator, library, SANITIZED)
    assert f"{len(SANITIZED)} passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
