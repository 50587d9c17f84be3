"""The CUDA C++ kernels of differential attention against the reference, run by the CPU emulator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rdfkern
from rdfkern._backends import jit
from rdfkern._backends.dispatch import Implementation
from rdfkern.ops.diff_attention import api, cuda
from rdfkern.ops.diffusion import api as diffusion
from rdfkern.testing import assert_within_budget, worst_of

INF = float("inf")
# As for the CPU kernels: a largest error is one draw of noise, most of all in row sums that nearly
# cancel, so gradients get a little more than the rule's factor of 2.
GRADIENT = 3.0
NOISY = 6.0
OPERATORS = ("_diff_attention_fwd_cuda", "_diff_attention_bwd_cuda")


@pytest.fixture(scope="module")
def emulator(cuda_emulator):
    return cuda_emulator.load("diff_attention.cu", OPERATORS)


@pytest.fixture(scope="module", autouse=True)
def kernels_take_cpu_tensors(emulator):
    """Fresh memory is NaN, and impl="cuda" runs here without a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jit._outcomes, "cuda", None)
        for operation in (api.DENSE, api.VARLEN, api.TEMPORAL):
            emulated = Implementation(".ops.diff_attention.cuda")
            patch.setitem(operation.implementations, "cuda", emulated)
        torch.use_deterministic_algorithms(True)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        yield
        torch.use_deterministic_algorithms(False)


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(shape, dtype, seed=1):
    """(B, H, Hkv, Lq, Lk, D, Dv) -> q1, k1, q2, k2, v in dtype, lam and alpha in float32."""
    batch, heads, kv_heads, lq, lk, dim, value_dim = shape
    query, key = (batch, heads, lq, dim), (batch, kv_heads, lk, dim)
    shapes = (query, key, query, key, (batch, kv_heads, lk, value_dim))
    tensors = [rand(*s, seed=10 * seed + at).to(dtype) for at, s in enumerate(shapes)]
    coefficients = [rand(batch, heads, lq, seed=10 * seed + 5 + at).abs() for at in range(2)]
    return [*tensors, *coefficients]


def run(impl, inputs, upstream, wide=False, function=rdfkern.diff_attention, **options):
    """Output, normalisers and all gradients, by name; `wide` computes in float64."""

    def leaf(value):
        return (value.double() if wide else value).detach().requires_grad_()

    names = ("q1", "k1", "q2", "k2", "v", "lam", "alpha")
    leaves = dict(zip(names, map(leaf, inputs), strict=True))
    if "norm_weight" in options:
        leaves["norm_weight"] = leaf(options["norm_weight"])
    mask = options.get("attn_mask")
    if wide and isinstance(mask, Tensor) and mask.is_floating_point():
        options = options | {"attn_mask": mask.double()}
    out, lse = function(**(options | leaves), return_lse=True, impl=impl)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach(), "lse": lse, **dict(zip(leaves, grads, strict=True))}


def check(inputs, seed=99, **options):
    q1, v = inputs[0], inputs[4]
    upstream = rand(*q1.shape[:-1], v.shape[-1], seed=seed).to(q1.dtype)
    actual = run("cuda", inputs, upstream, **options)
    plain = run("reference", inputs, upstream, **options)
    truth = run("reference", inputs, upstream, wide=True, **options)
    if q1.dtype != torch.float32:  # inside, the reference is not of this dtype
        plain = worst_of(plain, run("torch", inputs, upstream, **options), truth=truth)
    outputs, coefficients = {"out", "lse"}, {"lam", "alpha"}
    gradients = actual.keys() - outputs - coefficients
    for names, factor in ((outputs, 2.0), (gradients, GRADIENT), (coefficients, NOISY)):
        parts = ({name: values[name] for name in names} for values in (actual, plain, truth))
        assert_within_budget(*parts, factor=factor)
    return actual


DEAD_AND_PADDED = torch.arange(70) >= torch.tensor([[50], [0]])
NORM = {"norm_eps": 1e-5, "norm_weight": rand(40, seed=6).abs() + 0.5, "out_scale": 0.7}


def _bias():
    bias = rand(2, 1, 33, 70, seed=5)
    bias[bias > 1.5] = -INF
    bias[1, 0, 7] = -INF
    return bias


