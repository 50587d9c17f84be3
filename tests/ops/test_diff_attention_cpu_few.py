"""Few queries over many keys on the CPU, where the keys are cut, against the reference."""

import pytest
import torch

import rdfkern
from rdfkern.ops.diff_attention import native, op
from rdfkern.testing import assert_within_budget

REASON = rdfkern.available_backends("diff_attention")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

INF = float("inf")
PART = 256  # keys, in csrc/cpu/diff_attention_fwd_few.cpp


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(shape, dtype=torch.float32):
    """(B, H, Hkv, Lq, Lk, D, Dv) -> arguments by name; heads of both maps lie in one tensor."""
    batch, heads, kv_heads, lq, lk, dim, value_dim = shape
    q = rand(batch, 2 * heads, lq, dim, seed=1).to(dtype)
    k = rand(batch, lk, 2 * kv_heads, dim, seed=2).to(dtype).transpose(1, 2)
    v = rand(batch, kv_heads, lk, value_dim, seed=3).to(dtype)
    maps = {"q1": q[:, 0::2], "k1": k[:, 0::2], "q2": q[:, 1::2], "k2": k[:, 1::2]}
    lam, alpha = (rand(batch, heads, lq, seed=seed).sigmoid() for seed in (4, 5))
    return {**maps, "v": v, "lam": lam, "alpha": alpha + 0.5}


def run(impl, function, arguments, wide=False):
    def moved(x):
        return x.double() if wide and torch.is_tensor(x) and x.is_floating_point() else x

    arguments = {name: moved(x) for name, x in arguments.items()}
    out, lse = function(**arguments, return_lse=True, impl=impl)
    return {"out": out, "lse": lse}


def check(arguments, function=rdfkern.diff_attention):
    actual = run("cpu", function, arguments)
    plain = run("reference", function, arguments)
    truth = run("reference", function, arguments, wide=True)
    assert_within_budget(actual, plain, truth)
    return actual


