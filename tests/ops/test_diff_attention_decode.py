"""Decoding: few queries over many keys, in Triton by splitting the keys (see triton_runs)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rdfkern import diff_attention, diff_attention_varlen
from rdfkern.ops.diff_attention import config, triton_fwd
from rdfkern.testing import assert_within_budget
from triton_runs import (
    DEVICE,
    INTERPRETED,
    in_the_interpreter,
    kernels_run,
    outside,
    under_ttsem,
)

FACTOR = 2.0 if INTERPRETED else 2.5
INF = float("inf")


@outside
def test_in_the_interpreter():
    in_the_interpreter(__file__)


@outside
def test_under_ttsem():
    under_ttsem(__file__)


@pytest.fixture
def split(monkeypatch):
    """Short problems are split too, into parts of at least 16 keys; says how often."""
    counted = []
    decode = triton_fwd.decode
    monkeypatch.setattr(triton_fwd, "decode", lambda *a: (counted.append(1), decode(*a)))
    monkeypatch.setattr(config, "MIN_SPLIT_KEYS", 32)
    monkeypatch.setattr(config, "tiles", lambda *_: config.Tiles(16, 16, 4, 1))
    return counted


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(batch, heads, kv_heads, lq, lk, dim, value_dim, dtype=torch.float32):
    """Strided: both maps' heads interleaved in one tensor, values by position first."""
    q = draw(batch, 2 * heads, lq, dim, seed=1, dtype=dtype)
    k = draw(batch, lk, 2 * kv_heads, dim, seed=2, dtype=dtype).transpose(1, 2)
    v = draw(batch, lk, kv_heads, value_dim, seed=3, dtype=dtype).transpose(1, 2)
    lam, alpha = (draw(batch, heads, lq, seed=seed).sigmoid() for seed in (4, 5))
    tensors = {"q1": q[:, 0::2], "k1": k[:, 0::2], "q2": q[:, 1::2], "k2": k[:, 1::2], "v": v}
    return {**tensors, "lam": lam, "alpha": alpha + 0.5}


def run(impl, inputs, options, dtype=None, function=diff_attention):
    def moved(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(DEVICE if impl == "triton" else "cpu", dtype if x.is_floating_point() else None)

    arguments = {name: moved(x) for name, x in {**inputs, **options}.items()}
    out, lse = function(**arguments, return_lse=True, impl=impl)
    return {"out": out.cpu(), "lse": lse.cpu()}


def check(inputs, options, function=diff_attention):
    actual = run("triton", inputs, options, function=function)
    plain = run("torch", inputs, options, function=function)
    truth = run("reference", inputs, options, torch.float64, function)
    assert_within_budget(actual, plain, truth, factor=FACTOR)
    return actual


NORM = {"norm_eps": 1e-5, "norm_weight": draw(40, seed=6), "out_scale": 0.7}
HIDDEN = torch.arange(75) >= torch.tensor([[70], [0]])
BIAS = draw(2, 4, 3, 75, seed=7).masked_fill(draw(2, 4, 3, 75, seed=8) > 0.5, -INF)
BIAS[:, 1, 1] = -INF
CASES = {
    "one query": ((2, 2, 2, 1, 75, 16, 40), NORM),
    "as many parts as tiles": ((1, 1, 1, 1, 64, 16, 24), {}),
    "grouped queries": ((2, 6, 2, 3, 75, 24, 40), {"is_causal": True} | NORM),
    "more rows than a tile": ((1, 8, 1, 5, 75, 16, 40), {"is_causal": True, "norm_eps": 1e-3}),
    "window": ((1, 4, 2, 3, 75, 16, 24), {"window": (20, 0)}),
    "window of one key": ((1, 4, 2, 3, 75, 16, 24), {"window": (0, 0)}),
    "padding, dead sequence": ((2, 2, 1, 1, 75, 16, 24), {"key_padding_mask": HIDDEN}),
    "boolean mask": ((2, 4, 2, 3, 75, 16, 24), {"attn_mask": BIAS > -INF} | {"is_causal": True}),
    "bias": ((2, 4, 2, 3, 75, 16, 40), {"attn_mask": BIAS} | NORM),
    "negative scale": ((1, 2, 1, 1, 75, 16, 24), {"scale": -0.3}),
    "number": ((1, 2, 1, 2, 33, 16, 24), {"lam": 0.3, "alpha": 1.5}),
}


@kernels_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, dtype, split):
    shape, options = CASES[case]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(dtype)}
    actual = check(inputs_of(*shape, dtype), options)
    assert split
    assert (actual["out"][actual["lse"][0] == -INF] == 0).all()


