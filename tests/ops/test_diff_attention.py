"""Dense differential attention against loops in float64, and the rules of its arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern
from rdfkern.testing import assert_within_budget

IMPLS = ("reference", "torch")
INF = float("inf")


def rows_in_loops(
    q1,
    k1,
    q2,
    k2,
    v,
    lam,
    *,
    alpha=1.0,
    attn_mask=None,
    key_padding_mask=None,
    is_causal=False,
    window=None,
    scale=None,
    norm_weight=None,
    norm_eps=None,
    out_scale=1.0,
):
    """The definition, one query row at a time; differentiable. Returns (out, lse)."""
    batch, heads, lq, dim = q1.shape
    lk, group = k1.shape[2], heads // k1.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    full = (batch, heads, lq)
    lam, alpha = (torch.as_tensor(c, dtype=v.dtype).expand(full) for c in (lam, alpha))
    bias = None if attn_mask is None else attn_mask.expand(batch, heads, lq, lk)

    def sees(b, h, i, j):
        if key_padding_mask is not None and key_padding_mask[b, j]:
            return False
        if bias is not None and not (
            bias[b, h, i, j] if bias.dtype == torch.bool else bias[b, h, i, j] > -INF
        ):
            return False
        distance = j - (i + lk - lq)
        if is_causal and distance > 0:
            return False
        left, right = window or (-1, -1)
        return not ((left >= 0 and -distance > left) or (right >= 0 and distance > right))

    out, lse = [], torch.full((2, *full), -INF, dtype=v.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(lq):
                keys = [j for j in range(lk) if sees(b, h, i, j)]
                row = (q1.sum() + q2.sum() + k1.sum() + k2.sum() + v.sum()) * 0
                row = row + (lam.sum() + alpha.sum()) * 0 + v.new_zeros(v.shape[-1])
                if bias is not None and bias.dtype != torch.bool:
                    row = row + (0 * bias.masked_fill(bias == -INF, 0)).sum()
                terms = []
                for m, (q, k) in enumerate(((q1, k1), (q2, k2))) if keys else ():
                    scores = torch.stack([q[b, h, i] @ k[b, h // group, j] * scale for j in keys])
                    if bias is not None and bias.dtype != torch.bool:
                        scores = scores + bias[b, h, i, keys]
                    weights = torch.exp(scores - scores.max().detach())
                    terms.append(weights / weights.sum() @ v[b, h // group, keys])
                    lse[m, b, h, i] = torch.logsumexp(scores.detach(), 0)
                if keys:
                    row = row + alpha[b, h, i] * terms[0] - lam[b, h, i] * terms[1]
                if norm_eps is not None:
                    row = row / torch.sqrt((row**2).mean() + norm_eps) * out_scale
                    row = row if norm_weight is None else row * norm_weight
                out.append(row)
    out = torch.stack(out) if out else v.new_zeros(0, v.shape[-1])
    return out.view(*full, v.shape[-1]), lse


def qkv(shape, dtype=torch.float64, seed=0):
    """shape = (B, H, Hkv, Lq, Lk, D, Dv); leaves q1, k1, q2, k2, v."""
    batch, heads, kv_heads, lq, lk, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    query, key = (batch, heads, lq, dim), (batch, kv_heads, lk, dim)
    shapes = (query, key, query, key, (batch, kv_heads, lk, value_dim))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def rand(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _bias_with_dead_row():
    bias = rand(2, 2, 3, 4, seed=5)
    bias[0, 1, 2] = -INF
    bias[1, 0, 0, :2] = -INF
    return bias


LEAD_AND_DEAD = torch.tensor([[True, False, False, True], [True] * 4])
CASES = {
    "plain": ((2, 2, 2, 3, 3, 2, 4), 0.7, {}),
    "grouped, D above Dv": ((1, 4, 2, 2, 4, 5, 3), rand(4, 1), {"alpha": rand(4, 1, seed=2)}),
    "grouped, one query": (
        (2, 4, 2, 1, 5, 3, 2),
        rand(4, 1),
        {"is_causal": True, "attn_mask": rand(4, 1, 5, seed=6), "window": (3, -1)},
    ),
    "grouped, masks of keys": (
        (2, 4, 2, 3, 4, 2, 3),
        0.6,
        {"key_padding_mask": LEAD_AND_DEAD, "attn_mask": rand(2, 1, 1, 4) > -1},
    ),
    "grouped, a mask per head": ((1, 4, 2, 3, 4, 2, 3), 0.6, {"attn_mask": rand(4, 1, 4) > -1}),
    "causal with norm": (
        (1, 2, 1, 4, 4, 2, 3),
        rand(1, 2, 4),
        {
            "is_causal": True,
            "norm_eps": 1e-5,
            "norm_weight": rand(3),
            "out_scale": 0.8,
            "scale": 0.3,
        },
    ),
    "causal, more queries": (
        (1, 1, 1, 5, 3, 2, 2),
        rand(5),
        {"is_causal": True, "alpha": torch.tensor(0.4, dtype=torch.float64), "norm_eps": 1e-3},
    ),
    "causal, more keys": ((1, 2, 2, 2, 5, 2, 2), 0.5, {"is_causal": True}),
    "window and bool mask": (
        (2, 2, 2, 3, 5, 2, 2),
        rand(2, 2, 3),
        {"window": (1, 2), "attn_mask": rand(3, 5) > -0.5},
    ),
    "window left only": ((1, 1, 1, 4, 4, 2, 2), 0.5, {"window": (1, -1)}),
    "float mask, dead row": (
        (2, 2, 1, 3, 4, 2, 2),
        rand(2, 1, 1),
        {"attn_mask": _bias_with_dead_row(), "norm_eps": 1e-5},
    ),
    "padding, dead sequence": (
        (2, 2, 1, 3, 4, 2, 2),
        rand(2, 3),
        {"key_padding_mask": LEAD_AND_DEAD},
    ),
    "all masks": (
        (2, 2, 2, 4, 4, 2, 3),
        0.9,
        {
            "key_padding_mask": LEAD_AND_DEAD,
            "attn_mask": rand(2, 1, 4) > -1,
            "is_causal": True,
            "window": (2, 3),
            "alpha": rand(2, 2, 4),
        },
    ),
    "float and padding masks": (
        (2, 1, 1, 2, 4, 2, 2),
        0.9,
        {"key_padding_mask": LEAD_AND_DEAD, "attn_mask": rand(2, 4), "is_causal": True},
    ),
    "bias per row": ((1, 1, 1, 3, 3, 2, 2), 0.9, {"attn_mask": torch.tensor([[0.5], [-INF], [0]])}),
    "no keys": ((2, 2, 1, 3, 0, 2, 2), rand(2, 1), {"norm_eps": 1e-5, "is_causal": True}),
    "no keys, bias": ((2, 2, 1, 3, 0, 2, 2), rand(2, 1), {"attn_mask": rand(3, 1)}),
    "no queries": ((2, 2, 1, 0, 3, 2, 2), rand(2, 1), {"is_causal": True}),
    "no batch": ((0, 2, 1, 3, 3, 2, 2), rand(2, 1), {"key_padding_mask": LEAD_AND_DEAD[:0, :3]}),
}


def leaves_of(case):
    """(q1, k1, q2, k2, v), lam, options of a case, its floating tensors new leaves; and those."""
    shape, lam, options = CASES[case]
    tensors = qkv(shape)
    leaf = {"q1": 0, "k1": 1, "q2": 2, "k2": 3, "v": 4}
    leaves = {name: tensors[at] for name, at in leaf.items()}
    options = dict(options)
    for name, value in {"lam": lam, **options}.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaves[name] = value.double().clone().requires_grad_()
            options[name] = leaves[name]
    return tensors, options.pop("lam", lam), options, leaves


def gradients(out, leaves, seed=9):
    upstream = rand(*out.shape, seed=seed).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_equals_loops_in_float64(case, impl):
    tensors, lam, options, leaves = leaves_of(case)
    out, lse = rdfkern.diff_attention(*tensors, lam, **options, return_lse=True, impl=impl)
    truth, truth_lse = rows_in_loops(*tensors, lam, **options)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12)
    assert not lse.requires_grad
    dead = truth_lse[0] == -INF
    assert (out[dead] == 0).all()
    if truth.numel() == 0:
        for name, grad in gradients(out, leaves).items():
            assert (grad == 0).all(), name
        return
    expected = gradients(truth, leaves)
    for name, grad in gradients(out, leaves).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, impl):
    tensors, lam, options, leaves = leaves_of(case)
    extra = [name for name in leaves if name in options]

    def run(*values):
        replaced = options | dict(zip(extra, values[6:], strict=True))
        return rdfkern.diff_attention(*values[:6], **replaced, impl=impl)

    inputs = (*tensors, lam, *(leaves[name] for name in extra))
    if any(isinstance(x, torch.Tensor) and (x == -INF).any() for x in inputs):
        finite = leaves["attn_mask"] > -INF

        def run_with_holes(*values):
            bias = values[6 + extra.index("attn_mask")]
            values = [value for value in values if value is not bias]
            bias = torch.where(finite, bias, -INF)
            values.insert(6 + extra.index("attn_mask"), bias)
            return run(*values)

        bias = leaves["attn_mask"].detach().masked_fill(~finite, 0.0).requires_grad_()
        inputs = tuple(bias if x is leaves["attn_mask"] else x for x in inputs)
        assert torch.autograd.gradcheck(run_with_holes, inputs)
        return
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    "lq, options",
    [
        (1, {"is_causal": True, "window": (3, -1)}),
        (1, {"attn_mask": rand(4, 1, 5) > -1}),
        (6, {"key_padding_mask": LEAD_AND_DEAD[:1].repeat(1, 2)[:, :5]}),
    ],
)
def test_sdpa_gets_the_keys_of_a_group_as_they_are(monkeypatch, lq, options):
    tensors = qkv((1, 4, 2, lq, 5, 4, 4))
    memory, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, **rest):
        memory.append((k.data_ptr(), v.data_ptr()))
        return attend(q, k, v, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    rdfkern.diff_attention(*tensors, 0.5, **options, impl="torch")
    _, k1, _, k2, v = tensors
    assert memory == [(k.data_ptr(), v.data_ptr()) for k in (k1, k2)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_lowest_number_of_a_mask_hides_like_infinity(dtype, impl):
    tensors = [torch.randn(1, 2, 300, 16, dtype=dtype, requires_grad=True) for _ in range(5)]
    hidden = torch.rand(1, 1, 300, 300) < 0.3
    hidden[..., 7, :] = True
    results = []
    for lowest in (torch.finfo(dtype).min, -INF):
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, lowest)
        out = rdfkern.diff_attention(*tensors, 0.5, attn_mask=mask, impl=impl)
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    assert (results[0][0][:, :, 7] == 0).all()
    for lowest, infinite in zip(*results, strict=True):
        torch.testing.assert_close(lowest, infinite, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_dead_rows_leave_no_trace_in_gradients(impl):
    tensors = qkv((1, 1, 1, 3, 3, 2, 2))
    lam = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    out = rdfkern.diff_attention(*tensors, lam, attn_mask=mask, norm_eps=1e-5, impl=impl)
    assert (out[0, 0, 1] == 0).all()
    out.sum().backward()
    q1, k1, q2, k2, v = (t.grad[0, 0] for t in tensors)
    for grad in (q1[1], q2[1], k1[2], k2[2], v[2], lam.grad[0, 1]):
        assert (grad == 0).all()
    for t in tensors:
        assert t.grad.isfinite().all()


def plain_torch(q1, k1, q2, k2, v, lam, visible, norm_weight):
    """The formula in plain torch at the dtype of its inputs."""
    lam = lam.to(v.dtype)
    maps = [
        torch.softmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -INF), -1)
        for q, k in ((q1, k1), (q2, k2))
    ]
    out = maps[0] @ v - lam[..., None] * (maps[1] @ v)
    return F.rms_norm(out, (v.shape[-1],), None, 1e-5) * norm_weight.to(v.dtype) * 0.7


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per", ["head", "row"])
def test_error_budget_on_strided_views(dtype, per, impl):
    batch, heads, lq, lk, dim, value_dim = 2, 8, 7, 19, 12, 24
    bases = [
        rand(batch, lq, heads, 2, dim, seed=1),
        rand(batch, lk, heads, 2, dim, seed=2),
        rand(batch, lk, heads, value_dim, seed=3),
        rand(batch, heads, 1, seed=4) if per == "head" else rand(batch, heads, lq, seed=4),
        rand(value_dim, seed=5),
    ]
    bases = [base.to(dtype if at < 3 else torch.float32) for at, base in enumerate(bases)]
    keys = torch.arange(lk) < torch.tensor([[lk], [lk - 5]])
    visible = keys[:, None, None] & torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)

    def run(function, compute):
        q, k, v, lam, weight = (
            base.to(compute if at < 3 else torch.promote_types(compute, torch.float32))
            .clone()
            .requires_grad_()
            for at, base in enumerate(bases)
        )
        views = (q[:, :, :, 0], k[:, :, :, 0], q[:, :, :, 1], k[:, :, :, 1], v)
        out = function(*(view.transpose(1, 2) for view in views), lam, weight)
        upstream = rand(*out.shape, seed=8).to(dtype).to(compute)
        grads = torch.autograd.grad(out, (q, k, v, lam, weight), upstream)
        names = ("out", "q", "k", "v", "lam", "weight")
        return dict(zip(names, (out.detach(), *grads), strict=True))

    def ours(*args):
        return rdfkern.diff_attention(
            *args[:6],
            key_padding_mask=~keys,
            is_causal=True,
            norm_weight=args[6],
            norm_eps=1e-5,
            out_scale=0.7,
            impl=impl,
        )

    def in_loops(*args):
        return rows_in_loops(
            *args[:6],
            key_padding_mask=~keys,
            is_causal=True,
            norm_weight=args[6],
            norm_eps=1e-5,
            out_scale=0.7,
        )[0]

    def plain(*args):
        return plain_torch(*args[:6], visible, args[6])

    assert_within_budget(run(ours, dtype), run(plain, dtype), run(in_loops, torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
def test_lam_is_not_rounded_to_the_input_dtype(impl):
    q, k = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 2).bfloat16()
    v = torch.full((1, 1, 1, 2), 1.0, dtype=torch.bfloat16)
    lam = torch.tensor(1 - 2.0**-12)
    out = rdfkern.diff_attention(q, k, q, k, v, lam, impl=impl)
    assert out.dtype == torch.bfloat16
    assert (out == 2.0**-12).all()


@st.composite
def problems(draw):
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    sizes = [draw(st.integers(1, n)) for n in (2, 7, 7, 5, 6)]
    shape = (sizes[0], heads, heads // group, *sizes[1:])
    side = st.integers(-1, 4)
    window = draw(st.one_of(st.none(), st.tuples(side, side)))
    return shape, window, draw(st.booleans()), draw(st.integers(0, 99))


@settings(max_examples=25, deadline=None)
@given(problems(), st.sampled_from(IMPLS))
def test_properties(problem, impl):
    shape, window, is_causal, seed = problem
    q1, k1, q2, k2, v = (t.detach() for t in qkv(shape, seed=seed))
    masks = {"window": window, "is_causal": is_causal}
    lam = rand(shape[1], 1, seed=seed)

    def ours(*args, **options):
        return rdfkern.diff_attention(*args, **masks, **options, impl=impl)

    out = ours(q1, k1, q2, k2, v, lam)
    swapped = -ours(q2, k2, q1, k1, v, 1.0, alpha=lam)
    torch.testing.assert_close(out, swapped)

    lq, lk = shape[3:5]
    offset = torch.arange(lk) - (torch.arange(lq)[:, None] + lk - lq)
    left, right = window or (-1, -1)
    visible = (offset >= -left) if left >= 0 else torch.ones_like(offset, dtype=torch.bool)
    visible &= (offset <= right) if right >= 0 else True
    visible &= (offset <= 0) if is_causal else True
    alive = visible.any(-1)
    grouped = shape[1] != shape[2]
    sdpa = F.scaled_dot_product_attention(
        q1, k1, v, attn_mask=visible | ~alive[:, None], enable_gqa=grouped
    )
    torch.testing.assert_close(ours(q1, k1, q2, k2, v, 0.0), sdpa * alive[:, None])

    v2 = torch.cat([q1, q2], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    both = F.scaled_dot_product_attention(
        v2,
        k1,
        v,
        attn_mask=visible | ~alive[:, None],
        enable_gqa=True,
    )
    shared = (both[:, ::2] - lam[..., None] * both[:, 1::2]) * alive[:, None]
    torch.testing.assert_close(ours(q1, k1, q2, k1, v, lam), shared)

    order = torch.randperm(lk, generator=torch.Generator().manual_seed(seed))
    free = rdfkern.diff_attention(q1, k1, q2, k2, v, lam, window=(-1, -1), impl=impl)
    k1, k2, v = (t[:, :, order] for t in (k1, k2, v))
    torch.testing.assert_close(rdfkern.diff_attention(q1, k1, q2, k2, v, lam, impl=impl), free)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_does_not_change_results(impl):
    q1, k1, q2, k2, v = (t.detach() for t in qkv((2, 2, 2, 4, 6, 3, 5)))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    out = rdfkern.diff_attention(
        q1, k1, q2, k2, v, 0.5, key_padding_mask=padding, norm_eps=1e-5, impl=impl
    )
    alone = rdfkern.diff_attention(
        *(t[1:, :, :n] for t, n in ((q1, 4), (k1, 4), (q2, 4), (k2, 4), (v, 4))),
        0.5,
        norm_eps=1e-5,
        impl=impl,
    )
    torch.testing.assert_close(out[1:], alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_independent_per_map_and_shared_over_values(impl):
    torch.manual_seed(0)
    length, p = 96, 0.25
    q = torch.randn(1, 2, length, 4)
    v = torch.eye(length).repeat(1, 2).expand(1, 2, length, 2 * length)
    weights = torch.softmax(q @ q.mT / 2, -1)
    out = rdfkern.diff_attention(q, q, q, q, v, 100.0, dropout_p=p, impl=impl)
    first_half, second_half = out.chunk(2, dim=-1)
    torch.testing.assert_close(first_half, second_half)
    # m1 - 100 m2 with masks m1 and m2: the four combinations of kept entries are far apart.
    relative = out[..., :length] / weights * (1 - p)
    kept2 = relative < -50
    kept1 = relative + 100 * kept2 > 0.5
    torch.testing.assert_close(relative, kept1.float() - 100.0 * kept2, rtol=1e-3, atol=1e-3)
    count = kept1.numel()
    sigma = math.sqrt(p * (1 - p) / count)
    for kept in (kept1, kept2):
        assert abs(kept.float().mean() - (1 - p)) < 5 * sigma
    together = (kept1 & kept2).float().mean()
    joint = (1 - p) ** 2
    assert abs(together - joint) < 5 * math.sqrt(joint * (1 - joint) / count)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_keeps_mean_and_has_the_variance_of_bernoulli_masks(impl):
    torch.manual_seed(1)
    q1, k1, q2, k2, v = (t.detach() for t in qkv((1, 1, 1, 1, 6, 2, 3)))
    repeats, p, lam = 20000, 0.3, 0.6
    many = [t.expand(repeats, -1, -1, -1) for t in (q1, k1, q2, k2, v)]
    out = rdfkern.diff_attention(*many, lam, dropout_p=p, impl=impl)[:, 0, 0]
    expected = rdfkern.diff_attention(q1, k1, q2, k2, v, lam, impl=impl)[0, 0, 0]
    maps = [torch.softmax(q @ k.mT / math.sqrt(2), -1)[0, 0, 0] for q, k in ((q1, k1), (q2, k2))]
    squares = maps[0].square() + lam**2 * maps[1].square()
    variance = p / (1 - p) * (squares @ v[0, 0].square())
    torch.testing.assert_close(out.var(0), variance, rtol=0.06, atol=0)
    assert ((out.mean(0) - expected).abs() < 5 * (variance / repeats).sqrt()).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_backward_uses_the_mask_of_the_forward(impl):
    tensors = qkv((1, 1, 1, 3, 4, 2, 2))

    def run(*values):
        torch.manual_seed(3)
        return rdfkern.diff_attention(*values, 0.5, dropout_p=0.4, impl=impl)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_inputs_but_neither_lam_nor_the_inner_arithmetic(impl):
    tensors = qkv((2, 2, 1, 5, 5, 4, 4), dtype=torch.float32)
    lam = torch.tensor([[0.1], [0.2]], requires_grad=True)
    weight = torch.rand(4, requires_grad=True)
    options = {"norm_weight": weight, "norm_eps": 1e-5, "attn_mask": torch.randn(5, 5)}
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = rdfkern.diff_attention(*tensors, lam, **options, return_lse=True, impl=impl)
    options["attn_mask"] = options["attn_mask"].bfloat16()
    halves = [t.bfloat16() for t in tensors]
    expected, expected_lse = rdfkern.diff_attention(
        *halves, lam, **options, return_lse=True, impl=impl
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (*tensors, lam, weight))


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_to_one_graph(return_lse):
    tensors = qkv((2, 2, 1, 5, 6, 4, 8), dtype=torch.float32)
    lam = torch.rand(2, 1, requires_grad=True)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 3:] = True

    def run(*values):
        return rdfkern.diff_attention(
            *values,
            lam,
            key_padding_mask=padding,
            window=(3, 1),
            norm_eps=1e-5,
            return_lse=return_lse,
        )

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), run(*tensors))


def test_compiles_under_autocast():
    tensors = qkv((1, 2, 2, 4, 4, 4, 4), dtype=torch.float32)

    def run(*values):
        with torch.autocast("cpu", torch.bfloat16):
            return rdfkern.diff_attention(*values, 0.5, is_causal=True)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), run(*tensors))


def test_causal_attention_alone_builds_no_mask(monkeypatch):
    seen = {}

    def record(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.update(mask=attn_mask, is_causal=is_causal)
        return sdpa(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    tensors = qkv((2, 2, 2, 5, 5, 4, 4))
    rdfkern.diff_attention(*tensors, 0.5, is_causal=True, impl="torch")
    assert seen == {"mask": None, "is_causal": True}
    padding = torch.zeros(2, 5, dtype=torch.bool)
    rdfkern.diff_attention(*tensors, 0.5, key_padding_mask=padding, impl="torch")
    assert seen["mask"].shape == (2, 1, 1, 5)


def test_automatic_choice_and_explain():
    tensors = qkv((1, 1, 1, 2, 2, 2, 2))
    assert rdfkern.available_backends("diff_attention", *tensors, 0.5)["torch"] is None
    assert rdfkern.explain("diff_attention", *tensors, 0.5).startswith("diff_attention: torch")
    with pytest.raises(rdfkern.BackendUnavailableError, match="triton"):
        rdfkern.diff_attention(*tensors, 0.5, impl="triton")


class DTensor(torch.Tensor):
    """Stands for torch.distributed's class, which operations know by its name."""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q1=torch.zeros(2, 3, 4)), ValueError, r"q1 must have shape \(B, H, Lq, D\)"),
        (dict(q2=torch.zeros(1, 2, 4, 4)), ValueError, "q2 must have shape"),
        (dict(k1=torch.zeros(1, 2, 3, 5)), ValueError, "k1 must have shape"),
        (dict(k2=torch.zeros(1, 2, 4, 4)), ValueError, "k2 must have shape"),
        (dict(v=torch.zeros(1, 2, 4, 4)), ValueError, "v must have shape"),
        (dict(v=torch.zeros(1, 2, 3, 0)), ValueError, "v must have a head dim"),
        (dict(v=torch.zeros(1, 2, 3, 4).double()), TypeError, "v must have the dtype of q1"),
        (dict(k1=None), TypeError, "k1 must be a tensor"),
        (dict(q1=torch.zeros(1, 2, 3, 4).long()), TypeError, "q1 must have one of the dtypes"),
        (dict(q1=torch.zeros(1, 2, 3, 4).as_subclass(DTensor)), TypeError, "q1 is a DTensor"),
        (dict(v=torch.zeros(1, 2, 3, 4, device="meta")), ValueError, "v must be on the device"),
        (dict(lam=torch.zeros(2)), ValueError, r"lam must broadcast .* per head is \(H, 1\)"),
        (dict(lam=torch.zeros(1, 1, 2, 3)), ValueError, "lam must broadcast"),
        (dict(alpha=torch.zeros(3, 3)), ValueError, "alpha must broadcast"),
        (dict(lam=torch.zeros(3).double()), TypeError, "lam must have a floating dtype up to"),
        (dict(lam=torch.zeros(3).int()), TypeError, "lam must have a floating dtype"),
        (dict(lam="0.5"), TypeError, "lam must be a number"),
        (dict(lam=torch.zeros(3, device="meta")), ValueError, "lam must be on the device"),
        (dict(attn_mask=torch.zeros(2, 2)), ValueError, "attn_mask must broadcast"),
        (dict(attn_mask=torch.zeros(3, 3).double()), TypeError, "attn_mask must be bool or"),
        (dict(attn_mask=torch.zeros(3, 3).int()), TypeError, "attn_mask must be bool or"),
        (dict(attn_mask=[True]), TypeError, "attn_mask must be a tensor"),
        (dict(key_padding_mask=torch.zeros(3).bool()), ValueError, "key_padding_mask must have"),
        (dict(key_padding_mask=torch.zeros(1, 3)), TypeError, "key_padding_mask must be a bool"),
        (dict(window=(-2, 0)), ValueError, "window must have sides of at least -1"),
        (dict(window=3), TypeError, "window must be None or"),
        (dict(is_causal=1), TypeError, "is_causal must be a bool"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(dropout_p=-0.1), ValueError, "dropout_p must be in"),
        (dict(scale="1"), TypeError, "scale must be a number"),
        (dict(norm_weight=torch.ones(4)), ValueError, "norm_weight belongs to the norm"),
        (dict(out_scale=0.5), ValueError, "out_scale=0.5 belongs to the norm"),
        (dict(norm_eps=0.0), ValueError, "norm_eps must be above 0"),
        (dict(norm_eps=1e-5, norm_weight=torch.ones(3)), ValueError, "norm_weight must have shape"),
        (dict(impl="fast"), ValueError, "impl must be one of"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {name: torch.zeros(1, 2, 3, 4) for name in ("q1", "k1", "q2", "k2", "v")}
    arguments |= {"lam": 0.5} | changes
    with pytest.raises(error, match=message):
        rdfkern.diff_attention(**arguments)


def test_heads_must_be_a_multiple_of_kv_heads():
    q1, k1, q2, k2, v = qkv((1, 3, 2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="k1 must have a number of heads that divides the 3 heads"):
        rdfkern.diff_attention(q1, k1, q2, k2, v, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_stay_finite(dtype, impl):
    q1, k1, q2, k2, v = (t * 60 for t in qkv((1, 1, 1, 6, 6, 8, 8), dtype=torch.float32))
    tensors = [t.detach().to(dtype).requires_grad_() for t in (q1, k1, q2, k2, v / 60)]
    out = rdfkern.diff_attention(*tensors, 0.5, impl=impl)
    assert out.isfinite().all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)
