"""Faults planted in relation attention's Triton kernels, which the interpreter's tests catch."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

FOLDER = "ops/relation_mp/attention_triton"
TILES = FOLDER + "_tiles.py"
FORWARD = FOLDER + "_fwd.py"
TARGETS = FOLDER + "_bwd_dst.py"
SOURCES = FOLDER + "_bwd_src.py"
EDGES = FOLDER + "_edges.py"
EDGES_BACK = FOLDER + "_edges_bwd.py"
WITHIN = FOLDER + "_within.py"
UTILS = "_backends/triton_utils.py"

# File, what it says, what it says with the fault, and which tests have to fail.
MUTANTS = {
    "window one too wide": (TILES, "sources < end", "sources <= end", "window-dot"),
    "window one too narrow": (TILES, "sources >= first", "sources > first", "window-dot"),
    "itself taken as earlier": (
        TILES,
        "(sources >= same_first).to",
        "(sources > same_first).to",
        "window-dot",
    ),
    "table transposed": (
        TILES,
        "(target_key * keys + source_key)",
        "(source_key * keys + target_key)",
        "window-dot",
    ),
    "no edge taken as a relation": (
        TILES,
        "heard = relation >= 0",
        "heard = relation >= -1",
        "window-dot",
    ),
    "slope of the other side": (
        TILES,
        "tl.where(rises, slopes, slopes * neg",
        "tl.where(rises, slopes * neg",
        "complete-additive",
    ),
    "slope forgotten going back": (
        TILES,
        "slopes = tl.where(rises, slopes, slopes * negative_slope)",
        "slopes = tl.where(rises, slopes, slopes)",
        "complete-additive",
    ),
    "the sum of the weights forgotten": (
        TILES,
        "tl.where(dead, 0.0, 1.0 / sums)",
        "tl.where(dead, 0.0, 1.0)",
        "complete-additive",
    ),
    "dead rows not a number": (
        TILES,
        'tl.where(dead, float("inf"), peak)',
        "peak",
        "minus",
    ),
    "dropped weights not scaled up": (
        TILES,
        "kept = tl.where(keep, weights * inverse_kept, 0.0)",
        "kept = tl.where(keep, weights, 0.0)",
        "dropout_on_windows",
    ),
    "dropout from where the tile begins": (
        TILES,
        "first_source // 4 + tl.arange",
        "tl.arange",
        "dropout_on_windows",
    ),
    "few relations: the last one forgotten": (
        TILES,
        "tl.static_range(FEW)",
        "tl.static_range(FEW - 1)",
        "window-dot",
    ),
    "many relations: every other one": (
        TILES,
        "relation > r, relation",
        "relation > r + 1, relation",
        "relations_are_summed",
    ),
    "many relations: the wrong chunk": (
        TARGETS,
        "tl.program_id(1) * RELATIONS",
        "tl.program_id(1) * (RELATIONS + 1)",
        "relations_are_summed",
    ),
    "accumulator not rescaled": (FORWARD, "acc * decay[:, None]", "acc", "complete-additive"),
    "first tile of sources skipped": (
        FORWARD,
        "// ALIGNMENT * ALIGNMENT",
        "// ALIGNMENT * ALIGNMENT + ALIGNMENT",
        "past",
    ),
    "rows past the end stored": (
        FORWARD,
        "inside = rows < total",
        "inside = rows >= 0",
        "complete",
    ),
    "rows instead of nodes": (FORWARD, "softmax_ptr + nodes", "softmax_ptr + rows", "positions"),
    "scale left out of dquery": (TARGETS, "own_grads * scale", "own_grads", "window-dot"),
    "D of another head": (
        SOURCES,
        "delta_ptr + of_target",
        "delta_ptr + nodes * heads",
        "complete-dot",
    ),
    "targets of the first source only": (
        SOURCES,
        "3 * length + last_source",
        "3 * length + first_source",
        "window-dot",
    ),
    "a run's end taken from the target": (
        EDGES,
        "at + tl.load(count_ptr + at) if WITHIN else stop",
        "stop",
        "within",
    ),
    "edges of the next target": (
        EDGES,
        "member = edges < stop",
        "member = edges <= stop",
        "against and edges",
    ),
    "edge sums not rescaled": (EDGES, "acc = acc * decay +", "acc = acc +", "long"),
    "edges' D not rescaled": (
        EDGES_BACK,
        "products = products * decay",
        "products = products",
        "long",
    ),
    "edges dropped by their place": (
        EDGES_BACK,
        "keep = kept_edges(seed, threshold, head, numbers)\n                kept",
        "keep = kept_edges(seed, threshold, head, edges)\n                kept",
        "dropout_on_edges",
    ),
    "the last edge of a part": (
        EDGES_BACK,
        "member = at < stop",
        "member = at + 1 < stop",
        "parts",
    ),
    "a relation skipped": (
        WITHIN,
        "relation > number, relation",
        "relation > number + 1, relation",
        "within_relations and complete",
    ),
    "another relation's softmax": (
        TILES,
        "softmax_ptr + places + relation",
        "softmax_ptr + places",
        "within_relations and complete",
    ),
    "totals not rescaled": (UTILS, "total * decay + tl", "total + tl", "complete-additive"),
}


# One of them always, so that a run that tests something else than its fault is noticed early.
ONE = next(iter(MUTANTS))


@pytest.mark.parametrize(
    "mutant",
    [ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS if name != ONE)],
)
def test_fault_is_caught(mutant, catches):
    path, text, fault, tests = MUTANTS[mutant]
    catches(path, text, fault, "test_relation_attention_triton.py", tests)


def test_without_a_fault_the_same_tests_pass(run_with_fault):
    path, text, _, tests = MUTANTS[ONE]
    run = run_with_fault(path, text, text, "test_relation_attention_triton.py", tests)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
