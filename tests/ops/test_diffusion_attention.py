"""diffusion_attention against explicit powers of P in float64."""

import itertools

import pytest
import torch

import rdfkern
from rdfkern.testing import assert_within_budget

IMPLS = ["reference", "torch"]
CPU = rdfkern.available_backends("diffusion_attention")["cpu"]
KERNELS = pytest.param("cpu", marks=pytest.mark.skipif(CPU is not None, reason=str(CPU)))


def random_inputs(batch, heads, length, dim, value_dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        # Strided on purpose: the values lie as (B, L, H, D).
        x = torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2)

    return draw(dim), draw(dim), draw(value_dim)


def transition(q, k, padding, window, scale):
    """P by loops over positions, from differentiable scalars."""
    length = q.shape[0]
    left, right = (-1, -1) if window is None else window
    rows = []
    for i in range(length):
        seen = [
            j
            for j in range(length)
            if not (padding is not None and padding[j])
            and (left < 0 or i - j <= left)
            and (right < 0 or j - i <= right)
        ]
        row = torch.zeros(length, dtype=q.dtype)
        if seen:
            weights = torch.stack([(q[i] * k[j]).sum() * scale for j in seen]).exp()
            row = row.index_put((torch.tensor(seen),), weights / weights.sum())
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, 0, dtype=q.dtype)


def truth(q, k, z0, *, steps, restart, padding=None, window=None, scale=None):
    """Z_K = (1-r)^K P^K Z0 + r sum_{t<K} (1-r)^t P^t Z0: powers instead of the recursion."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        p = transition(q[b, h], k[b, h], None if padding is None else padding[b], window, scale)
        powers = [torch.eye(p.shape[0], dtype=p.dtype)]
        for _ in range(steps):
            powers.append(powers[-1] @ p)
        total = (1 - restart) ** steps * powers[steps]
        for t in range(steps):
            total = total + restart * (1 - restart) ** t * powers[t]
        out.append(total @ z0[b, h])
    return torch.stack(out).view(z0.shape) if out else z0 * 0.0


def run_with_gradients(function, tensors, dtype=None):
    """Output and gradients of q, k, z0 under a fixed cotangent."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)
    return dict(zip(["z", "dq", "dk", "dz0"], [out.detach(), *grads], strict=True))


