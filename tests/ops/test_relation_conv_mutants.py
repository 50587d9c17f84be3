"""Faults planted in relation_conv's Triton kernels, which the interpreter's tests must catch."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

FOLDER = "ops/relation_mp/"
TILES = FOLDER + "conv_triton_tiles.py"
BANDS = FOLDER + "conv_triton_bands.py"
BANDS_WEIGHT = FOLDER + "conv_triton_bands_weight.py"
BANDS_MAX = FOLDER + "conv_triton_bands_max.py"
EDGES = FOLDER + "conv_triton_edges.py"
EDGES_MAX = FOLDER + "conv_triton_edges_max.py"
MAX_LAUNCH = FOLDER + "conv_triton_max_launch.py"
EDGES_WEIGHT = FOLDER + "conv_triton_edges_weight.py"
LAUNCH = FOLDER + "conv_triton_launch.py"
KERNELS = FOLDER + "conv_triton.py"

# File, what it says, what it says with the fault, and which tests have to fail.
MUTANTS = {
    "past taken for future": (
        TILES,
        "low = tl.where(direction == 0, -past, tl",
        "low = tl.where(direction == 0, -future, tl",
        "rules and window",
    ),
    "window one short": (
        TILES,
        "direction == 1, 0, future)",
        "direction == 1, 0, future - 1)",
        "rules and window",
    ),
    "window one short going back": (
        TILES,
        "high = tl.where(direction == 0, past,",
        "high = tl.where(direction == 0, past - 1,",
        "rules and window",
    ),
    "table not transposed": (
        TILES,
        "entry = (other * KEYS + key) * 3",
        "entry = (key * KEYS + other) * 3",
        "rules and window",
    ),
    "tiles numbered from the first row": (
        TILES,
        "(tile - group - begin // BLOCK_M)",
        "(tile - group)",
        "rules and window",
    ),
    "shares of another key": (
        BANDS,
        "share_slot(table_ptr, pair // 3, relation",
        "share_slot(table_ptr, 0 * pair, relation",
        "rules and window",
    ),
    "search stops at the last probe": (
        TILES,
        "candidates = tl.minimum(step, candidates - passed * step)",
        "candidates = 1 + 0 * tl.minimum(step, candidates - passed * step)",
        "more_groups",
    ),
    "last others skipped": (
        TILES,
        "last_position, high + 1)",
        "last_position, high)",
        "rules and speaker",
    ),
    "first others skipped": (
        TILES,
        "begins, ends, first_position, low)",
        "begins, ends, last_position, low)",
        "rules and speaker",
    ),
    "others beyond the group": (
        TILES,
        "return inside[None, :] & (gap >= low)",
        "return (gap >= low)",
        "rules and window",
    ),
    "differences of positions overflow": (
        LAUNCH,
        "else 2**62 - 1",
        "else 2**31 - 2",
        "far_apart",
    ),
    "pair of a relation left out": (
        BANDS,
        "pair_code = next_code(codes, pair_code + 1)",
        "pair_code = relation_end",
        "rules and shared",
    ),
    "addend left out": (
        BANDS,
        "acc += tl.load(addend_ptr",
        "acc += 0 * tl.load(addend_ptr",
        "rules and root",
    ),
    "first chunk of columns only": (
        BANDS,
        "tl.range(0, C, BLOCK_C, num_stages=1)",
        "tl.range(0, BLOCK_C, BLOCK_C, num_stages=1)",
        "rules and window",
    ),
    "first block's weight for all": (
        BANDS,
        "weight_ptr += block * weight_strides[1]",
        "weight_ptr += 0 * block",
        "rules and blocks",
    ),
    "split ends with its group": (
        BANDS_WEIGHT,
        "tl.minimum(tl.load(start_ptr + group + 1), split_end)",
        "tl.load(start_ptr + group + 1)",
        "splits",
    ),
    "parts of splits not added up": (
        KERNELS,
        "parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)",
        "parts[0]",
        "splits",
    ),
    "dweight of sums, not means": (
        BANDS_WEIGHT,
        "sums = sums / tl.maximum(counts, 1)[:, None]",
        "sums = sums * 1.0",
        "rules and window",
    ),
    "one edge of a kind": (
        EDGES,
        "while tl.max(active.to(tl.int32)) > 0:",
        "if tl.max(active.to(tl.int32)) > 0:",
        "lists and many",
    ),
    "edge's own number ignored": (
        EDGES,
        "edge = tl.load(edge_ptr + at, mask=active, other=0)",
        "edge = at",
        "lists and weighted",
    ),
    "edge found one late": (
        EDGES_WEIGHT,
        "other=0) < relation)",
        "other=0) <= relation)",
        "lists and random",
    ),
    "columns of the factor's last part only": (
        LAUNCH,
        "parts = blocks * triton.cdiv(width_out, tiles.block_e)\n",
        "parts = blocks * (width_out // tiles.block_e)\n",
        "lists and weighted",
    ),
    "maxima are at least 0": (
        BANDS,
        'float("-inf") if MAX else 0.0',
        "0.0",
        "maxima and utterance",
    ),
    "maxima of the last neighbour": (
        TILES,
        "tl.where(heard, larger(highest, features), highest)",
        "tl.where(heard, features, highest)",
        "ties and rule",
    ),
    "what is not a number loses": (
        TILES,
        "tl.PropagateNan.ALL",
        "tl.PropagateNan.NONE",
        "finite and rule",
    ),
    "rows that hear nothing keep their start": (
        BANDS,
        "sums = tl.where(counts[:, None] > 0, sums, 0.0)",
        "sums = tl.where(counts[:, None] >= 0, sums, 0.0)",
        "maxima and utterance",
    ),
    "dweight of what rows behind the last one hear": (
        BANDS_WEIGHT,
        "tl.where((owned & (counts > 0))[:, None], sums, 0.0)",
        "tl.where((counts > 0)[:, None], sums, 0.0)",
        "finite and rule",
    ),
    "ties do not share": (
        BANDS_MAX,
        "gradients / ties",
        "gradients",
        "ties and rule",
    ),
    "every neighbour attains the maximum": (
        BANDS_MAX,
        "tl.where(features == highest, 1.0, 0.0) * share",
        "share",
        "ties and rule",
    ),
    "nothing that is not a number comes back": (
        BANDS_MAX,
        "tl.where(features == highest, 1.0, 0.0) * share",
        "tl.where(features == highest, share, 0.0)",
        "finite and rule",
    ),
    "later relations overwrite": (
        BANDS_MAX,
        "if first > 0:",
        "if first < 0:",
        "ties and rule",
    ),
    "relations of another part": (
        BANDS_MAX,
        "(code // PAIRS - first) * total",
        "(code // PAIRS) * total",
        "ties and rule",
    ),
    "all targets' gradients come back": (
        BANDS_MAX,
        "sums += tl.where(heard[:, None], passed, 0.0)",
        "sums += passed",
        "ties and rule",
    ),
    "the last relation of a part is missing": (
        MAX_LAUNCH,
        "min(first + together, relations) - 1",
        "max(min(first + together, relations) - 2, first)",
        "ties and rule",
    ),
    "edges that tie do not share": (
        EDGES_MAX,
        "gradients / ties",
        "gradients",
        "ties and list",
    ),
    "dx of maxima without edge weights": (
        EDGES_MAX,
        "tl.where(active[:, None], passed * factor, 0.0)",
        "tl.where(active[:, None], passed, 0.0)",
        "ties and list",
    ),
    "maxima without edge weights": (
        EDGES,
        "larger(sums, features * factor[:, None])",
        "larger(sums, features)",
        "ties and list",
    ),
    "later edges of a kind do not count": (
        EDGES_MAX,
        "active = active & (at < moved)",
        "active = active & (at < at)",
        "ties and list",
    ),
    "edge weights' gradient of the first columns": (
        MAX_LAUNCH,
        "parts = triton.cdiv(x.shape[1], tiles.block_c)",
        "parts = 1",
        "maxima and weighted",
    ),
}


# One of them always, so that a run that tests something else than its fault is noticed early.
ONE = next(iter(MUTANTS))


@pytest.mark.parametrize(
    "mutant",
    [ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS if name != ONE)],
)
def test_fault_is_caught(mutant, catches):
    path, text, fault, tests = MUTANTS[mutant]
    catches(path, text, fault, "test_relation_conv_triton.py", tests)


def test_without_a_fault_the_same_tests_pass(run_with_fault):
    path, text, _, tests = MUTANTS[ONE]
    run = run_with_fault(path, text, text, "test_relation_conv_triton.py", tests)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
