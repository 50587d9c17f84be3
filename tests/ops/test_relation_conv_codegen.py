"""What the compilers make of relation_conv's Triton kernels, for GPUs that are not at hand.

Gates are in relation_conv_codegen.json: bytes of shared memory and of spilled registers (on AMD's
their number), and the instruction of the tensor cores. They are facts about this version of Triton,
not speeds.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rdfkern.ops.relation_mp import conv_triton_launch, conv_triton_max_launch
from rdfkern.ops.relation_mp.bands import Bands
from rdfkern.ops.relation_mp.conv_triton_launch import BandRule, Edges

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

GATES = json.loads(Path(__file__).with_name("relation_conv_codegen.json").read_text())
TENSOR_CORES = re.compile(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma")
DOTS = re.compile(r"\btt\.dot |ttng\.warp_group_dot |ttng\.tc_gen5_mma |tt\.dot_scaled ")
PRODUCTS = {
    "forward": 2,
    "dx": 2,
    "dweight": 2,
    "forward on edges": 1,
    "dx on edges": 1,
    "dweight on edges": 1,
    "dedge_weight": 1,
    "maximum": 1,
    "dweight of maxima": 1,
    "maxima": 1,
    "maximum on edges": 1,
    "dweight of maxima on edges": 1,
    "maxima on edges": 1,
}
KERNELS = (*PRODUCTS, "shares", "dx of maxima", "dx of maxima on edges")


def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    kernel,
    *,
    width=128,
    width_out=None,
    dtype=torch.bfloat16,
    weight_dtype=None,
    dialogues=16,
    length=110,
    keys=2,
    relations=8,
    blocks=1,
    aggr="mean",
    positions=torch.int32,
    indices=torch.int32,
    window=20,
):
    """The launch of a kernel at its default configuration, on tensors without values."""
    rows, width_out = dialogues * length, width_out or width
    x, grad = meta(rows, width * blocks, dtype=dtype), meta(rows, width_out * blocks, dtype=dtype)
    weight = meta(relations, blocks, width, width_out, dtype=weight_dtype or dtype)
    addend, swapped = grad.float(), weight.transpose(2, 3)
    graph = Bands(
        meta(rows, dtype=indices),
        meta(rows, dtype=positions),
        meta(rows, dtype=indices),
        meta(dialogues * keys + 1, dtype=indices),
        meta(keys, keys, 3),
    )
    if "max" in kernel:
        aggr = "max"
        kernel = kernel.replace("maximum", "forward").replace("dweight of maxima", "dweight")
    rule = BandRule(graph, window, window, aggr)
    lists = [meta(20 * rows, dtype=indices) for _ in range(4)]
    edges = Edges(meta(rows + 1, dtype=indices), *lists, meta(20 * rows, dtype=dtype), aggr)
    new = conv_triton_launch
    if kernel == "forward":
        return new.bands_launch(rule, x, weight, addend, None, grad, transposed=False)
    if kernel == "dx":
        shares = new.new_shares(rule, relations) if aggr == "mean" else None
        return new.bands_launch(rule, grad, swapped, None, shares, x, transposed=True)
    if kernel == "shares":
        return new.shares_launch(rule, new.new_shares(rule, relations), relations)
    if kernel == "dweight":
        parts = new.new_parts("bands_weight", weight, x, rows, rule.rows_per_group)
        return new.bands_weight_launch(rule, x, grad, parts)
    if kernel == "forward on edges":
        return new.edges_launch(edges, x, weight, addend, grad)
    if kernel == "dx on edges":
        return new.edges_launch(edges, grad, swapped, None, x)
    if kernel == "dweight on edges":
        parts = new.new_parts("edges_weight", weight, x, rows, rows)
        return new.edges_weight_launch(edges, x, grad, parts)
    if kernel == "dedge_weight":
        return new.edges_factor_launch(edges, x, weight, grad)[0]
    new, dx = conv_triton_max_launch, x.float()
    kept = new.new_kept(weight, x, rows)
    if kernel.endswith("on edges"):
        products = new.new_products(weight, x, edges)
        launches = new.edges_max_launches(edges, edges, x, weight, grad, kept, dx, products)
    else:
        launches = new.bands_max_launches(rule, x, weight, grad, kept, dx)
    targets, sources = next(launches), next(launches)
    return sources if kernel.startswith("dx") else targets


def mark(architecture, width, kernel):
    quick = (kernel, width) in (("forward", 128), ("maxima", 128)) or (architecture, width) == (
        "sm_90",
        512,
    )
    return pytest.param(architecture, width, kernel, marks=() if quick else pytest.mark.slow)


SIZES = [mark(name, width, kernel) for name in GATES for width in (128, 512) for kernel in KERNELS]


@pytest.mark.parametrize(("architecture", "width", "kernel"), SIZES)
def test_resources(architecture, width, kernel, compile_for, spilled, monkeypatch):
    monkeypatch.setattr(conv_triton_launch, "architecture", lambda device: architecture)
    gate, compiled = GATES[architecture], compile_for(launch(kernel, width=width), architecture)
    assert compiled.metadata.shared <= gate["shared_bytes"]
    assert spilled(compiled, architecture) <= gate["spilled"]
    assembly = compiled.asm["amdgcn" if architecture.startswith("gfx") else "ptx"]
    dots = len(DOTS.findall(compiled.asm["ttgir"]))
    assert dots >= PRODUCTS.get(kernel, 0)
    assert len(TENSOR_CORES.findall(assembly)) >= dots
    assert GATES[architecture]["instruction"] in assembly or not dots


FEATURES = {
    "short dialogues": {"length": 30, "keys": 9, "relations": 162},
    "one long dialogue": {"dialogues": 1, "length": 20_000, "window": -1, "relations": 5},
    "300 speakers": {"keys": 300, "relations": 5},
    "sums": {"aggr": "sum"},
    "large positions": {"positions": torch.int64, "window": 2**40},
    "64-bit indices": {"indices": torch.int64},
    "blocks": {"width": 17, "width_out": 33, "blocks": 3},
    "narrow": {"width": 1, "width_out": 200},
    "float16": {"dtype": torch.float16},
    "wide weights": {"weight_dtype": torch.float32},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_compiles(feature, architecture, compile_for, monkeypatch):
    monkeypatch.setattr(conv_triton_launch, "architecture", lambda device: architecture)
    for kernel in KERNELS:
        compiled = compile_for(launch(kernel, **FEATURES[feature]), architecture)
        assert compiled.metadata.shared <= GATES[architecture]["shared_bytes"], kernel
