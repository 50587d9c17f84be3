"""When the kernels are recorded by autograd, and what they refuse of it."""

import pytest
import torch
from torch.autograd import forward_ad

import rdfkern
from rdfkern import RelationSpec
from rdfkern._backends.autograd import is_recorded


def new_graph():
    spec = RelationSpec.speaker_direction(2, 2, 2)
    return spec.bind(torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 3, 5]))


GRAPH = new_graph()
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


def test_a_graph_keeps_nothing_of_a_transform():
    graph = new_graph()
    torch.func.grad(lambda x: rdfkern.relation_conv(x, WEIGHT, graph, impl="reference").sum())(
        rand(5, 4)
    )
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    assert not any(wrapped(tensor) for tensor in graph.to_edges())


STARTS = torch.tensor([0, 3, 5])
CALLS = {
    "diff_attention": lambda x, graph, impl: rdfkern.diff_attention(
        *(x.transpose(0, 1)[None],) * 5, 0.5, impl=impl
    ),
    "diff_attention_varlen": lambda x, graph, impl: rdfkern.diff_attention_varlen(
        *(x,) * 5, 0.5, STARTS, STARTS, 3, 3, impl=impl
    ),
    "temporal_diff_attention": lambda x, graph, impl: rdfkern.temporal_diff_attention(
        x, x, x, 0.5, cu_seqlens=STARTS, max_seqlen=3, impl=impl
    ),
    "diffusion_attention": lambda x, graph, impl: rdfkern.diffusion_attention(
        x, x, x, steps=2, restart=0.3, cu_seqlens=STARTS, max_seqlen=3, impl=impl
    ),
    "relation_dot_attention": lambda x, graph, impl: rdfkern.relation_dot_attention(
        x, x, x, LOGIT_REL, graph, impl=impl
    ),
    "relation_conv": lambda x, graph, impl: rdfkern.relation_conv(
        (x[:, 0], x[:, 0]), WEIGHT, graph, impl=impl
    ),
}


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("call", CALLS)
def test_compiled_code_may_give_a_tensor_twice(call, impl):
    reason = rdfkern.available_backends(call)[impl]
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def attend(x):
        return CALLS[call](x, GRAPH, impl)

    def outcome(attend):
        out = attend(x)
        return out, *torch.autograd.grad(out.square().sum(), x)

    # `torch` keeps lists of edges that it makes in the first call, forward and backward.
    expected = outcome(attend)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outcome(compiled), expected)