CASES = {
    "one key": ((1, 2, 2, 5, 1, 16, 32), {}),
    "one query": ((2, 2, 1, 1, 77, 24, 40), NORM),
    "grouped": ((2, 6, 2, 17, 31, 24, 40), {}),
    "odd widths": ((1, 1, 1, 33, 65, 7, 13), {}),
    "width one": ((1, 2, 2, 9, 9, 1, 16), {}),
    "causal": ((1, 1, 1, 67, 67, 64, 128), {"is_causal": True}),
    "causal, more keys": ((1, 2, 1, 65, 99, 16, 40), {"is_causal": True} | NORM),
    "causal, more queries": ((1, 1, 1, 130, 60, 16, 32), {"is_causal": True}),
    "window": ((1, 2, 2, 100, 90, 16, 32), {"window": (20, 3)}),
    "window right": ((1, 1, 1, 90, 90, 16, 32), {"window": (-1, 0)}),
    "window beside all keys": ((1, 1, 1, 40, 10, 16, 32), {"window": (2, 2)}),
    "padding, dead sequence": ((2, 2, 2, 33, 70, 16, 40), {"key_padding_mask": DEAD_AND_PADDED}),
    "bool mask": ((2, 2, 1, 33, 70, 16, 40), {"attn_mask": rand(33, 70, seed=3) > 0.3} | NORM),
    "bias with a dead row": ((2, 2, 2, 33, 70, 16, 40), {"attn_mask": _bias()} | NORM),
    "bias and all masks": (
        (2, 2, 2, 33, 70, 16, 40),
        {
            "attn_mask": _bias(),
            "key_padding_mask": DEAD_AND_PADDED,
            "is_causal": True,
            "window": (30, 5),
        },
    ),
    "negative scale": ((1, 1, 1, 33, 40, 16, 40), {"scale": -0.2}),
    "scale zero": ((1, 1, 1, 33, 40, 16, 40), {"scale": 0.0, "is_causal": True}),
    "norm without weight": ((1, 2, 2, 20, 20, 16, 40), {"norm_eps": 1e-3}),
    "many keys": ((1, 1, 1, 20, 300, 32, 40), NORM),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype):
    shape, options = CASES[case]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(dtype)}
    actual = check(inputs_of(shape, dtype), **options)
    dead = actual["lse"][0] == -INF
    for name in ("out", "q1", "q2", "lam", "alpha"):
        assert (actual[name][dead] == 0).all(), name


@pytest.mark.parametrize("widths", [*itertools.product((64, 65, 200), (60, 128, 256))])
def test_every_size_class(widths):
    check(inputs_of((1, 1, 1, 35, 33, *widths), torch.float32), is_causal=True)


@pytest.mark.parametrize("length", [1, 16, 31, 32, 33, 63, 64, 65])
def test_lengths_around_the_blocks(length):
    for shape, causal in (
        ((1, 1, 1, length, 34, 8, 16), False),
        ((1, 1, 1, 34, length, 8, 16), True),
    ):
        check(inputs_of(shape, torch.float32, length), is_causal=causal)


SCHEDULES = [
    *((name, 0) for name in ("forward", "reverse", "round robin")),
    *itertools.product(("eager warps", "random"), (1, 2)),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "{}-{}".format(*schedule))
def test_every_schedule_gives_the_same_bits(schedule, emulator):
    shape, options = (1, 2, 1, 66, 40, 20, 36), {"is_causal": True, "norm_eps": 1e-5}
    inputs, upstream = inputs_of(shape, torch.float32), rand(1, 2, 66, 36, seed=9)
    expected = run("cuda", inputs, upstream, **options)
    with emulator.schedule(*schedule):
        actual = run("cuda", inputs, upstream, **options)
        check(inputs, **options)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views_without_unit_strides_too(dtype):
    batch, heads, length, dim = 2, 3, 37, 16
    packed = rand(batch, length, heads, 4, dim, seed=1).to(dtype)
    q1, k1, q2, k2 = (packed[:, :, :, at].transpose(1, 2) for at in range(4))
    every_other = rand(batch, heads, length, 2 * dim, seed=2).to(dtype)[..., ::2]
    wide = rand(batch, heads, 1, 1, seed=3).to(dtype).expand(batch, heads, length, 24)
    lam = rand(heads, 1, seed=4).expand(batch, heads, length)
    alpha = rand(batch, heads, 2 * length, seed=5)[..., ::2]
    mask = (rand(length, batch, seed=6) > -1).T[:, None, None, :]
    check([q1, every_other, q2, k2, wide, lam, alpha], is_causal=True, attn_mask=mask)


ODD = {"start": (20, 1, 16), "row stride": (21, 0, 16), "width": (20, 0, 18)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ODD)
def test_rows_of_which_four_elements_cannot_be_read_at_once(case, dtype):
    whole, start, width = ODD[case]
    inputs = inputs_of((1, 2, 1, 19, 35, whole, whole), dtype)
    check([*(x[..., start : start + width] for x in inputs[:5]), *inputs[5:]], norm_eps=1e-5)


