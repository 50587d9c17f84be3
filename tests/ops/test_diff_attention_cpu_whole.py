"""Where all keys of a query are at hand at once, the C++ kernels of differential attention keep no
rows for backward: beside the formula, and beside the form that keeps them."""

import pytest
import torch

import rdfkern
from rdfkern.ops.diff_attention import op
from rdfkern.testing import assert_within_budget

REASON = rdfkern.available_backends("diff_attention")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NAMES = ("q1", "k1", "q2", "k2", "v", "lam", "alpha")
INF = float("inf")
# As in test_diff_attention_cpu.py: the largest of few errors is noise, most of all where a row's
# gradient is a sum that nearly cancels.
FACTORS = {"out": 2.0, "lse": 2.0, "lam": 6.0, "alpha": 6.0}


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(shape, dtype=torch.float32):
    """(B, H, Hkv, Lq, Lk, D, Dv) -> q1, k1, q2, k2, v, lam, alpha."""
    batch, heads, kv_heads, lq, lk, dim, value_dim = shape
    query, key = (batch, heads, lq, dim), (batch, kv_heads, lk, dim)
    shapes = (query, key, query, key, (batch, kv_heads, lk, value_dim))
    tensors = [rand(*s, seed=at).to(dtype) for at, s in enumerate(shapes)]
    return [*tensors, *(rand(batch, heads, lq, seed=7 + at).abs() for at in range(2))]


def packed_inputs(lengths_q, lengths_k, dtype=torch.float32, heads=4, kv_heads=2, dim=32):
    cu_q, cu_k = (torch.tensor([0, *each]).cumsum(0) for each in (lengths_q, lengths_k))
    shape = (1, heads, kv_heads, int(cu_q[-1]), int(cu_k[-1]), dim, 2 * dim)
    inputs = [x[0].transpose(0, 1).contiguous() for x in inputs_of(shape, dtype)]
    layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    return inputs, layout | {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}


def run(impl, inputs, upstream, function=rdfkern.diff_attention, wide=False, **options):
    leaves = dict(zip(NAMES, inputs, strict=True))
    if "norm_weight" in options:
        leaves["norm_weight"] = options["norm_weight"]
    leaves = {
        name: (x.double() if wide else x.clone()).detach().requires_grad_()
        for name, x in leaves.items()
    }
    mask = options.get("attn_mask")
    if wide and mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.double()}
    out, lse = function(**(options | leaves), return_lse=True, impl=impl)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach(), "lse": lse, **dict(zip(leaves, grads, strict=True))}


def check(inputs, **options):
    upstream = rand(*inputs[0].shape[:-1], inputs[4].shape[-1], seed=99).to(inputs[0].dtype)
    actual = run("cpu", inputs, upstream, **options)
    plain = run("reference", inputs, upstream, **options)
    truth = run("reference", inputs, upstream, wide=True, **options)
    for name in actual:
        parts = ({name: values[name]} for values in (actual, plain, truth))
        assert_within_budget(*parts, factor=FACTORS.get(name, 3.0))


def bias(lq, lk):
    values = rand(2, 1, lq, lk, seed=5)
    values[values > 1.5] = -INF
    values[1, 0, 7] = -INF
    return values


def padding(lk):
    """The first sequence ends early, the second has no key, the third starts late."""
    place = torch.arange(lk)
    return torch.stack([place >= lk - 20, place >= 0, place < 30])


NORM = {"norm_eps": 1e-5, "norm_weight": rand(40, seed=6).abs() + 0.5, "out_scale": 0.7}
FORMS = {
    "plain": lambda lq, lk: {},
    "norm with weight": lambda lq, lk: NORM,
    "norm without weight": lambda lq, lk: {"norm_eps": 1e-3},
    "causal": lambda lq, lk: {"is_causal": True},
    "window": lambda lq, lk: {"window": (20, 3)} | NORM,
    "narrow window": lambda lq, lk: {"window": (2, -1), "is_causal": True},
    "padding": lambda lq, lk: {"key_padding_mask": padding(lk)},
    "padding and window": lambda lq, lk: {"key_padding_mask": padding(lk), "window": (9, 9)} | NORM,
    "bool mask": lambda lq, lk: {"attn_mask": rand(lq, lk, seed=3) > 0.3},
    "negative scale": lambda lq, lk: {"scale": -0.2},
}