@kernels_run
@pytest.mark.parametrize("lq", [1, 3, 40])
@pytest.mark.parametrize(("value_dim", "parts"), [(32, 2), (40, 2), (48, 3)])
def test_values_in_parts(value_dim, parts, lq, split):
    """Their own strides where keys are split; joined where queries are too many."""
    inputs = inputs_of(1, 4, 2, lq, 75, 16, value_dim)
    options = {"is_causal": True, "norm_eps": 1e-5}
    apart = torch.stack(inputs["v"].chunk(parts, dim=-1)).movedim(0, 3)
    joined = run("triton", inputs, options)
    torch.testing.assert_close(run("triton", inputs | {"v": apart}, options), joined)
    assert len(split) == (2 if lq < 40 else 0)


@kernels_run
@pytest.mark.parametrize("group", [1, 3])
def test_cached_decode_equals_full_causal(group, split):
    """Token by token and in chunks, over a cache that is longer than what has been written."""
    length, capacity = 41, 64
    inputs = inputs_of(2, 2 * group, 2, length, length, 16, 40)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    norm = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in NORM.items()}
    full = diff_attention(**inputs, is_causal=True, **norm, impl="reference")
    queries = ("q1", "q2", "lam", "alpha")
    for start, stop in ((0, 5), (5, 6), (36, 37), (37, 41)):
        cache = {n: inputs[n][:, :, :stop] for n in ("k1", "k2", "v")}
        chunk = {n: inputs[n][:, :, start:stop] for n in queries}
        out = diff_attention(**chunk, **cache, is_causal=True, **norm, impl="triton")
        torch.testing.assert_close(out, full[:, :, start:stop], rtol=1e-4, atol=1e-5)
        if stop - start > 1:
            continue
        # A static cache: what is not written yet is padding.
        unwritten = torch.arange(capacity, device=DEVICE).ge(stop).expand(2, -1)
        static = {
            n: x.new_full((*x.shape[:2], capacity, x.shape[3]), 7.0) for n, x in cache.items()
        }
        for name, x in cache.items():
            static[name][:, :, :stop] = x
        out = diff_attention(**chunk, **static, key_padding_mask=unwritten, **norm, impl="triton")
        torch.testing.assert_close(out, full[:, :, start:stop], rtol=1e-4, atol=1e-5)
    assert len(split) == 4


@kernels_run
@pytest.mark.parametrize("padded", [False, True])
def test_packed(padded, split):
    lengths_q, lengths_k = (1, 0, 3, 2), (33, 5, 64, 0)
    dense = inputs_of(1, 4, 2, sum(lengths_q), sum(lengths_k), 16, 40)
    packed = {n: dense[n][0].transpose(0, 1) for n in ("q1", "k1", "q2", "k2", "v")}
    packed |= {n: dense[n][0].mT for n in ("lam", "alpha")}
    options = {"is_causal": True, "window": (40, 0), "max_seqlen_q": 4, "max_seqlen_k": 70, **NORM}
    for name, lengths in (("q", lengths_q), ("k", lengths_k)):
        options[f"cu_seqlens_{name}"] = torch.tensor((0, *lengths)).cumsum(0)
    if padded:
        options["key_padding_mask"] = draw(sum(lengths_k), seed=9) > 0.5
    actual = check(packed, options, diff_attention_varlen)
    assert split
    assert (actual["out"][4:] == 0).all()


@kernels_run
def test_where_it_decodes(split):
    short, long = inputs_of(1, 2, 1, 1, 20, 16, 24), inputs_of(1, 2, 1, 1, 40, 16, 24)
    many = inputs_of(1, 2, 1, 33, 40, 16, 24)
    for inputs in (short, many):
        run("triton", inputs, {})
    run("triton", long, {"dropout_p": 0.1})
    run("triton", {name: x.requires_grad_() for name, x in long.items()}, {})
    assert not split
    with torch.no_grad():
        run("triton", long, {})
    assert len(split) == 1


def test_number_of_parts():
    assert config.splits(programs=1, keys=100_000, multiprocessors=132) == config.MAX_SPLITS
    assert config.splits(programs=8, keys=100_000, multiprocessors=132) == 33
    assert config.splits(programs=8, keys=1024, multiprocessors=132) == 4
    assert config.splits(programs=1000, keys=100_000, multiprocessors=132) == 1