LENGTHS = ((5, 9), (0, 4), (64, 65), (3, 0), (0, 0), (1, 1), (17, 70))


def packed_inputs(dtype, heads=4, kv_heads=2, dim=24, value_dim=40):
    cu_q, cu_k = (
        torch.tensor([0, *(pair[side] for pair in LENGTHS)]).cumsum(0).int() for side in range(2)
    )
    tq, tk = int(cu_q[-1]), int(cu_k[-1])
    shapes = ((tq, heads, dim), (tk, kv_heads, dim)) * 2 + ((tk, kv_heads, value_dim),)
    tensors = [rand(*s, seed=at).to(dtype) for at, s in enumerate(shapes)]
    coefficients = [rand(tq, heads, seed=5 + at) for at in range(2)]
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 64, "max_seqlen_k": 70}
    return [*tensors, *coefficients], layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (7, 2)} | NORM])
def test_packed_sequences(options, dtype):
    inputs, layout = packed_inputs(dtype)
    padding = rand(layout["cu_seqlens_k"][-1], seed=8) > 0.8
    packed = {"function": rdfkern.diff_attention_varlen, "key_padding_mask": padding}
    check(inputs, **packed, **layout, **options)


def test_maximal_lengths_may_be_too_long():
    inputs, layout = packed_inputs(torch.float32)
    upstream = rand(*inputs[0].shape[:2], 40, seed=1)
    varlen = rdfkern.diff_attention_varlen
    expected = run("cuda", inputs, upstream, function=varlen, **layout)
    layout |= {"max_seqlen_q": 1000, "max_seqlen_k": 2000}
    actual = run("cuda", inputs, upstream, function=varlen, **layout)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("keys", [20, 70])
def test_dropout_is_that_of_the_cpu_kernels(keys):
    if reason := rdfkern.available_backends("diff_attention")["cpu"]:
        pytest.skip(reason)
    inputs = inputs_of((2, 4, 2, 37, keys, 16, 24), torch.float32)
    upstream, options = rand(2, 4, 37, 24, seed=1), {"dropout_p": 0.3, "is_causal": True}
    results = {}
    for impl in ("cpu", "cuda"):
        torch.manual_seed(3)
        results[impl] = run(impl, inputs, upstream, **options)
    for name, value in results["cpu"].items():
        torch.testing.assert_close(results["cuda"][name], value, rtol=1e-4, atol=2e-5, msg=name)
    undropped = run("cuda", inputs, upstream, is_causal=True)
    assert torch.equal(undropped["lse"], results["cuda"]["lse"])
    assert not torch.allclose(undropped["out"], results["cuda"]["out"], atol=0.01)


def test_the_lowest_number_of_a_mask_hides_like_infinity():
    tensors = [rand(1, 2, 70, 16, seed=at).requires_grad_() for at in range(5)]
    hidden = rand(1, 1, 70, 70, seed=5) < -0.5
    hidden[..., 7, :] = True
    results = []
    for lowest in (torch.finfo(torch.float32).min, -INF):
        mask = torch.zeros(hidden.shape).masked_fill(hidden, lowest)
        out = rdfkern.diff_attention(*tensors, 0.5, attn_mask=mask, impl="cuda")
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    assert (results[0][0][:, :, 7] == 0).all()
    for lowest, infinite in zip(*results, strict=True):
        assert torch.equal(lowest, infinite)
    with torch.no_grad():
        plain = rdfkern.diff_attention(*tensors, 0.5, attn_mask=mask, impl="cuda")
    assert torch.equal(plain, results[1][0])


def test_repeats_are_bitwise_equal():
    inputs = inputs_of((2, 4, 2, 40, 40, 16, 40), torch.bfloat16)
    upstream = rand(2, 4, 40, 40, seed=1).bfloat16()
    first, second = (run("cuda", inputs, upstream, **NORM) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_a_number_stays(dtype):
    inputs = inputs_of((1, 1, 1, 20, 40, 32, 32), dtype)
    inputs[0][0, 0, 3, 5] = float("nan")
    actual = run("cuda", inputs, rand(1, 1, 20, 32, seed=1).to(dtype))
    rows = torch.arange(20) == 3
    for name in ("out", "q1"):
        assert actual[name][0, 0, rows].isnan().all(), name
        assert actual[name][0, 0, ~rows].isfinite().all(), name
    assert actual["v"].isnan().all()


def test_large_scores_in_half():
    inputs = inputs_of((1, 1, 1, 20, 40, 32, 32), torch.float16)
    check([30 * inputs[0], 30 * inputs[1], *inputs[2:]])


SHAPES = st.tuples(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 140),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    mask=st.sampled_from(["none", "bool", "bias"]),
    norm=st.booleans(),
)
def test_any_shape_and_mask(shape, dtype, causal, window, mask, norm):
    batch, (heads, kv_heads), lq, lk, dim, value_dim = shape
    options = {"is_causal": causal, "window": window}
    if mask != "none":
        values = rand(batch, 1, lq, lk, seed=lq)
        options["attn_mask"] = values > -0.5 if mask == "bool" else values.to(dtype)
    if norm:
        weight = rand(value_dim, seed=lk).abs() + 0.5
        options |= {"norm_eps": 1e-5, "norm_weight": weight, "out_scale": 0.7}
    check(inputs_of((batch, heads, kv_heads, lq, lk, dim, value_dim), dtype, lq), **options)


