"""Packed differential attention equals one dense call per sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern

IMPLS = ("reference", "torch")
DIM, VALUE_DIM, HEADS, KV_HEADS = 2, 3, 4, 2
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (1, 0)},
    "causal window": {"window": (2, 1), "is_causal": True},
    "norm": {
        "norm_eps": 1e-5,
        "norm_weight": torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64),
        "out_scale": 0.7,
        "scale": 0.2,
    },
}


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def packed(lengths_q, lengths_k):
    """Leaves q1, k1, q2, k2, v and both cu_seqlens."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    query, key = (total_q, HEADS, DIM), (total_k, KV_HEADS, DIM)
    shapes = (query, key, query, key, (total_k, KV_HEADS, VALUE_DIM))
    tensors = [rand(*shape, seed=at).requires_grad_() for at, shape in enumerate(shapes)]
    cu = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    return tensors, cu


def one_dense_call_per_sequence(tensors, lam, cu, alpha=1.0, key_padding_mask=None, **options):
    q1, k1, q2, k2, v = tensors
    lam, alpha = (torch.as_tensor(c, dtype=q1.dtype).expand(q1.shape[:2]) for c in (lam, alpha))
    outs = [q1[:0, :, :1].expand(-1, -1, VALUE_DIM)]
    lses = [q1.new_zeros(2, 0, HEADS)]
    for b in range(len(cu[0]) - 1):
        rows, keys = (slice(*c[b : b + 2].tolist()) for c in cu)
        padding = None if key_padding_mask is None else key_padding_mask[None, keys]
        out, lse = rdfkern.diff_attention(
            *(
                t[s].transpose(0, 1)[None]
                for t, s in zip((q1, k1, q2, k2, v), (rows, keys, rows, keys, keys), strict=True)
            ),
            lam[rows].T,
            alpha=alpha[rows].T,
            key_padding_mask=padding,
            return_lse=True,
            impl="reference",
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[:, 0].transpose(1, 2))
    return torch.cat(outs), torch.cat(lses, 1)


def check(lengths_q, lengths_k, lam, impl, slack=0, same=False, padded=False, **options):
    tensors, cu = packed(lengths_q, lengths_k)
    longest = [max(lengths, default=0) + slack for lengths in (lengths_q, lengths_k)]
    padding = rand(sum(lengths_k), seed=7) > 0.3 if padded else None
    given_cu = (cu[0], cu[0]) if same else cu
    leaves = list(tensors)
    if isinstance(lam, torch.Tensor):
        lam = lam.clone().requires_grad_()
        leaves.append(lam)
    out, lse = rdfkern.diff_attention_varlen(
        *tensors,
        lam,
        *given_cu,
        *longest,
        key_padding_mask=padding,
        return_lse=True,
        impl=impl,
        **options,
    )
    truth, truth_lse = one_dense_call_per_sequence(
        tensors, lam, cu, key_padding_mask=padding, **options
    )
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12)
    upstream = rand(*out.shape, seed=9)
    for have, want in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(truth, leaves, upstream, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([3, 1, 4], [3, 1, 4]),
        ([2, 5, 0, 1], [4, 3, 2, 0]),
        ([0, 0], [0, 0]),
        ([0], [3]),
        ([3], [0]),
        ([], []),
    ],
)
def test_equals_one_dense_call_per_sequence(lengths_q, lengths_k, options, impl):
    for lam in (0.6, rand(HEADS, seed=5), rand(sum(lengths_q), 1, seed=5)):
        check(lengths_q, lengths_k, lam, impl, slack=2, **OPTIONS[options])
    check(lengths_q, lengths_k, 0.5, impl, padded=True, **OPTIONS[options])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_self_attention_with_one_cu_seqlens(options, impl):
    lengths = [4, 0, 1, 3]
    alpha = rand(8, HEADS, seed=3)
    check(lengths, lengths, rand(8, HEADS), impl, same=True, alpha=alpha, **OPTIONS[options])
    check(lengths, lengths, 0.3, impl, same=True, padded=True, **OPTIONS[options])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
    st.sampled_from(sorted(OPTIONS)),
    st.sampled_from(IMPLS),
    st.booleans(),
)
def test_any_lengths(lengths, options, impl, padded):
    lengths_q, lengths_k = ([pair[at] for pair in lengths] for at in (0, 1))
    lam = rand(sum(lengths_q), HEADS, seed=4)
    check(lengths_q, lengths_k, lam, impl, padded=padded, **OPTIONS[options])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    tensors, cu = packed([2, 0, 3], [3, 1, 0])
    inputs = [*tensors, rand(5, HEADS).requires_grad_(), rand(HEADS, seed=1).requires_grad_()]
    inputs.append(rand(VALUE_DIM, seed=2).requires_grad_())
    padding = torch.tensor([False, True, False, False])

    def run(*values):
        return rdfkern.diff_attention_varlen(
            *values[:6],
            *cu,
            3,
            3,
            alpha=values[6],
            norm_weight=values[7],
            norm_eps=1e-3,
            key_padding_mask=padding,
            window=(1, 1),
            impl=impl,
        )

    assert torch.autograd.gradcheck(run, inputs)