PADDING = torch.zeros(2, 7, dtype=torch.bool)
PADDING[0, 5:] = True
PADDING[1] = True


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("restart", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize("window", [None, (2, 0), (-1, 1), (0, 0), (1, -1)])
def test_equals_powers_of_the_transition(impl, steps, restart, padding, window):
    inputs = random_inputs(2, 2, 7, 3, 5)
    options = {"steps": steps, "restart": restart, "window": window}
    expected = run_with_gradients(
        lambda q, k, z: truth(q, k, z, padding=padding, **options), inputs
    )
    actual = run_with_gradients(
        lambda q, k, z: rdfkern.diffusion_attention(
            q, k, z, key_padding_mask=padding, impl=impl, **options
        ),
        inputs,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_wide_head_dims(impl):
    q, k, z0 = random_inputs(1, 2, 6, 5, 2)
    actual = rdfkern.diffusion_attention(q, k, z0, steps=3, restart=0.2, scale=1.7, impl=impl)
    torch.testing.assert_close(actual, truth(q, k, z0, steps=3, restart=0.2, scale=1.7))


@pytest.mark.parametrize("impl", [*IMPLS, KERNELS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_within_budget(impl, dtype):
    inputs = random_inputs(2, 2, 33, 17, 9, dtype)
    padding = torch.zeros(2, 33, dtype=torch.bool)
    padding[1, 20:] = True

    def plain(q, k, z0):
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        p = scores.masked_fill(padding[:, None, None], float("-inf")).softmax(-1)
        z = z0
        for _ in range(4):
            z = 0.8 * (p @ z) + 0.2 * z0
        return z

    def actual(q, k, z0):
        return rdfkern.diffusion_attention(
            q, k, z0, steps=4, restart=0.2, key_padding_mask=padding, impl=impl
        )

    assert_within_budget(
        run_with_gradients(actual, inputs),
        run_with_gradients(plain, inputs),
        run_with_gradients(plain, inputs, torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_half_types_once(dtype):
    inputs = random_inputs(1, 2, 9, 4, 3, dtype)
    options = {"steps": 5, "restart": 0.2, "impl": "reference"}
    wide = rdfkern.diffusion_attention(*(x.float() for x in inputs), **options)
    assert torch.equal(rdfkern.diffusion_attention(*inputs, **options), wide.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[4, 1, 6], [0, 3, 0], [5], [], [0]])
@pytest.mark.parametrize("window", [None, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slack", [0, 2])
def test_packed_equals_each_sequence_alone(impl, lengths, window, masked, slack):
    total = sum(lengths)
    q, k, z0 = (x[0].transpose(0, 1) for x in random_inputs(1, 2, total, 3, 4))
    padding = torch.arange(total) % 3 == 0 if masked else None
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = {"steps": 3, "restart": 0.25, "window": window}

    def packed(q, k, z0):
        return rdfkern.diffusion_attention(
            q,
            k,
            z0,
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths, default=0) + slack,
            key_padding_mask=padding,
            impl=impl,
            **options,
        )

    def alone(q, k, z0):
        parts = [z0[:0]]
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            dense = [x[start:end].transpose(0, 1)[None] for x in (q, k, z0)]
            mask = None if padding is None else padding[None, start:end]
            parts.append(truth(*dense, padding=mask, **options)[0].transpose(0, 1))
        return torch.cat(parts)

    expected = run_with_gradients(alone, (q, k, z0))
    torch.testing.assert_close(run_with_gradients(packed, (q, k, z0)), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 2, 0), (2, 1, 1)])
@pytest.mark.parametrize("value_dim", [0, 3])
def test_empty_inputs(impl, shape, value_dim):
    inputs = random_inputs(*shape, 3, value_dim)
    options = {"steps": 2, "restart": 0.4}
    actual = run_with_gradients(
        lambda q, k, z: rdfkern.diffusion_attention(q, k, z, impl=impl, **options), inputs
    )
    expected = run_with_gradients(lambda q, k, z: truth(q, k, z, **options), inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", [*IMPLS, KERNELS])
def test_rows_without_keys_keep_only_the_restart(impl):
    inputs = random_inputs(1, 2, 5, 3, 4, torch.float32)
    padding = torch.ones(1, 5, dtype=torch.bool)
    actual = run_with_gradients(
        lambda q, k, z: rdfkern.diffusion_attention(
            q, k, z, steps=4, restart=0.25, key_padding_mask=padding, impl=impl
        ),
        inputs,
    )
    assert torch.equal(actual["z"], 0.25 * inputs[2])
    assert not actual["dq"].any() and not actual["dk"].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [None, (3, 1)])
def test_mass_is_conserved(impl, window):
    q, k, _ = random_inputs(2, 2, 9, 4, 1)
    constant = torch.tensor([1.5, -2.0, 0.0], dtype=torch.float64).expand(2, 2, 9, 3)
    z = rdfkern.diffusion_attention(q, k, constant, steps=20, restart=0.1, window=window, impl=impl)
    torch.testing.assert_close(z, constant, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["plain", "masked", "packed", "empty"])
def test_gradcheck(impl, case):
    q, k, z0 = random_inputs(2, 1, 0 if case == "empty" else 4, 2, 3)
    options = {"steps": 3, "restart": 0.3, "impl": impl}
    if case == "masked":
        padding = torch.tensor([[True, False, False, True], [True] * 4])
        options |= {"key_padding_mask": padding, "window": (1, 1)}
    if case == "packed":
        q, k, z0 = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, z0))
        options |= {"cu_seqlens": torch.tensor([0, 3, 3, 8]), "max_seqlen": 5}
    leaves = [x.clone().requires_grad_() for x in (q, k, z0)]
    assert torch.autograd.gradcheck(
        lambda *x: rdfkern.diffusion_attention(*x, **options), leaves, fast_mode=False
    )


@pytest.mark.parametrize("impl", [*IMPLS, KERNELS])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph(impl, packed):
    q, k, z0 = random_inputs(2, 2, 5, 3, 4, torch.float32)
    options = {"steps": 2, "restart": 0.3, "window": (2, -1), "impl": impl}
    if packed:
        q, k, z0 = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, z0))
        options |= {"cu_seqlens": torch.tensor([0, 4, 10]), "max_seqlen": 6}

    def function(q, k, z0):
        return rdfkern.diffusion_attention(q, k, z0, **options)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        run_with_gradients(compiled, (q, k, z0)), run_with_gradients(function, (q, k, z0))
    )


