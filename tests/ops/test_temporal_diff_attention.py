"""Differential attention over time against loops over dialogues in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern
from rdfkern.ops.diff_attention.temporal import kernel_arguments
from rdfkern.ops.diff_attention.temporal_values import next_values
from rdfkern.testing import assert_within_budget

IMPLS = ("reference", "torch")


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def in_loops(
    q, k, v, lam, *, alpha=1.0, key_padding_mask=None, scale=None, norm_eps=None, norm_weight=None
):
    """One query at a time; the key before a present step is that of the present step before it."""
    batch, heads, length, dim = q.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    group = heads // k.shape[1]
    lam, alpha = (torch.as_tensor(c, dtype=q.dtype).expand(q.shape[:3]) for c in (lam, alpha))
    out = []
    for b in range(batch):
        steps = [j for j in range(length) if key_padding_mask is None or not key_padding_mask[b, j]]
        earlier = [steps[at - 1] for at in range(len(steps))]
        for h in range(heads):
            for i in range(length):
                row = (q.sum() + k.sum() + v.sum() + lam.sum() + alpha.sum()) * 0
                row = row.expand(v.shape[-1])
                if steps:
                    values = v[b, h // group, steps]
                    one, two = (
                        torch.exp(k[b, h // group, at] @ q[b, h, i] * scale)
                        for at in (steps, earlier)
                    )
                    row = row + alpha[b, h, i] * (one / one.sum() @ values)
                    row = row - lam[b, h, i] * (two / two.sum() @ values)
                if norm_eps is not None:
                    row = row / torch.sqrt((row**2).mean() + norm_eps)
                    row = row if norm_weight is None else row * norm_weight
                out.append(row)
    return torch.stack(out).view(*q.shape[:3], -1)


def qkv(batch=2, heads=2, kv_heads=2, length=5, dim=3, value_dim=4, seed=0):
    return [
        rand(*shape, seed=seed + at).requires_grad_()
        for at, shape in enumerate(
            (
                (batch, heads, length, dim),
                (batch, kv_heads, length, dim),
                (batch, kv_heads, length, value_dim),
            )
        )
    ]


PADDING = torch.tensor([[False, True, False, False, True], [False] * 5])
DEAD = torch.tensor([[True] * 5, [True, True, False, True, True]])
COEFFICIENTS = {
    "scalar": 0.6,
    "per head": rand(2, 1),
    "per sequence": rand(2, 1, 1),
    "per step": rand(2, 2, 5),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding", [None, PADDING, DEAD], ids=["none", "some", "dead"])
@pytest.mark.parametrize("alpha", COEFFICIENTS)
@pytest.mark.parametrize("lam", COEFFICIENTS)
def test_equals_loops_in_float64(lam, alpha, padding, impl):
    tensors = qkv(kv_heads=1)
    coefficients = [COEFFICIENTS[name] for name in (lam, alpha)]
    coefficients = [
        c.clone().requires_grad_() if isinstance(c, torch.Tensor) else c for c in coefficients
    ]
    leaves = [*tensors, *(c for c in coefficients if isinstance(c, torch.Tensor))]
    options = {"alpha": coefficients[1], "key_padding_mask": padding, "norm_eps": 1e-3}
    options["norm_weight"] = rand(4, seed=6)
    out = rdfkern.temporal_diff_attention(*tensors, coefficients[0], **options, impl=impl)
    truth = in_loops(*tensors, coefficients[0], **options)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    upstream = rand(*out.shape, seed=9)
    for have, want in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(truth, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-11)
    if padding is DEAD:
        assert (out[0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lam", ["per head", "per step"])
def test_gradcheck(lam, packed, impl):
    inputs = [*qkv(kv_heads=1, length=3, dim=2, value_dim=2), rand(2, 1), rand(2, 1, seed=3)]
    padding = torch.tensor([[False, True, False], [True, True, True]])
    if lam == "per step":
        inputs[3] = rand(2, 2, 3)
    options = {"key_padding_mask": padding}
    if packed:
        inputs = [x.detach().transpose(1, 2).flatten(0, 1) for x in inputs[:3]]
        inputs += [rand(6, 2) if lam == "per step" else rand(2), rand(2, seed=3)]
        cu_seqlens = torch.tensor([0, 0, 4, 6])
        options = {
            "cu_seqlens": cu_seqlens,
            "max_seqlen": 4,
            "key_padding_mask": padding.flatten(),
        }
    inputs = [x.detach().requires_grad_() for x in (*inputs, rand(2, seed=4))]

    def run(q, k, v, lam, alpha, weight):
        return rdfkern.temporal_diff_attention(
            q, k, v, lam, alpha=alpha, norm_weight=weight, norm_eps=1e-2, impl=impl, **options
        )

    assert torch.autograd.gradcheck(run, inputs)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(IMPLS),
    st.integers(0, 50),
)
def test_packed_equals_one_dense_call_per_dialogue(lengths, per_step, padded, impl, seed):
    total = sum(lengths)
    q, k, v = (rand(total, 2, d, seed=seed + d) for d in (3, 3, 4))
    k = k + 1
    lam = rand(total, 2, seed=seed) if per_step else rand(2, seed=seed)
    padding = rand(total, seed=seed + 1) > 0.5 if padded else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out = rdfkern.temporal_diff_attention(
        q,
        k,
        v,
        lam,
        alpha=0.8,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths, default=0) + 1,
        key_padding_mask=padding,
        impl=impl,
    )
    assert out.shape == (total, 2, 4)
    lam = lam.expand(total, 2)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        if length == 0:
            continue
        alone = in_loops(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)),
            lam[rows].T,
            alpha=0.8,
            key_padding_mask=None if padding is None else padding[None, rows],
        )
        torch.testing.assert_close(out[rows], alone[0].transpose(0, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_inputs_stay_in_the_graph(shape, impl):
    batch, length = shape
    tensors = qkv(batch=batch, length=length)
    lam = rand(2, 1).requires_grad_()
    for options in ({}, {"key_padding_mask": torch.zeros(batch, length, dtype=torch.bool)}):
        out = rdfkern.temporal_diff_attention(*tensors, lam, impl=impl, **options)
        assert out.shape == (batch, 2, length, 4)
        for grad in torch.autograd.grad(out.sum(), [*tensors, lam]):
            assert (grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_and_batch_mates_do_not_change_results(impl):
    q, k, v = (x.detach() for x in qkv(length=7))
    padding = torch.arange(7) >= torch.tensor([[4], [7]])
    lam = rand(2, 1)
    out = rdfkern.temporal_diff_attention(q, k, v, lam, key_padding_mask=padding, impl=impl)
    alone = rdfkern.temporal_diff_attention(
        *(x[:1, :, :4] for x in (q, k, v)), lam, key_padding_mask=padding[:1, :4], impl=impl
    )
    torch.testing.assert_close(out[:1, :, :4], alone)
    swapped = rdfkern.temporal_diff_attention(
        *(x.flip(0) for x in (q, k, v)), lam, key_padding_mask=padding.flip(0), impl=impl
    )
    torch.testing.assert_close(swapped.flip(0), out)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_coefficients_are_the_released_form(impl):
    q, k, v = (x.detach() for x in qkv())
    keys = torch.cat([k[:, :, -1:], k[:, :, :-1]], dim=2)
    maps = [torch.softmax(q @ x.mT * 0.1, -1) for x in (k, keys)]
    released = (0.5 * (maps[0] - maps[1])) @ v
    out = rdfkern.temporal_diff_attention(q, k, v, 0.5, alpha=0.5, scale=0.1, impl=impl)
    torch.testing.assert_close(out, released)
    general = rdfkern.diff_attention(q, k, q, keys, v, 0.5, alpha=0.5, scale=0.1, impl=impl)
    torch.testing.assert_close(out, general)


@pytest.mark.parametrize("impl", [*IMPLS, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_step", [False, True])
def test_error_budget_on_strided_views(per_step, dtype, impl):
    if impl == "cpu":
        needs_cpu_kernels()
    batch, heads, length, dim = 2, 4, 27, 20
    bases = [rand(batch, length, 3, heads, dim, seed=1).to(dtype)]
    bases.append(rand(batch, heads, length if per_step else 1, seed=2).float())
    padding = torch.arange(length) >= torch.tensor([[length], [length - 6]])

    def run(function, compute):
        x, lam = (
            base.to(torch.promote_types(compute, base.dtype)).clone().requires_grad_()
            for base in bases
        )
        q, k, v = x.unbind(2)
        out = function(*(y.transpose(1, 2) for y in (q, k, v)), lam)
        upstream = rand(*out.shape, seed=8).to(dtype).to(compute)
        grads = torch.autograd.grad(out, (x, lam), upstream)
        return dict(zip(("out", "qkv", "lam"), (out.detach(), *grads), strict=True))

    def plain(q, k, v, lam):
        outs = []
        for b, count in enumerate((~padding).sum(1).tolist()):
            keys, values = k[b, :, :count], v[b, :, :count]
            one, two = (
                torch.softmax(q[b] @ x.mT * dim**-0.5, -1) @ values
                for x in (keys, keys.roll(1, dims=1))
            )
            outs.append(one - lam[b].to(v.dtype)[..., None] * two)
        return torch.stack(outs)

    def ours(*args):
        return rdfkern.temporal_diff_attention(*args, key_padding_mask=padding, impl=impl)

    def truth(*args):
        return in_loops(*args, key_padding_mask=padding)

    assert_within_budget(run(ours, dtype), run(plain, dtype), run(truth, torch.float64))


def needs_cpu_kernels():
    x = torch.zeros(1, 1, 2, 2)
    reason = rdfkern.available_backends("temporal_diff_attention", x, x, x, 0.5)["cpu"]
    if reason is not None:
        pytest.skip(reason)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    kv_heads=st.sampled_from([1, 2]),
    packed=st.booleans(),
    padded=st.booleans(),
    form=st.sampled_from(["scalar", "per head", "per step"]),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cpu_kernels_equal_the_reference(lengths, kv_heads, packed, padded, form, norm, seed):
    needs_cpu_kernels()
    if not packed:
        lengths = [lengths[0]] * len(lengths)
    total, batch = sum(lengths), len(lengths)
    bases = [
        rand(total, heads, dim, seed=seed + at).float()
        for at, (heads, dim) in enumerate(((2, 5), (kv_heads, 5), (kv_heads, 6)))
    ]
    rows, heads = (total if form == "per step" else 1), (1 if form == "scalar" else 2)
    bases += [rand(rows, heads, seed=seed + at).float() for at in (3, 4)]
    padding = rand(total, seed=seed) > 0.4 if padded else None
    options = {"norm_eps": 1e-3, "out_scale": 0.7} if norm else {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        options["max_seqlen"] = max(lengths) + 1
    else:
        padding = None if padding is None else padding.view(batch, -1)

    def run(dtype, impl):
        leaves = [base.to(dtype, copy=True).requires_grad_() for base in bases]
        inputs = leaves
        if not packed:
            inputs = [x.unflatten(0, (batch, -1)).transpose(1, 2) for x in leaves[:3]]
            inputs += [
                x.unflatten(0, (batch, -1)).transpose(1, 2) if form == "per step" else x[0, :, None]
                for x in leaves[3:]
            ]
        *qkv, lam, alpha = inputs
        out = rdfkern.temporal_diff_attention(
            *qkv, lam, alpha=alpha, key_padding_mask=padding, impl=impl, **options
        )
        out.backward(rand(*out.shape, seed=9).to(dtype))
        names = ("q", "k", "v", "lam", "alpha")
        gradients = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}
        return {"out": out.detach()} | gradients

    # Which keys take part, not how they are rounded: that is the test of budgets on longer rows.
    truth = run(torch.float64, "reference")
    for name, value in run(torch.float32, "cpu").items():
        expected = truth[name].float()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [{}, {"norm_eps": 1e-3, "out_scale": 0.6}])
@pytest.mark.parametrize("length", [300, 700, 4200])
def test_cpu_kernels_on_long_sequences(length, norm, dtype):
    """Of few heads, backward cuts the keys for its threads; above 4,096, forward takes blocks."""
    needs_cpu_kernels()
    bases = [rand(1, 1, length, d, seed=d).to(dtype) for d in (8, 9, 16)]
    bases[1] = bases[1][..., 1:]
    upstream = rand(1, 1, length, 16, seed=5).to(dtype)

    def run(impl, compute):
        leaves = [x.to(compute, copy=True).requires_grad_() for x in (*bases, torch.tensor(0.7))]
        out = rdfkern.temporal_diff_attention(*leaves, impl=impl, **norm)
        out.backward(upstream.to(compute))
        return {"out": out.detach()} | {n: x.grad for n, x in zip("qkvl", leaves, strict=True)}

    results = run("cpu", dtype), run("torch", dtype), run("torch", torch.float64)
    # The gradient of lam is one sum over all rows that nearly cancels.
    lam = ({"l": result.pop("l")} for result in results)
    assert_within_budget(*lam, factor=6.0)
    assert_within_budget(*results)


def test_cpu_kernels_drop_and_differentiate_the_same_entries(temporal_dropout):
    needs_cpu_kernels()
    temporal_dropout("cpu")


def test_choice_of_the_cpu_kernels():
    needs_cpu_kernels()
    x = torch.zeros(1, 1, 2, 2)
    backends = rdfkern.available_backends("temporal_diff_attention", x, x, x, 0.5, dropout_p=0.1)
    assert backends["cpu"] is None and backends["torch"] is None
    x = x.double()
    backends = rdfkern.available_backends("temporal_diff_attention", x, x, x, 0.5)
    assert "computes in float32" in backends["cpu"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING, DEAD], ids=["none", "some", "dead"])
def test_values_of_the_next_step(padding, packed):
    """In order, and differentiable as often as one likes, in both modes."""
    v = rand(2, 5, 1, 2).transpose(1, 2)
    present = [[j for j in range(5) if padding is None or not padding[b, j]] for b in range(2)]
    cu_seqlens = None
    if packed:
        v, cu_seqlens = v.transpose(1, 2).flatten(0, 1), torch.tensor([0, 0, 5, 10, 10])
        padding = None if padding is None else padding.flatten()

    def following(v):
        return next_values(v, cu_seqlens, padding)

    rows = following(v).unflatten(0, (2, 5)) if packed else following(v).transpose(1, 2)
    values = v.unflatten(0, (2, 5)) if packed else v.transpose(1, 2)
    for b, steps in enumerate(present):
        assert torch.equal(rows[b, steps], values[b, steps[1:] + steps[:1]])
    v = v.detach().requires_grad_()
    assert torch.autograd.gradcheck(following, v, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(following, v, check_fwd_over_rev=True)


def test_coefficients_of_queries_double_the_width_of_the_values():
    def width_of(arguments):
        return kernel_arguments(arguments)["v"].shape[-1]

    q, k = torch.zeros(1, 4, 6, 2), torch.zeros(1, 2, 6, 2)
    for lam, alpha, width in (
        (0.5, 1.0, 2),
        (torch.zeros(()), torch.zeros(1, 1, 1), 2),
        (torch.zeros(4, 1), 1.0, 4),  # two heads of queries share their values
        (0.5, torch.zeros(1, 6), 4),
    ):
        arguments = {"q": q, "k": k, "v": k, "lam": lam, "alpha": alpha}
        assert width_of(arguments) == width
        packed = {n: x[0].transpose(0, 1) for n, x in arguments.items() if n in "qkv"}
        if isinstance(lam, torch.Tensor) and lam.shape == (4, 1):
            lam = lam[:, 0]
        if isinstance(alpha, torch.Tensor):
            alpha = alpha.reshape(-1, 1)
        assert width_of(packed | {"lam": lam, "alpha": alpha}) == width


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_step", [False, True])
def test_dropout_drops_the_same_entries_of_both_maps(per_step, impl):
    length, p = 48, 0.25
    q, k, _ = (x.detach().float() for x in qkv(batch=1, length=length))
    v = torch.eye(length).expand(1, 2, length, length)
    ones = torch.ones(1, 2, length) if per_step else 1.0

    def run(lam, alpha):
        torch.manual_seed(4)
        return rdfkern.temporal_diff_attention(
            q, k, v, lam * ones, alpha=alpha * ones, dropout_p=p, impl=impl
        )

    first = run(0.0, 1.0)
    torch.testing.assert_close(run(-1.0, 0.0), first.roll(1, dims=-1))
    torch.testing.assert_close(run(0.5, 1.0), first - 0.5 * first.roll(1, dims=-1))
    weights = torch.softmax(q @ k.mT / math.sqrt(3), -1)
    kept = first != 0
    torch.testing.assert_close(first, weights * kept / (1 - p))
    share = kept.float().mean()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())


def test_autocast_keeps_lam():
    tensors = [x.detach().float().requires_grad_() for x in qkv()]
    lam = torch.rand(2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = rdfkern.temporal_diff_attention(*tensors, lam)
    expected = rdfkern.temporal_diff_attention(*(x.bfloat16() for x in tensors), lam)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph(packed):
    q, k, v = (x.detach().float() for x in qkv())
    options = {"key_padding_mask": PADDING}
    lam = torch.rand(2, 1)
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        options = {"cu_seqlens": torch.tensor([0, 4, 10]), "max_seqlen": 6}
        lam = torch.rand(10, 2)

    def run(q, k, v):
        return rdfkern.temporal_diff_attention(q, k, v, lam, **options)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(4, 2, 3)}, ValueError, "q must have shape .* without cu_seqlens"),
        ({"k": torch.zeros(1, 2, 5, 3)}, ValueError, r"k must have shape \(B, Hkv, L, D\)"),
        ({"v": torch.zeros(1, 1, 4, 3)}, ValueError, "v must have shape"),
        ({"max_seqlen": 4}, ValueError, "max_seqlen needs cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "q must have shape .* with cu_seqlens"),
        ({"lam": torch.zeros(2)}, ValueError, "lam must broadcast"),
        ({"key_padding_mask": torch.zeros(4)}, TypeError, "key_padding_mask must be a bool"),
        ({"dropout_p": 1}, ValueError, "dropout_p must be in"),
        ({"norm_eps": -1}, ValueError, "norm_eps must be above 0"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {name: torch.zeros(1, 2, 4, 3) for name in ("q", "k", "v")} | {"lam": 0.5} | changes
    with pytest.raises(error, match=message):
        rdfkern.temporal_diff_attention(**arguments)


def test_packed_inputs_need_max_seqlen():
    q = torch.zeros(4, 2, 3)
    with pytest.raises(TypeError, match="max_seqlen must be an integer when cu_seqlens is given"):
        rdfkern.temporal_diff_attention(q, q, q, 0.5, cu_seqlens=torch.tensor([0, 4]))