NORM = {"norm_eps": 1e-5, "norm_weight": rand(40, seed=6).abs() + 0.5, "out_scale": 0.7}
PADDING = torch.arange(600) < torch.tensor([[300], [5]])
HOLES = rand(2, 600, seed=7) > 0.5
BIAS = rand(2, 4, 3, 600, seed=8).masked_fill(rand(2, 4, 3, 600, seed=9) > 0.5, -INF)
BIAS[:, 1, 1] = -INF
CASES = {
    "one query": ((2, 2, 2, 1, 600, 24, 40), NORM),
    "one key more than a part": ((1, 1, 1, 1, PART + 1, 16, 24), {}),
    "whole parts": ((1, 2, 1, 2, 2 * PART, 16, 24), {}),
    "odd widths": ((1, 2, 1, 1, 300, 7, 13), {}),
    "widest": ((1, 2, 1, 2, 300, 256, 512), {}),
    "both maps in half a vector": ((1, 4, 1, 1, 600, 64, 128), {"is_causal": True}),
    "a vector for each map": ((1, 6, 1, 2, 600, 24, 40), {"is_causal": True} | NORM),
    "as many rows as there may be": ((1, 32, 1, 2, 600, 16, 24), {"is_causal": True}),
    "grouped queries": ((2, 6, 2, 3, 600, 24, 40), {"is_causal": True} | NORM),
    "window": ((1, 4, 2, 3, 600, 16, 24), {"window": (290, 0)}),
    "window in one part": ((1, 4, 2, 3, 600, 16, 24), {"window": (20, 0)}),
    "window of one key": ((1, 2, 2, 2, 600, 16, 24), {"window": (0, 0)}),
    "window to the right": ((1, 2, 2, 4, 600, 16, 24), {"window": (-1, 0)}),
    "padding": ((2, 2, 1, 1, 600, 16, 24), {"key_padding_mask": PADDING}),
    "holes": ((2, 2, 1, 2, 600, 16, 24), {"key_padding_mask": HOLES, "is_causal": True}),
    "boolean mask": ((2, 4, 2, 3, 600, 16, 24), {"attn_mask": BIAS > -INF}),
    "bias with a dead row": ((2, 4, 2, 3, 600, 16, 40), {"attn_mask": BIAS} | NORM),
    "negative scale": ((1, 2, 1, 1, 600, 16, 24), {"scale": -0.3}),
    "negative scale, many rows": ((1, 16, 1, 1, 600, 16, 24), {"scale": -0.3}),
    "scale zero": ((1, 2, 1, 1, 600, 16, 24), {"scale": 0.0}),
    "numbers": ((1, 2, 1, 2, 600, 16, 24), {"lam": 0.3, "alpha": 1.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, dtype):
    shape, options = CASES[case]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(dtype)}
    actual = check(inputs_of(shape, dtype) | options)
    assert (actual["out"][actual["lse"][0] == -INF] == 0).all()


def test_no_key_is_left():
    padding = torch.arange(600) < torch.tensor([[600], [300]])
    actual = check(inputs_of((2, 2, 1, 2, 600, 16, 24)) | {"key_padding_mask": padding})
    assert (actual["out"][0] == 0).all() and (actual["lse"][:, 0] == -INF).all()


def test_packed_beside_long_queries_and_short_keys():
    lengths_q, lengths_k = (1, 40, 2, 0, 3, 1), (600, 500, 5, 300, 257, 700)
    starts_q, starts_k = (torch.tensor([0, *each]).cumsum(0) for each in (lengths_q, lengths_k))
    dense = inputs_of((1, 4, 2, sum(lengths_q), sum(lengths_k), 24, 40))
    packed = {name: x[0].transpose(0, 1) for name, x in dense.items()}
    layout = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    layout |= {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    check(packed | layout | NORM | {"is_causal": True}, rdfkern.diff_attention_varlen)


@pytest.mark.parametrize("keys", [600, 5000])
def test_gradients_from_saved_rows(keys):
    """With 5,000 keys the second map's rows are kept, too."""
    inputs = {name: x.detach() for name, x in inputs_of((1, 2, 2, 3, keys, 16, 40)).items()}
    upstream = rand(1, 2, 3, 40, seed=10)

    def gradients(impl, wide=False):
        leaves, norm = dict(inputs), dict(NORM)
        if wide:
            leaves = {name: x.double() for name, x in leaves.items()}
            norm["norm_weight"] = norm["norm_weight"].double()
        leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        out = rdfkern.diff_attention(**leaves, is_causal=True, **norm, impl=impl)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    actual, plain, truth = gradients("cpu"), gradients("reference"), gradients("reference", True)
    # Gradients of lam and alpha are a few sums that nearly cancel (see test_diff_attention_cpu.py).
    assert_within_budget(actual, plain, truth, factor=6.0)


def test_one_map():
    inputs = inputs_of((1, 4, 2, 2, 600, 16, 24))
    q, k, v = inputs["q1"], inputs["k1"], inputs["v"]
    options = {"cu_seqlens": None, "max_seqlen": None, "key_padding_mask": None, "scale": 0.25}
    k2, v2 = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k2, v2, scale=0.25)
    torch.testing.assert_close(op.attention(q, k, v, **options, impl="cpu"), expected)


def test_bits_depend_on_neither_threads_nor_batch():
    before = torch.get_num_threads()
    inputs = inputs_of((3, 4, 2, 1, 1500, 16, 24))
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(rdfkern.diff_attention(**inputs, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = rdfkern.diff_attention(**{name: x[1:2] for name, x in inputs.items()}, impl="cpu")
    assert torch.equal(results[0][1:2], alone)


def test_cached_decode_equals_full_causal():
    length = 300
    inputs = inputs_of((2, 4, 2, length, length, 16, 40))
    full = rdfkern.diff_attention(**inputs, is_causal=True, **NORM, impl="reference")
    for step in (PART - 1, PART, PART + 1, length - 1):
        seen = {name: inputs[name][:, :, : step + 1] for name in ("k1", "k2", "v")}
        one = {name: x[:, :, step : step + 1] for name, x in inputs.items() if name not in seen}
        out = rdfkern.diff_attention(**seen, **one, is_causal=True, **NORM, impl="cpu")
        torch.testing.assert_close(out, full[:, :, step : step + 1])


def in_parts(v, parts):
    """v as (B, Hkv, Lk, P, Dv / P), the parts in memory of their own."""
    return torch.stack(v.chunk(parts, dim=-1)).movedim(0, 3)


@pytest.mark.parametrize("impl", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(("lq", "lk"), [(1, 600), (40, 600), (3, 70), (70, 5000)])
@pytest.mark.parametrize(("value_dim", "parts"), [(64, 2), (40, 2), (96, 3), (32, 1)])
def test_values_in_parts(value_dim, parts, lq, lk, impl):
    inputs = inputs_of((2, 2, 1, lq, lk, 16, value_dim))
    options = {"is_causal": True, "norm_eps": 1e-5, "impl": impl}
    apart = inputs | {"v": in_parts(inputs["v"], parts)}
    joined = rdfkern.diff_attention(**inputs, **options)
    torch.testing.assert_close(rdfkern.diff_attention(**apart, **options), joined)
    leaf = apart["v"].requires_grad_()
    out = rdfkern.diff_attention(**apart, **options)
    out.square().sum().backward()
    whole = inputs["v"].clone().requires_grad_()
    rdfkern.diff_attention(**inputs | {"v": whole}, **options).square().sum().backward()
    torch.testing.assert_close(leaf.grad.flatten(3), whole.grad)


def test_values_in_parts_are_not_copied():
    """Bits are those of joined values, which a copy would give too; so the kernel is asked."""
    inputs = inputs_of((1, 2, 2, 1, 600, 16, 64))
    parts = in_parts(inputs["v"], 2)
    seen = []
    forward = native.forward

    def spy(*tensors, **options):
        seen.append(tensors[4].data_ptr())
        forward(*tensors, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "forward", spy)
        out = rdfkern.diff_attention(**inputs | {"v": parts}, impl="cpu")
    assert seen == [parts.data_ptr()]
    assert torch.equal(out, rdfkern.diff_attention(**inputs, impl="cpu"))


def test_bad_parts_are_named():
    inputs = inputs_of((1, 2, 2, 1, 300, 16, 64))
    for wrong in (in_parts(inputs["v"], 2)[:, :, :-1], in_parts(inputs["v"], 2)[..., None]):
        with pytest.raises(ValueError, match="v must have shape"):
            rdfkern.diff_attention(**inputs | {"v": wrong})
    with pytest.raises(ValueError, match="v must have a head dim"):
        rdfkern.diff_attention(**inputs | {"v": in_parts(inputs["v"], 2)[:, :, :, :0]})


FEW = "csrc/cpu/diff_attention_fwd_few.cpp"
FAULTS = {
    "the last rows see what the first ones do": (
        FEW,
        "group.row(group.rows() - 1).keys_end()",
        "group.row(0).keys_end()",
        "reference and causal or grouped",
    ),
    "no mask for the second map": (
        FEW,
        "group.row(r).mask(task.first_key, keys, scores + map * group.second_map() + r, columns);",
        "group.row(r).mask(task.first_key, keys, scores + r, columns);",
        "reference and grouped",
    ),
    "parts count alike": (
        FEW,
        "factors[p] = std::exp2(results(p)[at] - base);",
        "factors[p] = 1.0f;",
        "reference and one",
    ),
    "a dead row": (FEW, "p < task.parts && base > -kInfinity;", "p < task.parts;", "dead or left"),
    "keys of the first part again": (
        FEW,
        "const int64_t first_key = sequence.first_key + task.first_key;",
        "const int64_t first_key = sequence.first_key;",
        "reference and one",
    ),
    "rows of the first map twice": (
        FEW,
        "row_products(queries[map] + r * width, keys[map]",
        "row_products(queries[0] + r * width, keys[map]",
        "reference and one",
    ),
    "the first part again": (
        "csrc/cpu/diff_attention.h",
        "rows.data += part * part_stride_ * bytes_of(v.type);",
        "",
        "parts",
    ),
    "parts over each other": (
        FEW,
        " + part * problem_.part_dim, value_width",
        ", value_width",
        "parts",
    ),
    "scale without its sign": (FEW, "here, width) * sign();", "here, width);", "negative"),
    "keys after the last one": (
        "csrc/cpu/rows.h",
        "std::min(lane, count - 1)",
        "std::min<int64_t>(lane, 0)",
        "reference and one",
    ),
    "lanes in another order": (
        "csrc/cpu/simd.h",
        "add_halves<STEP>(rows[row], rows[row + STEP], lanes)",
        "add_halves<STEP>(rows[row + STEP], rows[row], lanes)",
        "reference and one",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, catches):
    catches(*FAULTS[fault][:3], "test_diff_attention_cpu_few.py", FAULTS[fault][3])
