"""FLOP formulas of the registered operators, counted by torch."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rdfkern

UNIT = 2 * 2 * 3 * 48 * 48 * 16  # one matmul of L²·D for B=2, H=3, L=48, D=16


def leaves(lq=48, lk=48, dim=16, value_dim=32, kv_heads=3):
    shapes = [(2, 3, lq, dim), (2, kv_heads, lk, dim)] * 2 + [(2, kv_heads, lk, value_dim)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def count(function, *inputs):
    with FlopCounterMode(display=False) as forward:
        out = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.fixture(autouse=True)
def needs_the_cpu_kernels():
    reason = rdfkern.available_backends("diff_attention")["cpu"]
    inputs = leaves(4, 4)
    reason = rdfkern.available_backends("diff_attention", *inputs, 0.5)["cpu"] or reason
    if reason is not None:
        pytest.skip(reason)


def attend(*inputs, **options):
    return rdfkern.diff_attention(*inputs, 0.5, impl="cpu", **options)


def test_six_units_forward_and_ten_backward():
    assert count(attend, *leaves()) == (6 * UNIT, 10 * UNIT)


def test_other_shapes():
    forward, backward = count(attend, *leaves(lq=5, lk=7, value_dim=24, kv_heads=1))
    pairs = 2 * 3 * 5 * 7
    assert forward == 2 * pairs * (2 * 16 + 2 * 24)
    assert backward == 2 * pairs * (6 * 16 + 2 * 24)


def test_masks_are_not_subtracted_and_the_norm_is_not_added():
    options = {"is_causal": True, "norm_eps": 1e-5, "window": (3, 0)}
    assert count(lambda *x: attend(*x, **options), *leaves()) == (6 * UNIT, 10 * UNIT)


def test_packed_sequences_count_by_themselves():
    q, k, v = torch.randn(9, 2, 4), torch.randn(12, 2, 4), torch.randn(12, 2, 8)
    cu_q, cu_k = torch.tensor([0, 5, 5, 9]), torch.tensor([0, 6, 8, 12])

    def attend(q, k, v):
        return rdfkern.diff_attention_varlen(q, k, q, k, v, 0.5, cu_q, cu_k, 5, 6, impl="cpu")

    pairs = 2 * (5 * 6 + 0 * 2 + 4 * 4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert count(attend, *inputs) == (2 * pairs * 24, 2 * pairs * 40)


def test_the_temporal_form_has_one_map():
    q, k, v = (torch.randn(1, 2, 10, d, requires_grad=True) for d in (8, 8, 16))

    def attend(q, k, v):
        return rdfkern.temporal_diff_attention(q, k, v, 0.5, impl="cpu")

    assert count(attend, q, k, v) == (2 * 2 * 10 * 10 * 24, 2 * 2 * 10 * 10 * (3 * 8 + 2 * 16))


def test_modules_are_counted():
    layer = rdfkern.nn.MultiheadDiffAttention(32, 2, batch_first=True)
    x = torch.randn(1, 10, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x, x, x, need_weights=False)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.rdfkern.diff_attn_fwd] == 6 * 2 * 2 * 10 * 10 * 8
    assert counts[torch.ops.aten.addmm] == 4 * 2 * 10 * 32 * 32


@pytest.mark.parametrize("first", ["import rdfkern", "import torch.utils.flop_counter as c"])
def test_registered_whichever_is_imported_first(first):
    code = (
        "import sys, torch\n"
        f"{first}\n"
        "import rdfkern\n"
        "if 'torch.utils.flop_counter' not in sys.modules: assert 'triton' not in sys.modules\n"
        "import importlib.util; assert importlib.util.find_spec('torch.utils.flop_counter')\n"
        "import torch.utils.flop_counter as c\n"
        "assert torch.ops.rdfkern.diff_attn_fwd in c.flop_registry\n"
        "assert torch.ops.rdfkern.diff_attn_bwd in c.flop_registry\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('rdfkern')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
