"""The CUDA C++ kernels of differential attention on a real device: pytest -m gpu."""

import pytest
import torch

import rdfkern
from rdfkern.testing import assert_within_budget, worst_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device is visible"),
]

CASES = {
    "plain": ((2, 4, 2, 130, 77, 24, 40), {}),
    "causal": ((1, 2, 2, 257, 257, 64, 128), {"is_causal": True}),
    "window and norm": ((1, 2, 1, 200, 300, 128, 256), {"window": (50, 3), "norm_eps": 1e-5}),
    "widest": ((1, 1, 1, 65, 66, 256, 256), {"norm_eps": 1e-5, "out_scale": 0.5}),
    "one key": ((1, 2, 2, 5, 1, 16, 32), {}),
}


def results(impl, tensors, upstream, options, *, device, dtype):
    *rows, lam = (x.detach().to(device) for x in tensors)
    leaves = [x.to(dtype) for x in rows] + [lam.double() if dtype == torch.float64 else lam]
    leaves = [x.clone().requires_grad_() for x in leaves]
    names = ("q1", "k1", "q2", "k2", "v", "lam")
    out, lse = rdfkern.diff_attention(*leaves, impl=impl, return_lse=True, **options)
    gradients = torch.autograd.grad(out, leaves, upstream.to(device, out.dtype))
    values = {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}
    return {name: value.detach().cpu() for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype):
    (batch, heads, kv_heads, lq, lk, dim, value_dim), options = CASES[case]
    generator = torch.Generator().manual_seed(1)
    query, key = (batch, heads, lq, dim), (batch, kv_heads, lk, dim)
    shapes = (query, key, query, key, (batch, kv_heads, lk, value_dim))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors.append(torch.rand(batch, heads, lq, generator=generator))
    upstream = torch.randn(batch, heads, lq, value_dim, generator=generator).to(dtype)
    actual, repeated = (
        results("cuda", tensors, upstream, options, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    truth = results("reference", tensors, upstream, options, device="cpu", dtype=torch.float64)
    plain = results("reference", tensors, upstream, options, device="cpu", dtype=dtype)
    if dtype != torch.float32:  # inside, the reference is not of this dtype
        in_torch = results("torch", tensors, upstream, options, device="cpu", dtype=dtype)
        plain = worst_of(plain, in_torch, truth=truth)
    # exp2f errs by up to two units in the last place there.
    assert_within_budget(actual, plain, truth, factor=6.0, rms=3.0)
    for name, value in actual.items():
        assert torch.equal(repeated[name], value), name


def test_one_map(temporal_dropout, diffusion_of_kernels):
    temporal_dropout("cuda", DEVICE)
    diffusion_of_kernels("cuda", DEVICE)