@pytest.mark.parametrize("form", ["one value", "per step"])
def test_the_temporal_form(form):
    """It is made of the same kernels with one map."""
    q, k, _, _, v, lam, alpha = inputs_of((2, 2, 1, 19, 19, 16, 24), torch.float32)
    padding = rand(2, 19, seed=3) > 0.5
    if form == "one value":
        lam, alpha = (x[:1, :1, :1] for x in (lam, alpha))
    norm = {"norm_eps": 1e-3, "norm_weight": rand(24, seed=5).abs() + 0.5}

    def outcome(impl, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, lam, alpha)]
        *tensors, alpha_ = leaves
        out = rdfkern.temporal_diff_attention(
            *tensors, alpha=alpha_, key_padding_mask=padding, impl=impl, **norm
        )
        upstream = rand(*out.shape, seed=4).to(dtype)
        return out, *torch.autograd.grad(out, leaves, upstream)

    for value, expected in zip(
        outcome("cuda", torch.float32), outcome("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_diffusion(diffusion_of_kernels, monkeypatch):
    emulated = Implementation(".ops.diffusion.cuda")
    monkeypatch.setitem(diffusion.OPERATION.implementations, "cuda", emulated)
    diffusion_of_kernels("cuda")


def test_dropout_of_the_temporal_form(temporal_dropout):
    temporal_dropout("cuda")


@pytest.mark.parametrize("maps", [1, 2])
def test_registered_operators_give_the_shapes_that_their_fakes_promise(maps):
    inputs = list(inputs_of((1, 2, 1, 9, 7, 5, 6), torch.bfloat16))
    if maps == 1:
        inputs[2] = inputs[3] = inputs[5] = None
    options = (*(None,) * 8, -1, -1, 0.0, 1.0, 1e-5, 0.5, "cuda")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rdfkern.diff_attn_fwd, (*inputs, *options), test_utils=checks)
    results = torch.ops.rdfkern.diff_attn_fwd(*inputs, *options)
    upstream = rand(1, 2, 9, 6, seed=1).bfloat16()
    arguments = (upstream, *inputs, *results, *options, False)
    torch.library.opcheck(torch.ops.rdfkern.diff_attn_bwd, arguments, test_utils=checks)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 4, 4), (1, 2, 2, 0, 3, 4, 4)])
def test_empty_inputs_never_reach_the_kernels(shape, monkeypatch):
    monkeypatch.setattr(cuda, "forward", None)
    inputs = inputs_of(shape, torch.float32)
    assert rdfkern.diff_attention(*inputs[:6], impl="cuda").shape == (*inputs[0].shape[:3], 4)


def test_no_keys():
    inputs = inputs_of((1, 2, 2, 3, 0, 4, 4), torch.float32)
    assert (rdfkern.diff_attention(*inputs[:6], impl="cuda") == 0).all()


class OnDevice:
    """What the predicate asks of a tensor, as if it were on a CUDA device."""

    device = torch.device("cuda")

    def __init__(self, width, dtype=torch.float32):
        self.shape, self.dtype = (1, 1, 2, width), dtype


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"q1": torch.empty(1, 1, 2, 8)}, "inputs are on cpu"),
        ({"q1": OnDevice(8, torch.float64)}, "computes in float32, inputs are torch.float64"),
        ({"q1": OnDevice(257)}, "head dims go up to 256, inputs have 257 and 8"),
        ({"v": OnDevice(300)}, "head dims go up to 256, inputs have 8 and 300"),
        ({"attn_mask": torch.empty(2, 2).requires_grad_()}, "attn_mask requires a gradient"),
        ({}, None),
    ],
)
def test_predicate(changes, expected):
    arguments = {"q1": OnDevice(8), "v": OnDevice(8), "attn_mask": None} | changes
    assert cuda.can_run(arguments) == expected
