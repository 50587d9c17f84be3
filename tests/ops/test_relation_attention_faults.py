"""Faults planted into the C++ sources of relation attention, each of which its tests must catch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rdfkern
from rdfkern.csrc import ROOT

REASON = rdfkern.available_backends("relation_attention")["cpu"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

TESTS = Path(__file__).with_name("test_relation_attention_cpu.py")
RUN = """
import pathlib, sys, pytest, rdfkern.csrc
rdfkern.csrc.ROOT = pathlib.Path(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""
LISTED = "test_rms and random"
SPLIT = "test_rms and split and additive"
WIDE = "test_rms and beyond"

# name: (file, what stands there, what is planted, the tests that must notice)
FAULTS = {
    "products are not rescaled": (
        "relation_attention_fwd.cpp",
        "add_products<Update::kRescale>(block)",
        "add_products<Update::kAdd>(block)",
        WIDE,
    ),
    "every block of sources starts the sums": (
        "relation_attention_fwd.cpp",
        "const bool is_first = block.first == panel.sources.first;",
        "const bool is_first = true;",
        WIDE,
    ),
    "later sources count as earlier": (
        "relation_attention_panel.h",
        "return load(rows + kLater * kPanel + first);",
        "return load(rows + kEarlier * kPanel + first);",
        SPLIT,
    ),
    "a source is heard by those it hears": (
        "relation_attention_panel.h",
        "lane(problem_.heard_first), lane(problem_.heard_end)",
        "lane(problem_.first), lane(problem_.end)",
        "test_error_budget and rule and window and additive",
    ),
    "relations of several keys are not merged": (
        "relation_attention_panel.h",
        "rows[leader * kPanel + i] = merge(rows[leader * kPanel + i], value);",
        "merge(rows[leader * kPanel + i], value);",
        "test_error_budget and rule and isolated and additive and within",
    ),
    "dropout repeats after four sources": (
        "relation_attention_panel.h",
        "UintVec{} + uint32_t(four), UintVec{} + uint32_t(head)",
        "UintVec{}, UintVec{} + uint32_t(head)",
        "test_statistics",
    ),
    "the LeakyReLU's slope is forgotten": (
        "relation_attention_panel_bwd.h",
        "slope = select(x > 0.0f, slope, slope * problem_.negative_slope);",
        "slope = select(x > 0.0f, slope, slope);",
        SPLIT,
    ),
    "D is missing where it comes from saved rows": (
        "relation_attention_panel_bwd.h",
        "deltas_[i] = sum(delta);",
        "deltas_[i] = 0.0f;",
        WIDE,
    ),
    "the last chunk's sums replace the others": (
        "relation_attention_bwd.cpp",
        "row[d] += dv[d];",
        "row[d] = dv[d];",
        SPLIT,
    ),
    "the last panel's relation gradient replaces the others": (
        "relation_attention_panel_bwd.h",
        "sums_.rel[relation] += by_relation_[row * kPanel + i];",
        "sums_.rel[relation] = by_relation_[row * kPanel + i];",
        SPLIT,
    ),
    "every relation of a list shares one softmax": (
        "relation_attention_edges.h",
        "if (arguments_.within)\n",
        "if (false)\n",
        LISTED,
    ),
    "values get gradients of dropped edges": (
        "relation_attention_edges_bwd.cpp",
        "results.weights[at] = row.weights[e] * row.factors[e];",
        "results.weights[at] = row.weights[e];",
        "same_factors and list",
    ),
    "gradients of lists follow the order of targets": (
        "relation_attention_edges_bwd.cpp",
        "values[int64_t(edges.src_edge[first + e]) * arguments.heads + head]",
        "values[int64_t(first + e) * arguments.heads + head]",
        LISTED,
    ),
}


def run(folder, file=None, there=None, planted=None, tests=WIDE):
    """Exit status and output of the tests on a copy of the sources."""
    sources = folder / "cpu"
    sources.mkdir()
    for path in [*(ROOT / "cpu").glob("*.h"), *(ROOT / "cpu").glob("relation_attention*.cpp")]:
        shutil.copy(path, sources)
    if file is not None:
        text = (sources / file).read_text()
        assert text.count(there) == 1, "the place of the fault has moved"
        (sources / file).write_text(text.replace(there, planted))
    command = [sys.executable, "-c", RUN, str(folder), "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(TESTS), "-k", tests],
        env=os.environ | {"RDFKERN_CACHE_DIR": str(folder / "cache")},
        cwd=TESTS.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("tests", sorted({fault[3] for fault in FAULTS.values()}))
def test_without_a_fault_they_pass(tests, tmp_path):
    status, output = run(tmp_path, tests=tests)
    assert status == 0, output[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, tmp_path):
    status, output = run(tmp_path, *FAULTS[name])
    assert status == 1 and " failed" in output, output[-3000:]
    assert "does not build" not in output and "skipped" not in output.splitlines()[-1]
