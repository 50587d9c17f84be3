"""Attention whose logits are products with the values equals attention of those logits."""

import pytest
import torch

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_attention, relation_gat
from rdfkern.ops.relation_mp import bands
from rdfkern.ops.relation_mp.windows import windows
from rdfkern.testing import assert_within_budget

REASON = rdfkern.available_backends("relation_gat")["cpu"]
IMPLEMENTATIONS = ["torch", "reference"] + ["cpu"] * (REASON is None)
NAMES = ("out", "value", "att_dst", "att_src", "logit_rel")


def rule(lengths=(9, 1, 30), seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(3, (sum(lengths),), generator=generator)
    spec = RelationSpec.redifu_self(3, 5)
    return spec.bind(keys, torch.tensor([0, *lengths]).cumsum(0))


def edges_of(graph):
    return RelationGraph.from_edges(*graph.to_edges(), graph.num_src, graph.num_relations)


def in_any_order():
    """Two modalities share steps, and the rows of a dialogue do not follow them."""
    generator = torch.Generator().manual_seed(1)
    lengths = (30, 1, 600)
    keys = torch.randint(3, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.randperm(n, generator=generator) // 2 for n in lengths])
    spec = RelationSpec.redifu_self(3, 5)
    return spec.bind(keys, torch.tensor([0, *lengths]).cumsum(0), positions=positions)


def inputs_of(graph, heads=2, width=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads + width)
    shapes = [(graph.num_src, heads, width), *[(heads, width)] * 2, (graph.num_relations, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def outcome(function, inputs, graph, wide=False, **options):
    leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
    out = function(*leaves, graph, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def by_logits(value, att_dst, att_src, logit_rel, graph, **options):
    dst, src = ((value * vector).sum(2) for vector in (att_dst, att_src))
    return relation_attention(value, dst, src, logit_rel, graph, **options)


@pytest.mark.parametrize("softmax", ["across", "within"])
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (2, 20), (3, 1)])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(impl, explicit, heads, width, softmax, dtype):
    graph = edges_of(rule()) if explicit else rule()
    inputs, options = inputs_of(graph, heads, width, dtype), {"softmax": softmax}
    results = (
        outcome(relation_gat, inputs, graph, impl=impl, **options),
        outcome(by_logits, inputs, graph, impl="torch", **options),
        outcome(by_logits, inputs, graph, wide=True, impl="torch", **options),
    )
    # Gradients of the vectors and of the relations are sums that nearly cancel: see the tests of
    # relation_attention.
    for names, factor in (({"out"}, 2.0), (set(NAMES) - {"out"}, 6.0)):
        parts = ({name: result[name] for name in names} for result in results)
        assert_within_budget(*parts, factor=factor)


# Sums that several tasks share; rows in an order of their own. (Graphs of no pair whose logit is so
# near to 0 that rounding decides its slope.)
WIDE = {"long": lambda: rule((2500, 4)), "any": in_any_order}


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("softmax", ["across", "within"])
@pytest.mark.parametrize(("heads", "width"), [(1, 32), (2, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WIDE)
def test_error_budget_of_many_rows(name, dtype, heads, width, softmax):
    graph, options = WIDE[name](), {"softmax": softmax}
    inputs = inputs_of(graph, heads, width, dtype)
    results = (
        outcome(relation_gat, inputs, graph, impl="cpu", **options),
        outcome(by_logits, inputs, graph, impl="torch", **options),
        outcome(by_logits, inputs, graph, wide=True, impl="torch", **options),
    )
    for names, factor in (({"out"}, 2.0), ({"value", "att_dst", "att_src"}, 3.0)):
        parts = ({name: result[name] for name in names} for result in results)
        assert_within_budget(*parts, factor=factor)
    # A sum over all edges that nearly cancels.
    parts = ({"logit_rel": result["logit_rel"]} for result in results)
    assert_within_budget(*parts, factor=30.0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_float64_is_exact(impl):
    graph = rule()
    inputs = [x.double() for x in inputs_of(graph)]
    expected = outcome(by_logits, inputs, graph, impl="torch", negative_slope=-0.4)
    for name, value in outcome(relation_gat, inputs, graph, impl=impl, negative_slope=-0.4).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_gradients_of_some_inputs_and_of_strided_views(impl):
    graph = rule()
    inputs = inputs_of(graph)
    expected = outcome(by_logits, inputs, graph, impl="torch")
    strided = [x.mT.contiguous().mT for x in inputs]
    found = outcome(relation_gat, strided, graph, impl=impl)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    only = inputs[1].clone().requires_grad_()
    out = relation_gat(inputs[0], only, *inputs[2:], graph, impl=impl)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad(out, only, upstream)
    torch.testing.assert_close(gradient, expected["att_dst"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_is_drawn_again_for_the_gradients(impl):
    graph = rule()
    inputs = [x.double() if impl != "cpu" else x for x in inputs_of(graph)]
    results = []
    for function in (relation_gat, by_logits):
        torch.manual_seed(3)
        results.append(outcome(function, inputs, graph, impl=impl, dropout_p=0.4))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-4)
    kept = outcome(relation_gat, inputs, graph, impl=impl)
    assert not torch.allclose(results[0]["out"], kept["out"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_under_autocast(impl):
    graph = rule()
    inputs = inputs_of(graph)
    halves = [x.bfloat16() for x in inputs]
    expected = outcome(relation_gat, halves, graph, impl=impl)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = relation_gat(*leaves, graph, impl=impl)
    assert torch.equal(out, expected["out"])
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_gradients_taken_under_autocast_keep_their_precision():
    graph = rule()
    inputs = inputs_of(graph)
    expected = outcome(relation_gat, inputs, graph, impl="cpu")
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = relation_gat(*leaves, graph, impl="cpu")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(out, leaves, upstream)
    for name, gradient in zip(NAMES[1:], gradients, strict=True):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [(1,), (1, 0, 2)])
def test_few_nodes(impl, lengths):
    graph = rule(lengths)
    found = outcome(relation_gat, inputs_of(graph), graph, impl=impl)
    expected = outcome(by_logits, inputs_of(graph), graph, impl="reference")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_nodes(impl):
    graph = rule((0,))
    assert relation_gat(*inputs_of(graph), graph, impl=impl).shape == (0, 2, 20)
    if impl == "cpu":
        found = outcome(relation_gat, inputs_of(graph), graph, impl=impl)
        assert not any(value.any() for value in found.values())


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("heads", [1, 2])
def test_one_graph_under_compile(heads):
    torch._dynamo.reset()
    graph = rule()
    inputs = inputs_of(graph, heads)
    expected = outcome(relation_gat, inputs, graph, impl="cpu")
    compiled = torch.compile(relation_gat, fullgraph=True, backend="aot_eager")
    for name, value in outcome(compiled, inputs, graph, impl="cpu").items():
        torch.testing.assert_close(value, expected[name])
    torch._dynamo.reset()


GRAPH = rule((3, 2))
VALUE, DST, SRC, REL = inputs_of(GRAPH, 2, 4)
ONE_SIDED = RelationGraph.from_edges(
    torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0]), (5, 4), 5
)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((VALUE, DST, SRC, REL, None), {}, TypeError, "graph must be a RelationGraph"),
        ((VALUE, DST, SRC, REL, ONE_SIDED), {}, ValueError, "as many sources as targets, got 5 a"),
        ((VALUE, DST[:, :3], SRC, REL, GRAPH), {}, ValueError, r"att_dst must have shape \(H, C\)"),
        ((VALUE, DST, SRC[:1], REL, GRAPH), {}, ValueError, r"att_src must have shape \(H, C\)"),
        ((VALUE, DST, SRC, REL[:1], GRAPH), {}, ValueError, "logit_rel must have shape"),
        ((VALUE[:4], DST, SRC, REL, GRAPH), {}, ValueError, "value must have shape"),
        ((VALUE, DST.double(), SRC, REL, GRAPH), {}, TypeError, "att_dst must have the dtype"),
        ((VALUE, None, SRC, REL, GRAPH), {}, TypeError, "att_dst must be a tensor, got NoneType"),
        ((VALUE, DST, SRC, REL, GRAPH), {"negative_slope": "1"}, TypeError, "must be a number"),
        ((VALUE, DST, SRC, REL, GRAPH), {"softmax": "all"}, ValueError, "softmax must be"),
        ((VALUE, DST, SRC, REL, GRAPH), {"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
        ((VALUE, DST, SRC, REL, GRAPH), {"impl": "gpu"}, ValueError, "impl must be one of"),
    ],
)
def test_rejects(arguments, options, error, message):
    with pytest.raises(error, match=message):
        relation_gat(*arguments, **options)


def test_public_name():
    assert "relation_gat" in rdfkern.__all__
    explained = rdfkern.explain("relation_gat", VALUE, DST, SRC, REL, GRAPH)
    assert explained.startswith("relation_gat: ")


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("explicit", [False, True])
def test_opcheck(explicit):
    graph = edges_of(rule()) if explicit else rule()
    layout = bands.layout(graph).tensors if explicit else windows(graph)
    arguments = (*inputs_of(graph), list(layout), torch.tensor(3), 1.0, 0.2, False, True, 0.25)
    arguments = (*arguments, "cpu")
    torch.library.opcheck(torch.ops.rdfkern.relation_attn_fwd.default, arguments)
    out, softmax = torch.ops.rdfkern.relation_attn_fwd(*arguments)
    backward = (torch.ones_like(out), *arguments[:4], out, softmax, *arguments[4:])
    torch.library.opcheck(torch.ops.rdfkern.relation_attn_bwd.default, backward)


# name: (file, what stands there, what is planted, the tests that must notice)
FAULTS = {
    "vectors of the first head for every head": (
        "csrc/cpu/relation_attention.h",
        "return vectors.data() + (side * heads + head) * value_width;",
        "return vectors.data() + side * heads * value_width;",
        "test_error_budget and 20",
    ),
    "sources get the vector of targets": (
        "csrc/cpu/relation_attention_panel.h",
        "value_products(problem_, kSource, head, sources,",
        "value_products(problem_, kTarget, head, sources,",
        "test_error_budget and 16",
    ),
    "short sums are lost": (
        "csrc/cpu/relation_attention_bwd.cpp",
        "totals_[d] += part_[d];",
        "totals_[d] = part_[d];",
        "many_rows and long",
    ),
    "a short sum joins twice": (
        "csrc/cpu/relation_attention_bwd.cpp",
        "    fill(part_.data(), kSides * width_, 0.0f);\n",
        "",
        "many_rows and long",
    ),
    "rows that chunks share bring nothing to the vectors": (
        "csrc/cpu/relation_attention_bwd.cpp",
        "total += vectors_of(part, head)",
        "total += part >= plan_.chunks.size() ? 0 : vectors_of(part, head)",
        "many_rows and long",
    ),
    "the values' gradients lack what flows through targets": (
        "csrc/cpu/relation_attention_bwd.cpp",
        "load(dv + d) + load(target + d) * to_target +",
        "load(dv + d) +",
        "test_error_budget and 16",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, catches):
    catches(*FAULTS[fault][:3], "test_relation_gat.py", FAULTS[fault][3])
