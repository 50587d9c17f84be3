"""The C++ kernels of differential attention against the reference, at every feature and edge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rdfkern
from rdfkern.ops.diff_attention import native, op
from rdfkern.testing import assert_within_budget

REASON = rdfkern.available_backends("diff_attention")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

INF = float("inf")
# The largest of few errors is one draw of noise, and so is its budget: on another machine, where
# plain torch draws another one, a factor of 2 fails once in a hundred tensors. So the largest error
# may be a little more, most of all in row sums that nearly cancel, but
# `test_rms_error_is_that_of_plain_torch` compares what does not depend on luck.
GRADIENT = 3.0
NOISY = 6.0
HALF_AND_FLOAT = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach().double() if wide else value.detach()
        return value.clone(memory_format=torch.preserve_format).requires_grad_()

    names = ("q1", "k1", "q2", "k2", "v", "lam", "alpha")
    leaves = dict(zip(names, map(leaf, inputs), strict=True))
    if "norm_weight" in options:
        leaves["norm_weight"] = leaf(options["norm_weight"])
    if options.get("attn_mask") is not None and wide and options["attn_mask"].is_floating_point():
        options = options | {"attn_mask": options["attn_mask"].double()}
    out, lse = function(**(options | leaves), return_lse=True, impl=impl)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach(), "lse": lse, **dict(zip(leaves, grads, strict=True))}


def check(inputs, seed=99, noisy=NOISY, **options):
    q1, v = inputs[0], inputs[4]
    upstream = rand(*q1.shape[:-1], v.shape[-1], seed=seed).to(q1.dtype)
    actual = run("cpu", inputs, upstream, **options)
    plain = run("reference", inputs, upstream, **options)
    truth = run("reference", inputs, upstream, wide=True, **options)
    outputs, coefficients = {"out", "lse"}, {"lam", "alpha"}
    gradients = actual.keys() - outputs - coefficients
    for names, factor in ((outputs, 2.0), (gradients, GRADIENT), (coefficients, noisy)):
        parts = ({name: values[name] for name in names} for values in (actual, plain, truth))
        assert_within_budget(*parts, factor=factor)
    return actual


DEAD_AND_PADDED = torch.arange(70) >= torch.tensor([[50], [0]])


def _bias():
    bias = rand(2, 1, 33, 70, seed=5)
    bias[bias > 1.5] = -INF
    bias[1, 0, 7] = -INF
    return bias


NORM = {"norm_eps": 1e-5, "norm_weight": rand(40, seed=6).abs() + 0.5, "out_scale": 0.7}
CASES = {
    "one key": ((1, 2, 2, 5, 1, 16, 32), {}),
    "one query": ((2, 2, 1, 1, 77, 24, 40), NORM),
    "grouped": ((2, 6, 2, 17, 31, 24, 40), {}),
    "odd widths": ((1, 1, 1, 33, 65, 7, 13), {}),
    "width one": ((1, 2, 2, 9, 9, 1, 16), {}),
    "widest": ((1, 1, 1, 65, 66, 256, 512), {}),
    "causal": ((1, 2, 2, 129, 129, 64, 128), {"is_causal": True}),
    "causal, more keys": ((1, 2, 1, 65, 300, 16, 40), {"is_causal": True} | NORM),
    "causal, more queries": ((1, 1, 1, 150, 60, 16, 32), {"is_causal": True}),
    "window": ((1, 2, 2, 200, 190, 16, 32), {"window": (20, 3)}),
    "window right": ((1, 1, 1, 140, 140, 16, 32), {"window": (-1, 0)}),
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
    "many keys": ((1, 1, 1, 70, 700, 32, 40), NORM),
    "split over keys": ((1, 1, 1, 600, 1100, 16, 40), {"is_causal": True} | NORM),
}


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
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


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_the_blocks(length):
    for shape, causal in (
        ((1, 1, 1, length, 66, 8, 16), False),
        ((1, 1, 1, 66, length, 8, 16), True),
    ):
        check(inputs_of(shape, torch.float32, length), is_causal=causal)


@pytest.mark.parametrize("keys", [66, 400])
def test_rms_error_is_that_of_plain_torch(keys):
    squares = {}
    for seed in range(8):
        inputs = inputs_of((1, 2, 2, 66, keys, 64, 128), torch.float32, seed)
        upstream = rand(1, 2, 66, 128, seed=seed)
        truth = run("reference", inputs, upstream, wide=True)
        for impl in ("cpu", "reference"):
            for name, value in run(impl, inputs, upstream).items():
                error = (value.double() - truth[name]).square().mean()
                squares[name, impl] = squares.get((name, impl), 0.0) + float(error)
    for name in truth:
        assert squares[name, "cpu"] ** 0.5 < 1.4 * squares[name, "reference"] ** 0.5, name


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
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


LENGTHS = ((5, 9), (0, 4), (64, 65), (3, 0), (110, 110), (0, 0), (1, 1), (17, 130))


def packed_inputs(dtype, heads=4, kv_heads=2, dim=24, value_dim=40):
    cu_q, cu_k = (
        torch.tensor([0, *(pair[side] for pair in LENGTHS)]).cumsum(0).int() for side in range(2)
    )
    tq, tk = int(cu_q[-1]), int(cu_k[-1])
    shapes = ((tq, heads, dim), (tk, kv_heads, dim)) * 2 + ((tk, kv_heads, value_dim),)
    tensors = [rand(*s, seed=at).to(dtype) for at, s in enumerate(shapes)]
    coefficients = [rand(tq, heads, seed=5 + at) for at in range(2)]
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 110, "max_seqlen_k": 130}
    return [*tensors, *coefficients], layout


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (7, 2)} | NORM])
def test_packed_sequences(options, dtype):
    inputs, layout = packed_inputs(dtype)
    check(inputs, function=rdfkern.diff_attention_varlen, **layout, **options)


def test_packed_padding_and_64_bit_offsets():
    inputs, layout = packed_inputs(torch.float32)
    padding = rand(inputs[1].shape[0], seed=8) > 0.5
    layout |= {"cu_seqlens_q": layout["cu_seqlens_q"].long()}
    check(
        inputs, function=rdfkern.diff_attention_varlen, key_padding_mask=padding, **layout, **NORM
    )


def test_packed_long_sequence_is_split_over_keys():
    cu = torch.tensor([0, 700, 720])
    inputs = [rand(720, 1, dim, seed=at) for at, dim in enumerate((24, 24, 24, 24, 20))]
    inputs += [rand(720, 1, seed=7), rand(720, 1, seed=8)]
    layout = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=700, max_seqlen_k=700)
    check(inputs, function=rdfkern.diff_attention_varlen, is_causal=True, **layout)


@st.composite
def problems(draw):
    kv_heads = draw(st.integers(1, 2))
    lengths = st.sampled_from([15, 33, 63, 64, 65, 128, 129])
    shape = (
        draw(st.integers(1, 2)),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(lengths),
        draw(lengths),
        draw(st.sampled_from([8, 16, 24, 64, 100])),
        draw(st.sampled_from([16, 24, 33, 128])),
    )
    options = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        side = st.sampled_from([-1, 0, 5, 40])
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options |= {"norm_eps": 1e-5, "norm_weight": rand(shape[-1], seed=3).abs() + 0.5}
    return shape, draw(st.sampled_from(HALF_AND_FLOAT)), draw(st.integers(0, 99)), options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_error_budget_on_drawn_problems(problem):
    shape, dtype, seed, options = problem
    # The norm of a row that happens to be short multiplies its noise.
    check(inputs_of(shape, dtype, seed), noisy=5 * NOISY, **options)


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 6e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_float_rounded_once(dtype, magnitude):
    """Of subnormal and overflowing float16 as well: the widths convert as torch does."""
    half = [x.to(dtype) for x in inputs_of((1, 2, 1, 20, 9, 16, 37), torch.float32)[:5]]
    half[4] = half[4].clamp(-1.08, 1.08) * magnitude
    wide = [x.float() for x in half]
    out, lse = rdfkern.diff_attention(*half, -1.0, return_lse=True, impl="cpu")
    expected, expected_lse = rdfkern.diff_attention(*wide, -1.0, return_lse=True, impl="cpu")
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(lse, expected_lse)


def test_nan_is_not_hidden():
    inputs = inputs_of((1, 1, 1, 20, 30, 16, 16), torch.float32)
    inputs[0][0, 0, 3, 2] = float("nan")
    inputs[2][0, 0, 5, 2] = INF
    out = rdfkern.diff_attention(*inputs[:6], impl="cpu")
    assert out[0, 0, 3].isnan().all() and out[0, 0, 5].isnan().all()
    assert out[0, 0, 6:].isfinite().all()


def test_large_scores_neither_overflow_nor_vanish():
    inputs = inputs_of((1, 1, 1, 40, 300, 16, 16), torch.float32)
    inputs[:4] = inputs[0] * 9, inputs[1] * 9, inputs[2] + 6, inputs[3] - 6
    upstream = rand(1, 1, 40, 16, seed=1)
    actual, truth = (run(impl, inputs, upstream) for impl in ("cpu", "reference"))
    for name, value in actual.items():
        assert (value - truth[name]).abs().max() < 1e-4 * truth[name].abs().max(), name


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 3, 4, 4), (2, 2, 1, 0, 3, 4, 4), (1, 2, 1, 3, 0, 4, 4)]
)
def test_empty(shape):
    inputs = inputs_of(shape, torch.float32)
    upstream = torch.ones(*inputs[0].shape[:-1], shape[-1])
    norm = {"norm_eps": 1e-5, "norm_weight": torch.ones(4)}
    result = run("cpu", inputs, upstream, **norm)
    assert (result.pop("lse") == -INF).all()
    for name, value in result.items():
        assert (value == 0).all(), name


def test_results_do_not_depend_on_the_rest_of_the_batch():
    inputs, layout = packed_inputs(torch.float32)
    whole = rdfkern.diff_attention_varlen(*inputs[:6], **layout, is_causal=True, impl="cpu")
    for at in (0, 2, 4, 7):
        rows = slice(*layout["cu_seqlens_q"][at : at + 2].tolist())
        keys = slice(*layout["cu_seqlens_k"][at : at + 2].tolist())
        parts = [x[keys if name in (1, 3, 4) else rows] for name, x in enumerate(inputs[:6])]
        dense = [x.transpose(0, 1)[None] for x in parts[:5]]
        alone = rdfkern.diff_attention(*dense, parts[5].mT, is_causal=True, impl="cpu")
        assert torch.equal(alone[0].transpose(0, 1), whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_lowest_number_of_a_mask_hides_like_infinity(dtype):
    tensors = [torch.randn(1, 2, 300, 16, dtype=dtype, requires_grad=True) for _ in range(5)]
    hidden = torch.rand(1, 1, 300, 300) < 0.3
    hidden[..., 7, :] = True
    results = []
    for lowest in (torch.finfo(dtype).min, -INF):
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, lowest)
        out = rdfkern.diff_attention(*tensors, 0.5, attn_mask=mask, impl="cpu")
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    assert (results[0][0][:, :, 7] == 0).all()
    for lowest, infinite in zip(*results, strict=True):
        torch.testing.assert_close(lowest, infinite, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("keys", [256, 4097])
def test_rows_for_backward_are_kept_only_where_it_needs_them(keys, norm_eps, dtype):
    inputs = inputs_of((1, 2, 2, 9, keys, 16, 16), dtype)[:5]
    tensors = [x.requires_grad_() for x in inputs]
    kept = []
    forward = native.forward

    def spy(*tensors, **options):
        kept.append([rows.numel() for rows in tensors[-2:]])
        forward(*tensors, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "forward", spy)
        needed = rdfkern.diff_attention(*tensors, 0.5, norm_eps=norm_eps, impl="cpu")
        with torch.no_grad():
            plain = rdfkern.diff_attention(*tensors, 0.5, norm_eps=norm_eps, impl="cpu")
    assert torch.equal(needed, plain)
    many = keys == 4097
    needs_o = norm_eps is not None or (many and dtype != torch.float32)
    assert kept == [[288 if many else 0, 288 if needs_o else 0], [0, 0]]


def test_rows_are_kept_where_threads_share_the_keys_of_a_head(monkeypatch):
    """Without them a single head would be differentiated by a single thread."""
    k = torch.empty(1, 3, 600, 16)
    cu_seqlens = torch.tensor([0, 600])
    for threads, dense, packed in ((1, False, False), (3, False, True), (2, True, True)):
        monkeypatch.setattr(op, "_num_threads", lambda threads=threads: threads)
        assert op._keeps_o2("cpu", k, None, 600) == dense
        assert op._keeps_o2("cpu", k, cu_seqlens, 600) == packed
        assert op._keeps_o2("triton", k, None, 600)


@pytest.mark.parametrize("shape", [(2, 4, 2, 90, 70, 24, 40), (1, 1, 1, 600, 800, 16, 24)])
def test_bitwise_equal_over_repeats(shape):
    inputs = inputs_of(shape, torch.float32)
    upstream = rand(*inputs[0].shape[:-1], shape[-1], seed=1)
    options = {"is_causal": True, "norm_eps": 1e-5, "norm_weight": torch.ones(shape[-1])}
    first = run("cpu", inputs, upstream, **options)
    for _ in range(20):
        for name, value in run("cpu", inputs, upstream, **options).items():
            assert torch.equal(value, first[name]), name


class TestDropout:
    LENGTH = 256

    def maps(self, p, seed, alpha=1.0, lam=0.0, **options):
        """Entries of alpha A1 - lam A2 under dropout: v is the identity, all scores are 0."""
        torch.manual_seed(seed)
        zeros = torch.zeros(2, 2, self.LENGTH, 8)
        v = torch.eye(self.LENGTH).expand(2, 2, -1, -1)
        return rdfkern.diff_attention(
            zeros, zeros, zeros, zeros, v, lam, alpha=alpha, dropout_p=p, impl="cpu", **options
        )

    def test_statistics(self):
        p = 0.3
        first, second = self.maps(p, 0), -self.maps(p, 0, alpha=0.0, lam=1.0)
        for entries in (first, second):
            kept = entries != 0
            assert torch.allclose(entries[kept] * self.LENGTH, torch.tensor(1 / (1 - p)))
            assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
            for dim in (2, 3):
                rates = kept.double().mean(dim)
                assert (rates - (1 - p)).abs().max() < 6 * (p * (1 - p) / self.LENGTH) ** 0.5
        kept = [(x != 0).double() - (1 - p) for x in (first, second)]
        pairs = [
            (kept[0], kept[1]),
            (kept[0][0], kept[0][1]),
            (kept[0][:, 0], kept[0][:, 1]),
            (kept[0][:, :, 1:], kept[0][:, :, :-1]),
            (kept[0][..., 1:], kept[0][..., :-1]),
        ]
        for a, b in pairs:
            assert abs((a * b).mean()) < 5 * p * (1 - p) / a.numel() ** 0.5

    def test_seed_decides(self):
        assert torch.equal(self.maps(0.5, 1), self.maps(0.5, 1))
        assert not torch.equal(self.maps(0.5, 1), self.maps(0.5, 2))

    def test_lse_and_masks_are_without_dropout(self):
        out, lse = self.maps(0.5, 1, is_causal=True, return_lse=True)
        expected = torch.arange(1, self.LENGTH + 1).log()
        torch.testing.assert_close(lse, expected.expand_as(lse))
        assert (out.triu(1) == 0).all()

    @pytest.mark.parametrize("shape", [(2, 4, 2, 40, 50, 16, 24), (1, 2, 1, 70, 400, 16, 24)])
    def test_gradients_use_the_same_entries(self, shape):
        """Against the formula with the dropout factors that the kernel itself shows."""
        p, lk = 0.4, shape[4]
        q1, k1, q2, k2, v, lam, alpha = inputs_of(shape, torch.float32)
        group = shape[1] // shape[2]
        eye = torch.eye(lk).expand(shape[0], shape[2], lk, lk)
        keep = []
        for pair in ((1.0, 0.0), (0.0, -1.0)):
            torch.manual_seed(3)
            zeros = (torch.zeros_like(x) for x in (q1, k1, q2, k2))
            shown = rdfkern.diff_attention(
                *zeros, eye, pair[1], alpha=pair[0], dropout_p=p, impl="cpu"
            )
            keep.append((shown != 0).double() / (1 - p))
        leaves = [x.clone().requires_grad_() for x in (q1, k1, q2, k2, v, lam, alpha)]
        torch.manual_seed(3)
        out = rdfkern.diff_attention(
            *leaves[:6], alpha=leaves[6], dropout_p=p, norm_eps=1e-5, impl="cpu"
        )
        wide = [x.detach().double().requires_grad_() for x in leaves]
        heads = [
            x.repeat_interleave(group, 1) if at in (1, 3, 4) else x for at, x in enumerate(wide)
        ]
        scale = shape[5] ** -0.5
        a1 = torch.softmax(heads[0] @ heads[1].mT * scale, -1) * keep[0]
        a2 = torch.softmax(heads[2] @ heads[3].mT * scale, -1) * keep[1]
        o = (heads[6][..., None] * a1 - heads[5][..., None] * a2) @ heads[4]
        truth = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5)
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-4)
        upstream = rand(*out.shape, seed=4)
        grads = torch.autograd.grad(out, leaves, upstream)
        for got, want in zip(
            grads, torch.autograd.grad(truth, wide, upstream.double()), strict=True
        ):
            assert (got - want).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))


class TestRegisteredOperators:
    def arguments(self, packed=False, maps=2):
        if packed:
            inputs, layout = packed_inputs(torch.float32)
            tensors, rows = inputs[:5], inputs[5:]
            lengths = (layout["cu_seqlens_q"], layout["cu_seqlens_k"])
            longest = (layout["max_seqlen_q"], layout["max_seqlen_k"])
        else:
            *tensors, lam, alpha = inputs_of((2, 4, 2, 17, 20, 24, 40), torch.float32)
            tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
            rows, lengths, longest = [lam, alpha], (None, None), (None, None)
        if maps == 1:
            tensors[2] = tensors[3] = rows[0] = None
        weight = torch.ones(40)
        options = (None, None, weight, *lengths, None, *longest, -1, 0, 0.0, 0.2, 1e-5, 0.7, "cpu")
        return (*tensors, *rows, *options)

    @pytest.mark.parametrize("keeps_o2", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("maps", [1, 2])
    def test_opcheck(self, maps, packed, keeps_o2):
        arguments, keeps = self.arguments(packed, maps), {"keeps_o2": keeps_o2}
        torch.library.opcheck(torch.ops.rdfkern.diff_attn_fwd.default, arguments, keeps)
        saved = torch.ops.rdfkern.diff_attn_fwd(*arguments, **keeps)
        grad = torch.ones_like(saved[0])
        torch.library.opcheck(
            torch.ops.rdfkern.diff_attn_bwd.default,
            (grad, *arguments[:7], *saved, *arguments[7:], True),
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_forward_and_backward(self, dtype, dynamic):
        leaves = [x.requires_grad_() for x in inputs_of((2, 4, 2, 17, 20, 24, 40), dtype)]

        def attend(q1, k1, q2, k2, v, lam, alpha):
            return rdfkern.diff_attention(
                q1, k1, q2, k2, v, lam, alpha=alpha, is_causal=True, norm_eps=1e-5
            )

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        outs = [f(*leaves) for f in (attend, compiled)]
        assert torch.equal(*outs)
        grads = [torch.autograd.grad(out.sum(), leaves) for out in outs]
        assert all(map(torch.equal, *grads))

    def test_compiled_dropout_draws_anew_and_packed_traces(self):
        inputs, layout = packed_inputs(torch.float32)

        def attend(*tensors):
            return rdfkern.diff_attention_varlen(*tensors, **layout, dropout_p=0.5, impl="cpu")

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert not torch.equal(compiled(*inputs[:6]), compiled(*inputs[:6]))

    def test_export(self):
        class Attend(torch.nn.Module):
            def forward(self, *tensors):
                return rdfkern.diff_attention(*tensors, is_causal=True)

        inputs = tuple(inputs_of((2, 4, 2, 17, 20, 24, 40), torch.float32)[:6])
        program = torch.export.export(Attend(), inputs)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("rdfkern.diff_attn_fwd.default") == 1
        assert torch.equal(program.module()(*inputs), Attend()(*inputs))

    def test_double_backward_is_refused(self):
        leaves = [x.requires_grad_() for x in inputs_of((1, 1, 1, 4, 4, 4, 4), torch.float32)]
        out = rdfkern.diff_attention(*leaves[:6], impl="cpu")
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @pytest.mark.parametrize("keeps_o2", [False, True])
    @pytest.mark.parametrize("maps", [1, 2])
    def test_saved_rows_have_the_shapes_of_the_fake(self, maps, keeps_o2):
        arguments = self.arguments(maps=maps)
        real = torch.ops.rdfkern.diff_attn_fwd(*arguments, keeps_o2=keeps_o2)
        fake = op._fake_forward(*arguments, keeps_o2=keeps_o2)
        assert [(x.shape, x.dtype, x.stride()) for x in real] == [
            (x.shape, x.dtype, x.stride()) for x in fake
        ]


class TestChoice:
    def test_is_first_on_the_cpu(self):
        inputs = inputs_of((1, 1, 1, 4, 4, 4, 4), torch.float32)[:6]
        assert rdfkern.explain("diff_attention", *inputs).startswith("diff_attention: cpu")
        auto, chosen = (rdfkern.diff_attention(*inputs, impl=name) for name in ("auto", "cpu"))
        assert torch.equal(auto, chosen)

    def test_what_it_cannot_do_it_says(self):
        inputs = inputs_of((1, 1, 1, 4, 4, 4, 4), torch.float32)[:6]
        bias = torch.zeros(4, 4, requires_grad=True)
        with pytest.raises(rdfkern.BackendUnavailableError, match="attn_mask requires a gradient"):
            rdfkern.diff_attention(*inputs, attn_mask=bias, impl="cpu")
        rdfkern.diff_attention(*inputs, attn_mask=bias).sum().backward()
        assert bias.grad is not None
        with torch.no_grad():
            rdfkern.diff_attention(*inputs, attn_mask=bias, impl="cpu")
        with pytest.raises(rdfkern.BackendUnavailableError, match="float64"):
            rdfkern.diff_attention(*(x.double() for x in inputs), impl="cpu")


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    or "ATEN_CPU_CAPABILITY" in os.environ,
    reason="needs a wider instruction set to step down from",
)
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_instruction_sets(capability):
    """The same source for AVX2 and for vectors of four lanes, as NEON has them."""
    files = [__file__, str(Path(__file__).with_name("test_diff_attention_cpu_few.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", "grouped or width or many or masks or Dropout or packed_seq or half"]
    done = subprocess.run(
        command,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