@pytest.mark.parametrize("impl", [*IMPLS, KERNELS])
def test_autocast_casts_the_inputs_only(impl):
    q, k, z0 = random_inputs(1, 2, 6, 3, 4, torch.float32)
    halves = [x.bfloat16() for x in (q, k, z0)]
    expected = rdfkern.diffusion_attention(*halves, steps=3, restart=0.2, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rdfkern.diffusion_attention(q, k.bfloat16(), z0, steps=3, restart=0.2, impl=impl)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.skipif(CPU is not None, reason=str(CPU))
def test_kernels_for_the_cpu(diffusion_of_kernels):
    diffusion_of_kernels("cpu")


@pytest.mark.skipif(CPU is not None, reason=str(CPU))
@pytest.mark.parametrize("restart", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_kernels_take_any_steps_and_restart(steps, restart):
    inputs = random_inputs(2, 2, 21, 5, 7, torch.float32)
    options = {"steps": steps, "restart": restart}

    def attend(impl):
        return lambda q, k, z: rdfkern.diffusion_attention(q, k, z, impl=impl, **options)

    found = run_with_gradients(attend("cpu"), inputs)
    expected = run_with_gradients(attend("reference"), inputs, torch.float64)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_is_listed_and_explained():
    inputs = random_inputs(1, 1, 3, 2, 2)
    found = rdfkern.available_backends("diffusion_attention", *inputs, steps=1, restart=0.5)
    assert found["torch"] is None and found["reference"] is None
    assert "can run" in rdfkern.explain("diffusion_attention", *inputs, steps=1, restart=0.5)
    with pytest.raises(rdfkern.BackendUnavailableError, match="triton"):
        rdfkern.diffusion_attention(*inputs, steps=1, restart=0.5, impl="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.0}, TypeError, "steps must be an integer"),
        ({"restart": 1.5}, ValueError, r"restart must be in \[0, 1\], got 1.5"),
        ({"restart": float("nan")}, ValueError, "restart"),
        ({"restart": torch.tensor(0.5)}, TypeError, "restart must be a number"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"window": (-2, 0)}, ValueError, "window"),
        ({"window": 3}, TypeError, "window"),
        ({"k": torch.zeros(1, 2, 5, 3)}, ValueError, "k must have shape"),
        ({"z0": torch.zeros(1, 2, 5, 3)}, ValueError, "z0 must have shape"),
        ({"z0": torch.zeros(1, 2, 4, 3).double()}, TypeError, "z0 must have the dtype of q"),
        ({"q": torch.zeros(2, 4, 3)}, ValueError, "q must have shape"),
        ({"q": torch.zeros(1, 2, 4, 0)}, ValueError, "head dim"),
        ({"max_seqlen": 4}, ValueError, "max_seqlen needs cu_seqlens"),
        ({"key_padding_mask": torch.zeros(1, 4)}, TypeError, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(4, dtype=torch.bool)}, ValueError, "key_padding_mask"),
        ({"cu_seqlens": torch.tensor([0, 1]), "max_seqlen": 4}, ValueError, "q must have shape"),
    ],
)
def test_rejects(change, error, message):
    x = torch.zeros(1, 2, 4, 3)
    arguments = {"q": x, "k": x, "z0": x, "steps": 1, "restart": 0.5} | change
    with pytest.raises(error, match=message):
        rdfkern.diffusion_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_seqlen": None}, TypeError, "max_seqlen must be an integer when cu_seqlens"),
        ({"max_seqlen": 2}, ValueError, r"longest sequence of cu_seqlens \(3\), got 2"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, ValueError, "cu_seqlens must end"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens"),
        ({"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)}, ValueError, "key_padding_mask"),
    ],
)
def test_rejects_packed(change, error, message):
    x = torch.zeros(4, 2, 3)
    arguments = {
        "q": x,
        "k": x,
        "z0": x,
        "steps": 1,
        "restart": 0.5,
        "cu_seqlens": torch.tensor([0, 3, 4]),
        "max_seqlen": 3,
    }
    with pytest.raises(error, match=message):
        rdfkern.diffusion_attention(**(arguments | change))
