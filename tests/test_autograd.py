"""When the kernels are recorded by autograd, and what they refuse of it."""

import pytest
import torch
from torch.autograd import forward_ad

import rdfkern
from rdfkern import RelationSpec
from rdfkern._backends.autograd import is_recorded

GRAPH = RelationSpec.speaker_direction(2, 2, 2).bind(
    torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 3, 5])
)
RANDOM = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(shape, generator=RANDOM)


WEIGHT, LOGIT_REL = rand(GRAPH.num_relations, 4, 3), rand(GRAPH.num_relations, 2)
ROWS = rand(1, 2, 5, 8)


def attend(v, impl):
    return rdfkern.diff_attention(ROWS, ROWS, ROWS, ROWS, v, 0.5, impl=impl)


def convolve(x, impl):
    return rdfkern.relation_conv(x, WEIGHT, GRAPH, impl=impl)


def attend_relations(logits, impl):
    value = torch.ones(5, 2, 3).cumsum(0)
    return rdfkern.relation_attention(value, logits, logits, LOGIT_REL, GRAPH, impl=impl)


OPERATIONS = {
    "diff_attention": (attend, rand(1, 2, 5, 16)),
    "relation_conv": (convolve, rand(5, 4)),
    "relation_attention": (attend_relations, rand(5, 2)),
}


@pytest.fixture(params=OPERATIONS)
def case(request):
    reason = rdfkern.available_backends(request.param)["cpu"]
    if reason is not None:
        pytest.skip(reason)
    return OPERATIONS[request.param]


def test_recorded_where_a_gradient_is_asked():
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert is_recorded(None, plain, leaf) and not is_recorded(plain, None, 3)
    with torch.no_grad():
        assert not is_recorded(leaf)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain, plain)
        assert is_recorded(plain, dual) and not is_recorded(plain, torch.tensor(1))


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_kernels_refuse_forward_mode(case, grad_enabled):
    function, x = case
    with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode"):
            function(dual, "cpu")
        tangent = forward_ad.unpack_dual(function(dual, "reference")).tangent
    step = 1e-3 * torch.ones_like(x)
    slope = (function(x + step, "reference") - function(x - step, "reference")) / 2e-3
    torch.testing.assert_close(tangent, slope, rtol=1e-2, atol=1e-2)


def test_kernels_refuse_functional_transforms(case):
    function, x = case
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(lambda x: function(x, "cpu").sum())(x)
        assert transform(lambda x: function(x, "reference").sum())(x).isfinite().all()
