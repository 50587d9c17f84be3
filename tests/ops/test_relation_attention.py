import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_attention
from rdfkern.testing import assert_within_budget

IMPLEMENTATIONS = ("torch", "reference")
NAMES = ("value", "logit_dst", "logit_src", "logit_rel")


def random_graph(num_src, num_dst, relations, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(max(num_src, 1), (edges,), generator=generator)
    target = torch.randint(max(num_dst, 1), (edges,), generator=generator)
    kind = torch.randint(max(relations, 1), (edges,), generator=generator)
    edge_index = torch.stack([source, target])
    return RelationGraph.from_edges(edge_index, kind, (num_src, num_dst), relations)


def random_inputs(graph, heads, width, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (graph.num_src, heads, width),
        (graph.num_dst, heads),
        (graph.num_src, heads),
        (graph.num_relations, heads),
    )
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def loops(value, logit_dst, logit_src, logit_rel, graph, negative_slope=0.2):
    """The formula, target by target, head by head, edge by edge."""
    (source, target), kind = graph.to_edges()
    out = []
    for node in range(graph.num_dst):
        for head in range(value.shape[1]):
            edges = [edge for edge in range(len(kind)) if target[edge] == node]
            scores = []
            for edge in edges:
                score = logit_dst[node, head] + logit_src[source[edge], head]
                score = score + logit_rel[kind[edge], head]
                scores.append(torch.where(score >= 0, score, negative_slope * score).exp())
            row = value.new_zeros(value.shape[2])
            for edge, score in zip(edges, scores, strict=True):
                row = row + score / sum(scores) * value[source[edge], head]
            out.append(row)
    if not out:
        return value.new_zeros((graph.num_dst, *value.shape[1:]))
    return torch.stack(out).view(graph.num_dst, *value.shape[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "width"), [(1, 5), (3, 1), (2, 7)])
@pytest.mark.parametrize("negative_slope", [0.2, 0.0, 1.5])
def test_values_and_gradients_equal_loops(impl, heads, width, negative_slope):
    graph = random_graph(6, 7, 4, 25)
    inputs = random_inputs(graph, heads, width)
    out = relation_attention(*inputs, graph, negative_slope=negative_slope, impl=impl)
    expected = loops(*inputs, graph, negative_slope)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(out.shape).double()
    actual = torch.autograd.grad(out, inputs, upstream)
    for got, want in zip(actual, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("edges", [0, 9])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(impl, edges, dropout_p):
    graph = random_graph(4, 3, 3, edges)
    inputs = random_inputs(graph, 2, 3)

    def run(*inputs):
        torch.manual_seed(7)
        return relation_attention(*inputs, graph, dropout_p=dropout_p, impl=impl)

    assert torch.autograd.gradcheck(run, inputs)


def test_second_derivatives():
    graph = random_graph(4, 3, 3, 9)
    inputs = random_inputs(graph, 2, 3)

    def run(*inputs):
        return relation_attention(*inputs, graph, impl="torch")

    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_targets_without_edges_give_zero_and_zero_gradients(impl):
    graph = RelationGraph.from_edges(torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 1]), 4, 2)
    inputs = random_inputs(graph, 2, 3)
    out = relation_attention(*inputs, graph, impl=impl)
    assert not out[[0, 1, 3]].any() and out[2].all()
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.isfinite().all() for grad in gradients)
    assert not gradients[1][[0, 1, 3]].any()
    assert not gradients[0][[2, 3]].any() and not gradients[2][[2, 3]].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sources_masked_by_minus_infinity(impl):
    graph = RelationGraph.from_edges(
        torch.tensor([[0, 1, 1], [0, 0, 2]]), torch.zeros(3, dtype=torch.int64), 3, 1
    )
    inputs = random_inputs(graph, 1, 2)
    with torch.no_grad():
        inputs[2][1] = float("-inf")
    out = relation_attention(*inputs, graph, impl=impl)
    torch.testing.assert_close(out[0], inputs[0][0])
    assert not out[1:].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.square().sum(), inputs))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_src", "num_dst", "relations"), [(0, 0, 2), (0, 3, 2), (3, 0, 0)])