def test_compiles_to_one_graph():
    tensors, cu = packed([2, 4], [3, 1])
    lam = rand(6, HEADS)

    def run(*values):
        return rdfkern.diff_attention_varlen(*values, lam, *cu, 4, 3, window=(1, 0))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), run(*tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_half_inputs(impl):
    tensors, cu = packed([2, 4], [3, 5])
    halves = [t.detach().bfloat16() for t in tensors]
    out, lse = rdfkern.diff_attention_varlen(
        *halves, 0.5, *cu, 4, 5, return_lse=True, is_causal=True, impl=impl
    )
    truth = rdfkern.diff_attention_varlen(
        *(t.double() for t in halves), 0.5, *cu, 4, 5, is_causal=True, impl="reference"
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 3]}, ValueError, r"cu_seqlens_q must end at .* \(4\)"),
        ({"cu_seqlens_q": [1, 4]}, ValueError, "cu_seqlens_q must start at 0"),
        ({"cu_seqlens_k": [0, 5, 4]}, ValueError, "cu_seqlens_k must not decrease"),
        ({"cu_seqlens_k": [0, 2, 4]}, ValueError, "cu_seqlens_k must hold as many sequences"),
        ({"max_seqlen_q": 3}, ValueError, r"max_seqlen_q must be at least the longest .*\(4\)"),
        ({"max_seqlen_k": 3}, ValueError, "max_seqlen_k must be at least"),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k must be an integer"),
        ({"attn_mask": torch.ones(4, 4).bool()}, ValueError, "attn_mask must be None for packed"),
        ({"lam": torch.ones(3, 1)}, ValueError, r"lam must broadcast .* per head is \(H,\)"),
        ({"alpha": torch.ones(2)}, ValueError, "alpha must broadcast"),
        ({"key_padding_mask": torch.zeros(3).bool()}, ValueError, r"key_padding_mask .*\(Tk,\)"),
        ({"q2": torch.zeros(3, 3, 2)}, ValueError, "q2 must have shape"),
        ({"q1": torch.zeros(1, 3, 4, 2)}, ValueError, r"q1 must have shape \(Tq, H, D\)"),
        ({"v": torch.zeros(3, 3, 2)}, ValueError, r"v must have shape \(Tk, Hkv, Dv\)"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {name: torch.zeros(4, 3, 2) for name in ("q1", "k1", "q2", "k2", "v")}
    arguments |= {"lam": 0.5, "cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 4]}
    arguments |= {"max_seqlen_q": 4, "max_seqlen_k": 4} | changes
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments[name] = torch.tensor(arguments[name])
    with pytest.raises(error, match=message):
        rdfkern.diff_attention_varlen(**arguments)