@pytest.mark.parametrize("keys", [90, 256, 257, 600, 4096, 4097])
@pytest.mark.parametrize("form", FORMS)
def test_forms_at_and_above_the_limit(form, keys):
    batch, heads = (3, 4) if keys <= 600 else (3, 2)
    check(inputs_of((batch, heads, 2, 75, keys, 16, 40)), **FORMS[form](75, keys))


@pytest.mark.parametrize("keys", [40, 257, 4097])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["plain", "norm with weight", "window"])
def test_half(form, dtype, keys):
    check(inputs_of((3, 2, 2, 70, keys, 16, 40), dtype), **FORMS[form](70, keys))


@pytest.mark.parametrize("keys", [100, 300])
def test_bias_with_a_dead_row(keys):
    check(inputs_of((2, 2, 1, 66, keys, 16, 40)), attn_mask=bias(66, keys), **NORM)


QUERIES, KEYS = (5, 0, 64, 3, 110, 0, 1, 17, 130), (9, 4, 65, 0, 110, 0, 1, 600, 70)
VARLEN = rdfkern.diff_attention_varlen


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (7, 2)}])
def test_packed(options):
    inputs, layout = packed_inputs(QUERIES, KEYS)
    check(inputs, function=VARLEN, **layout, **options)
    check([x.bfloat16() for x in inputs], function=VARLEN, **layout, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"norm_eps": 1e-5, "window": (9, 4)}])