def test_empty(impl, num_src, num_dst, relations):
    graph = random_graph(num_src, num_dst, relations, 0)
    inputs = random_inputs(graph, 2, 3)
    out = relation_attention(*inputs, graph, impl=impl)
    assert out.shape == (num_dst, 2, 3) and not out.any()
    gradients = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in gradients)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits_stay_finite(impl):
    graph = random_graph(5, 5, 2, 20)
    inputs = random_inputs(graph, 2, 3, torch.float32)
    inputs[1:] = [(1000 * logit).detach().requires_grad_() for logit in inputs[1:]]
    out = relation_attention(*inputs, graph, impl=impl)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_sum_to_one_over_all_relations_and_duplicates(impl):
    graph = RelationGraph.from_edges(
        torch.tensor([[0, 0, 1], [1, 1, 1]]), torch.tensor([0, 0, 1]), 2, 2
    )
    value = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    zeros = torch.zeros(2, 1)
    out = relation_attention(value, zeros, zeros, zeros, graph, impl=impl)
    torch.testing.assert_close(out[1, 0], torch.tensor([2 / 3, 1 / 3]))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_implicit_equals_explicit_and_loops(data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    total, seed = sum(lengths), data.draw(st.integers(0, 99))
    past, future = (data.draw(st.one_of(st.none(), st.integers(0, 4))) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-1, 5, (3, 3, 3), generator=generator)
    keys = torch.randint(3, (total,), generator=generator)
    positions = torch.randint(5, (total,), generator=generator)
    graph = RelationSpec(past, future, table, 5).bind(
        keys, torch.tensor([0, *lengths]).cumsum(0), positions
    )
    (edge_index, kind), shuffle = graph.to_edges(), torch.randperm(len(graph.to_edges()[1]))
    explicit = RelationGraph.from_edges(edge_index[:, shuffle], kind[shuffle], total, 5)
    inputs = random_inputs(graph, 2, 3, seed=seed)
    expected = loops(*inputs, graph)
    for impl in IMPLEMENTATIONS:
        for either in (graph, explicit):
            out = relation_attention(*inputs, either, impl=impl)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dialogues_do_not_depend_on_their_batch(impl):
    lengths = [4, 1, 6]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    spec = RelationSpec.redifu_self(2, 3)
    keys = torch.arange(11) % 2
    together = spec.bind(keys, cu_seqlens)
    inputs = random_inputs(together, 2, 3)
    out = relation_attention(*inputs, together, impl=impl)
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = spec.bind(keys[first:end], torch.tensor([0, end - first]))
        part = [tensor[first:end] for tensor in inputs[:3]]
        expected = relation_attention(*part, inputs[3], alone, impl=impl)
        torch.testing.assert_close(out[first:end], expected, rtol=1e-12, atol=1e-12)


def test_equals_the_dense_form_of_the_released_network():
    """softmax over j of where(code > 0, LeakyReLU(u_i + v_j + c[code]), -9e15)."""
    keys = torch.tensor([0, 1, 1, 0, 1, 0])
    graph = RelationSpec.redifu_cross(2, 2).bind(keys, torch.tensor([0, 6]))
    value, dst, src, rel = random_inputs(graph, 1, 4)
    scores = torch.full((6, 6), -9e15, dtype=torch.float64)
    for i in range(6):
        for j in range(max(0, i - 2), min(6, i + 3)):
            if keys[i] != keys[j] or i == j:
                code = 1 if i == j else 4 if i < j else 5
                scores[i, j] = F.leaky_relu(dst[i, 0] + src[j, 0] + rel[code - 1, 0], 0.2)
    expected = scores.softmax(dim=1) @ value[:, 0]
    out = relation_attention(value, dst, src, rel, graph)[:, 0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_dropout_scales_what_it_keeps_and_is_the_same_in_every_implementation():
    graph = random_graph(1, 1, 1, 4000)
    zeros = torch.zeros(1, 2)
    arguments = (torch.ones(1, 2, 1), zeros, zeros, torch.zeros(1, 2), graph)
    outs = []
    for impl in IMPLEMENTATIONS:
        torch.manual_seed(8)
        outs.append(relation_attention(*arguments, dropout_p=0.75, impl=impl))
    torch.testing.assert_close(*outs)
    # Every kept weight is 4/4000, so that the sums count the kept edges of both heads.
    kept = outs[0].flatten() * 1000
    assert ((kept - 1000).abs() < 150).all() and kept[0] != kept[1]
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_mask_follows_the_order_of_the_edges(impl):
    graph = random_graph(4, 3, 2, 15)
    edges = graph.to_edges()
    inputs = random_inputs(graph, 2, 3)
    torch.manual_seed(9)
    out = relation_attention(*inputs, graph, dropout_p=0.5, impl=impl)
    torch.manual_seed(9)
    keep = F.dropout(torch.ones(15, 2).double(), 0.5)
    value, dst, src, rel = inputs
    (source, target), kind = edges
    score = F.leaky_relu(dst[target] + src[source] + rel[kind], 0.2).exp()
    total = torch.zeros(3, 2).double().index_add(0, target, score)
    message = (score / total[target] * keep)[:, :, None] * value[source]
    expected = torch.zeros(3, 2, 3).double().index_add(0, target, message)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(dtype):
    graph = random_graph(40, 40, 5, 400)
    (source, target), kind = graph.to_edges()
    inputs = [tensor.detach() for tensor in random_inputs(graph, 3, 9, dtype)]
    upstream = torch.randn(40, 3, 9).to(dtype)

    def plain(value, dst, src, rel):
        logit = F.leaky_relu(dst[target] + src[source] + rel[kind], 0.2)
        peak = torch.full_like(dst, -100.0).scatter_reduce(
            0, target[:, None].expand_as(logit), logit.detach(), "amax"
        )
        raw = (logit - peak[target]).exp()
        attention = raw / torch.zeros_like(dst).index_add(0, target, raw)[target]
        return torch.zeros_like(value).index_add(0, target, attention[:, :, None] * value[source])

    def measure(function, cast):
        own = [cast(tensor).requires_grad_() for tensor in inputs]
        out = function(*own)
        gradients = torch.autograd.grad(out, own, upstream.to(out.dtype))
        return dict(zip(["out", *NAMES], [out, *gradients], strict=True))

    def op(impl):
        return lambda *own: relation_attention(*own, graph, impl=impl)

    truth = measure(op("reference"), torch.Tensor.double)
    allowed = measure(plain, torch.Tensor.clone)
    for impl in IMPLEMENTATIONS:
        assert_within_budget(measure(op(impl), torch.Tensor.clone), allowed, truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_inputs(impl):
    graph = random_graph(5, 5, 2, 12)
    value, dst, src, rel = (tensor.detach() for tensor in random_inputs(graph, 2, 3))
    strided = value.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.stack([dst, src], dim=2)
    out = relation_attention(strided, wide[:, :, 0], wide[:, :, 1], rel, graph, impl=impl)
    torch.testing.assert_close(out, loops(value, dst, src, rel, graph), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_thousand_relations(impl):
    graph = random_graph(8, 8, 1000, 20)
    inputs = random_inputs(graph, 2, 3)
    out = relation_attention(*inputs, graph, impl=impl)
    torch.testing.assert_close(out, loops(*inputs, graph), rtol=1e-12, atol=1e-12)


def test_autocast():
    graph = random_graph(5, 5, 2, 12)
    inputs = random_inputs(graph, 2, 3, torch.float32)
    for impl in IMPLEMENTATIONS:
        with torch.autocast("cpu", torch.bfloat16):
            out = relation_attention(*inputs, graph, impl=impl)
        expected = relation_attention(*(t.bfloat16() for t in inputs), graph, impl=impl)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_compiles_to_one_graph_once_prepared():
    graph = RelationSpec.redifu_self(2, 2).bind(torch.arange(9) % 2, torch.tensor([0, 9]))
    inputs = random_inputs(graph, 2, 3, torch.float32)

    def run(*inputs):
        return relation_attention(*inputs, graph, impl="torch")

    expected = run(*inputs)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    out = torch.compile(run, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(out, expected)
    actual = torch.autograd.grad(out.square().sum(), inputs)
    for got, want in zip(actual, gradients, strict=True):
        torch.testing.assert_close(got, want)


GRAPH = random_graph(4, 3, 2, 6)
VALUE, DST, SRC, REL = (tensor.detach() for tensor in random_inputs(GRAPH, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((VALUE, DST, SRC, REL, None), {}, TypeError, "graph must be a RelationGraph"),
        ((VALUE[:3], DST, SRC, REL, GRAPH), {}, ValueError, "value must have shape"),
        ((VALUE[:, 0], DST, SRC, REL, GRAPH), {}, ValueError, "value must have shape"),
        ((VALUE, SRC, SRC, REL, GRAPH), {}, ValueError, "logit_dst must have shape"),
        ((VALUE, DST, DST, REL, GRAPH), {}, ValueError, "logit_src must have shape"),
        ((VALUE, DST, SRC, REL[:1], GRAPH), {}, ValueError, "logit_rel must have shape"),
        ((VALUE, DST, SRC, REL[:, :1], GRAPH), {}, ValueError, "logit_rel must have shape"),
        ((VALUE, DST.float(), SRC, REL, GRAPH), {}, TypeError, "logit_dst must have the dtype"),
        ((VALUE, DST, SRC, REL, GRAPH), {"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
        ((VALUE, DST, SRC, REL, GRAPH), {"dropout_p": "0"}, TypeError, "dropout_p must be a"),
        ((VALUE, DST, SRC, REL, GRAPH), {"negative_slope": None}, TypeError, "negative_slope"),
        (
            (VALUE, DST, SRC, REL, GRAPH),
            {"impl": "triton"},
            rdfkern.BackendUnavailableError,
            "impl='triton' cannot run relation_attention",
        ),
    ],
)
def test_rejects(arguments, options, error, message):
    with pytest.raises(error, match=message):
        relation_attention(*arguments, **options)