def test_the_same_bits_whether_rows_are_kept_or_not(options, dtype, monkeypatch):
    """The longest sequence decides what is kept; the others must not notice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several may share the keys of a sequence, if rows are kept
    inputs, layout = packed_inputs(QUERIES, KEYS, dtype)
    upstream = rand(*inputs[0].shape[:-1], inputs[4].shape[-1], seed=1)
    results = []
    try:
        for limit in (op.WHOLE_KEYS["cpu"], 0):
            monkeypatch.setitem(op.WHOLE_KEYS, "cpu", limit)
            torch.manual_seed(3)
            results.append(run("cpu", inputs, upstream, function=VARLEN, **layout, **options))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("keys", [90, 300])
def test_kept_rows_are_those_of_the_second_map(keys, dropout_p, dtype):
    inputs = inputs_of((2, 4, 2, 70, keys, 16, 40), dtype)
    options = (None,) * 5 + (torch.tensor(5), None, None, -1, 0, dropout_p, 0.2, 1e-5, 1.0, "cpu")
    _, _, o2, o = torch.ops.rdfkern.diff_attn_fwd(*inputs, *options)
    ones, zeros = torch.ones_like(inputs[5]), torch.zeros_like(inputs[5])
    wide = [x.float() for x in inputs[:5]]
    plain = (*options[:-3], None, 1.0, "cpu")
    second = torch.ops.rdfkern.diff_attn_fwd(*wide, -ones, zeros, *plain)[0]
    both = torch.ops.rdfkern.diff_attn_fwd(*wide, *inputs[5:], *plain)[0]
    torch.testing.assert_close(o2, second, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(o, both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("keys", [200, 600, 4200])
def test_gradients_of_unseen_rows_are_written(keys, kv_heads):
    """Every new tensor is full of NaN here; windows and padding leave keys and queries alone."""
    inputs = inputs_of((3, 4, kv_heads, 150, keys, 16, 32))
    inputs_short = inputs_of((3, 4, kv_heads, 150, 40, 16, 32))
    torch.use_deterministic_algorithms(True)
    try:
        masked = {"key_padding_mask": padding(keys)}
        for given, options in (
            (inputs, {"window": (10, 0)}),
            (inputs, {"window": (10, 5)} | masked),
            (inputs, {"is_causal": True} | masked),
            (inputs_short, {"window": (3, 3)}),
        ):
            check(given, **options)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("keys", [80, 600])
def test_dropout_gradient_of_what_is_linear(keys):
    """lam, alpha and v: a difference of outputs is exact up to rounding."""
    inputs = inputs_of((2, 4, 2, 50, keys, 16, 40))
    upstream = rand(2, 4, 50, 40, seed=1)
    torch.manual_seed(3)
    result = run("cpu", inputs, upstream, dropout_p=0.4)
    for at, name in ((5, "lam"), (6, "alpha")):
        moved = [x.clone() for x in inputs]
        moved[at] += 1.0
        torch.manual_seed(3)
        out = run("cpu", moved, upstream, dropout_p=0.4)["out"]
        difference = ((out - result["out"]) * upstream).sum(-1)
        torch.testing.assert_close(result[name], difference, rtol=1e-4, atol=1e-4)
    for key in range(0, keys, 37):
        moved = [x.clone() for x in inputs]
        moved[4][:, :, key] += 1.0
        torch.manual_seed(3)
        out = rdfkern.diff_attention(*moved[:6], alpha=moved[6], dropout_p=0.4, impl="cpu")
        difference = ((out - result["out"]) * upstream).sum((1, 2, 3))
        gradient = result["v"][:, :, key].sum((1, 2))
        torch.testing.assert_close(gradient, difference, rtol=1e-3, atol=1e-3)


def test_a_longest_sequence_that_is_not_raises_in_compiled_code_too():
    """There, lengths are not checked before the kernel."""
    tensors = [x[0].transpose(0, 1) for x in inputs_of((1, 2, 2, 4100, 4100, 16, 16))]
    cu = torch.tensor([0, 4100], dtype=torch.int32)
    options = (None, None, None, cu, cu, None, 4100, 200, -1, -1, 0.0, 0.2, None, 1.0, "cpu")
    saved = torch.ops.rdfkern.diff_attn_fwd(*tensors, *options, keeps_o2=False)
    with pytest.raises((ValueError, RuntimeError), match="max_seqlen_k"):
        torch.ops.rdfkern.diff_attn_bwd(saved[0], *tensors, *saved, *options, True)


def test_exported_with_any_length():
    """The limit must not become a condition on the lengths of an exported program."""

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x, v):
            return rdfkern.diff_attention(x * self.weight, x, x, x, v, 0.5)

    x, v = rand(1, 2, 20, 16, seed=1), rand(1, 2, 20, 32, seed=2)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Attend(), (x, v), dynamic_shapes=({2: length}, {2: length}))
    for lq in (20, 300):
        x, v = rand(1, 2, lq, 16, seed=1), rand(1, 2, lq, 32, seed=2)
        assert torch.equal(program.module()(x, v), Attend()(x, v))


# name: (file, what stands there, what is planted, the tests that must notice)
FAULTS = {
    "sums over what was never written": (
        "csrc/cpu/diff_attention_bwd.cpp",
        "          clear_up_to(at);\n",
        "",
        "unseen",
    ),
    "later heads write over earlier ones": (
        "csrc/cpu/diff_attention_bwd.cpp",
        "          summed = std::max(summed, block.first - key_begin + block.count);\n",
        "",
        "forms and 90",
    ),
    "the gradient of lam is not there": (
        "csrc/cpu/diff_attention_bwd_weights.h",
        "        store(rows.delta[map] + i, delta);\n",
        "",
        "forms and plain and 90",
    ),
    "a long sum without its first part": (
        "csrc/cpu/diff_attention.h",
        "gemm_add<ORDER>(rows, columns, inner - first,",
        "gemm_anew<ORDER>(rows, columns, inner - first,",
        "forms and plain and 90",
    ),
    "keys of a window from the first": (
        "csrc/cpu/diff_attention_fwd_whole.cpp",
        "blocks[map].from(from - begin + first)",
        "blocks[map].from(first)",
        "forms and narrow and 90",
    ),
    "second map dropped like the first": (
        "csrc/cpu/diff_attention_fwd_whole.cpp",
        "second *= load(factors[1] + at);",
        "second *= load(factors[0] + at);",
        "dropout_gradient",
    ),
    "one key too many": (
        "ops/diff_attention/op.py",
        'WHOLE_KEYS = {"cpu": 4096}',
        'WHOLE_KEYS = {"cpu": 4097}',
        "forms and plain and 4097",
    ),
    "a block's share by its own maximum alone": (
        "csrc/cpu/diff_attention_whole.h",
        "const Vec factor = exp2(load(shares_[b] + first) - shift);",
        "const Vec factor = shift - shift + 1.0f;",
        "forms and plain and 600",
    ),
    "D of the last block only": (
        "csrc/cpu/diff_attention_bwd_weights.h",
        "delta += load(deltas_[map][b] + i)",
        "delta = load(deltas_[map][b] + i)",
        "forms and plain and 600",
    ),
    "factors of another block": (
        "csrc/cpu/diff_attention_bwd.cpp",
        "              drop(panel, *block, of_block);\n",
        "",
        "dropout_gradient",
    ),
    "values of the first block again": (
        "csrc/cpu/diff_attention_fwd_whole.cpp",
        "values.from(from - begin + first)",
        "values.from(from - begin)",
        "forms and plain and 600",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, catches):
    catches(*FAULTS[fault][:3], "test_diff_attention_cpu_whole.py", FAULTS[fault][3])
