"""The C++ kernels of relation convolution against the reference, at every feature and edge."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_conv
from rdfkern.ops.relation_mp import bands, conv_op
from rdfkern.testing import assert_within_budget

REASON = rdfkern.available_backends("relation_conv")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

AGGREGATIONS = ("sum", "mean", "max")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rand(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(form, relations, width_in, width_out, seed=1):
    if form == "full":
        return [rand(relations, width_in, width_out, seed=seed)]
    if form == "blocks":
        return [rand(relations, 2, width_in // 2, width_out // 2, seed=seed)]
    return [rand(relations, 3, seed=seed), rand(3, width_in, width_out, seed=seed + 1)]


def random_edges(num_src, num_dst, relations, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(max(num_src, 1), (edges,), generator=generator)
    target = torch.randint(max(num_dst, 1), (edges,), generator=generator)
    kind = torch.randint(max(relations, 1), (edges,), generator=generator)
    return RelationGraph.from_edges(
        torch.stack([source, target]), kind, (num_src, num_dst), relations
    )


def random_table(keys, relations, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, relations, (keys, keys, 3), generator=generator)


def bind(spec, lengths, positions=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(spec.num_keys, (sum(lengths),), generator=generator)
    if positions == "shared":
        positions = torch.cat([torch.arange(length) // 3 for length in lengths])
    elif positions == "unsorted":
        positions = torch.cat(
            [torch.randint(-n, n + 1, (n,), generator=generator) for n in lengths]
        )
    return spec.bind(keys, torch.tensor([0, *lengths]).cumsum(0), positions)


def run(impl, graph, inputs, upstream, aggr, wide=False):
    """Output and every gradient, by name. `inputs` may hold root, bias, edge_weight, x_dst."""
    leaves = {
        name: (value.double() if wide else value.clone(memory_format=torch.preserve_format))
        .detach()
        .requires_grad_()
        for name, value in inputs.items()
    }
    weight = leaves["weight"]
    if "coefficients" in leaves:
        weight = (leaves["coefficients"], weight)
    x = (leaves["x"], leaves["x_dst"]) if "x_dst" in leaves else leaves["x"]
    out = relation_conv(
        x,
        weight,
        graph,
        aggr=aggr,
        edge_weight=leaves.get("edge_weight"),
        root_weight=leaves.get("root"),
        bias=leaves.get("bias"),
        impl=impl,
    )
    grads = torch.autograd.grad(
        out, list(leaves.values()), upstream.to(out.dtype), materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check(graph, inputs, aggr, seed=99):
    dtype = inputs["x"].dtype
    weight = inputs["weight"]
    width = weight.shape[-1] * (weight.shape[1] if weight.dim() == 4 else 1)
    upstream = rand(graph.num_dst, width, seed=seed, dtype=dtype)
    # The reference takes minutes on many targets or relations; the torch form equals it.
    is_small = graph.num_dst <= 120 and graph.num_relations <= 100
    formula = "reference" if is_small else "torch"
    actual = run("cpu", graph, inputs, upstream, aggr)
    plain = run(formula, graph, inputs, upstream, aggr)
    truth = run(formula, graph, inputs, upstream, aggr, wide=True)
    assert_within_budget(actual, plain, truth, factor=3.0)
    return actual


def inputs_of(graph, width_in, width_out, form="full", dtype=torch.float32, ties=False, **more):
    weight = random_weight(form, graph.num_relations, width_in, width_out)
    x = rand(graph.num_src, width_in, seed=3)
    if ties:
        x = (x * 1.5).round()
    named = {"x": x, "weight": weight[-1], **more}
    if len(weight) == 2:
        named["coefficients"] = weight[0]
    return {name: value.to(dtype) for name, value in named.items()}


dialoguegcn, direction = RelationSpec.dialoguegcn, RelationSpec.speaker_direction
# spec, lengths, positions, width_in, width_out
CASES = {
    "window": (dialoguegcn(3, 4, 2), (30, 1, 0, 17, 40), None, 17, 9),
    "complete": (dialoguegcn(2, None, None), (70, 33), None, 24, 32),
    "past only": (direction(3, None, 0), (50, 20), None, 16, 16),
    "future only": (direction(3, 0, None), (50, 20), None, 33, 7),
    "itself only": (direction(2, 0, 0), (9, 1), None, 8, 8),
    "one utterance each": (dialoguegcn(2, 3, 3), (1, 1, 1, 1), None, 5, 3),
    "one speaker": (dialoguegcn(1, 5, 5), (40,), None, 1, 1),
    "300 speakers": (direction(300, 6, 3), (60, 45), None, 12, 20),
    "random rule": (RelationSpec(3, 6, random_table(4, 11), 13), (25, 31), None, 19, 8),
    "shared positions": (RelationSpec(2, 3, random_table(5, 7)), (30, 42), "shared", 16, 16),
    "unsorted positions": (RelationSpec(7, 2, random_table(3, 4)), (30, 41), "unsorted", 10, 6),
    "long dialogue": (direction(2, None, None), (700, 5), None, 6, 4),
    "wide window": (direction(2, 300, 270), (5, 900), None, 6, 4),
    "wide matrices": (dialoguegcn(2, 3, 3), (40,), None, 290, 150),
}


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_implicit_graphs(case, aggr):
    spec, lengths, positions, width_in, width_out = CASES[case]
    graph = bind(spec, lengths, positions)
    more = {"root": rand(width_in, width_out, seed=7), "bias": rand(width_out, seed=8)}
    check(graph, inputs_of(graph, width_in, width_out, ties=aggr == "max", **more), aggr)


def test_gradients_that_are_sums_of_many_rows():
    graph = bind(direction(2, 1, 0), (8500, 700))
    more = {"root": rand(3, 70, seed=7), "bias": rand(70, seed=8)}
    check(graph, inputs_of(graph, 3, 70, **more), "mean")


# sources, targets, relations, edges
GRAPHS = {
    "bipartite": (40, 25, 5, 300),
    "many duplicates": (3, 4, 2, 200),
    "isolated nodes": (90, 90, 3, 40),
    "more tiles": (500, 700, 4, 3000),
    "few sources": (5, 300, 3, 600),
    "few targets": (300, 5, 3, 600),
    "no edges": (6, 4, 3, 0),
    "a thousand relations": (8, 8, 1000, 12),
}


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("form", ["full", "blocks", "basis"])
@pytest.mark.parametrize("case", GRAPHS)
def test_explicit_graphs(case, form, aggr):
    num_src, num_dst, relations, edges = GRAPHS[case]
    graph = random_edges(num_src, num_dst, relations, edges)
    more = {
        "x_dst": rand(num_dst, 5, seed=6),
        "root": rand(5, 6, seed=7),
        "bias": rand(6, seed=8),
        "edge_weight": rand(edges, seed=9),
    }
    inputs = inputs_of(graph, 18, 6, form, ties=aggr == "max", **more)
    check(graph, inputs, aggr)
    del inputs["edge_weight"], inputs["root"], inputs["x_dst"]
    check(graph, inputs, aggr)


@pytest.mark.parametrize(("num_src", "num_dst"), [(5, 90), (90, 5)])
@pytest.mark.parametrize("relations", [3, 17])
def test_matrices_in_several_parts(num_src, num_dst, relations):
    graph = random_edges(num_src, num_dst, relations, 400)
    widths = (70, 150) if relations == 3 else (290, 270)
    for aggr in ("sum", "mean"):
        check(graph, inputs_of(graph, *widths), aggr)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("form", ["full", "blocks", "basis"])
def test_half_types(form, aggr, dtype):
    more = {"root": rand(10, 6, seed=7), "bias": rand(6, seed=8)}
    graph = bind(dialoguegcn(2, 5, None), (60, 20))
    actual = check(graph, inputs_of(graph, 10, 6, form, dtype, **more), aggr)
    assert {value.dtype for value in actual.values()} == {dtype}
    more["edge_weight"] = rand(200, seed=9)
    graph = random_edges(50, 50, 4, 200)
    check(graph, inputs_of(graph, 10, 6, form, dtype, **more), aggr)


@pytest.mark.parametrize("form", ["blocks", "basis"])
@pytest.mark.parametrize("widths", [(32, 64), (6, 10)])
def test_forms_of_weights_on_implicit_graphs(form, widths):
    graph = bind(dialoguegcn(2, 5, 9), (60, 20))
    for aggr in AGGREGATIONS:
        check(graph, inputs_of(graph, *widths, form, ties=aggr == "max"), aggr)


@pytest.mark.parametrize("explicit", [False, True])
def test_strided_inputs(explicit):
    graph = bind(dialoguegcn(2, 5, 2), (40,))
    edges = graph.to_edges()[1].shape[0]
    inputs = {
        "x": rand(40, 2, 16, seed=1)[:, 1],
        "weight": rand(16, 8, 32, seed=2).permute(1, 2, 0)[:, ::2],
        "bias": rand(32, seed=3)[::2],
        "root": rand(16, 16, seed=4).T,
    }
    if explicit:
        graph = RelationGraph.from_edges(*graph.to_edges(), 40, 8)
        inputs["edge_weight"] = rand(edges, 2, seed=5)[:, 0]
    check(graph, inputs, "mean")
    inputs["x"] = rand(40, 32, seed=1)[:, ::2]
    check(graph, inputs, "max")
    inputs["x"] = rand(1, 16, seed=1).expand(40, 16)
    inputs["weight"] = torch.eye(16).expand(8, 16, 16)
    check(graph, inputs, "sum")


def test_upstream_gradient_of_any_stride():
    graph = bind(dialoguegcn(2, 5, 2), (40,))
    x, weight = rand(40, 16, seed=1), rand(8, 16, 16, seed=2)
    grads = []
    for upstream in (torch.ones(()).expand(40, 16), torch.ones(40, 16)):
        leaf = x.clone().requires_grad_()
        out = relation_conv(leaf, weight, graph, impl="cpu")
        grads.append(torch.autograd.grad(out, leaf, upstream)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize(
    ("num_src", "num_dst", "relations", "width_in", "width_out"),
    [(0, 0, 2, 3, 4), (4, 0, 2, 3, 4), (0, 4, 2, 3, 4), (3, 3, 0, 3, 4), (3, 3, 2, 0, 4)]
    + [(3, 3, 2, 3, 0)],
)
def test_nothing_to_do(aggr, num_src, num_dst, relations, width_in, width_out):
    edges = 5 if num_src and num_dst and relations else 0
    graph = random_edges(num_src, num_dst, relations, edges)
    bias = rand(width_out, seed=1)
    x = torch.randn(num_src, width_in, requires_grad=True)
    weight = torch.randn(relations, width_in, width_out, requires_grad=True)
    out = relation_conv(x, weight, graph, aggr=aggr, bias=bias, impl="cpu")
    assert torch.equal(out, bias.expand(num_dst, -1))
    grads = torch.autograd.grad(out.sum(), [x, weight])
    assert [g.shape for g in grads] == [x.shape, weight.shape]
    assert not any(g.any() for g in grads)


def test_empty_dialogues_only():
    graph = bind(dialoguegcn(2, 1, 1), (0, 0))
    assert relation_conv(torch.zeros(0, 3), torch.ones(8, 3, 2), graph, impl="cpu").shape == (0, 2)


def test_isolated_nodes_get_exactly_root_and_bias():
    graph = RelationGraph.from_edges(torch.tensor([[0], [1]]), torch.tensor([2]), 4, 5)
    out = relation_conv(
        rand(4, 3, seed=1), rand(5, 3, 2, seed=2), graph, bias=torch.ones(2), impl="cpu"
    )
    assert torch.equal(out[[0, 2, 3]], torch.ones(3, 2))
    assert not torch.equal(out[1], torch.ones(2))


def test_relations_without_edges_get_zero_gradients():
    graph = random_edges(8, 8, 1000, 12)
    weight = rand(1000, 3, 2, seed=1).requires_grad_()
    for aggr in AGGREGATIONS:
        out = relation_conv(rand(8, 3, seed=2).abs(), weight, graph, aggr=aggr, impl="cpu")
        (grad,) = torch.autograd.grad(out.sum(), weight)
        unused = torch.ones(1000, dtype=torch.bool)
        unused[graph.to_edges()[1]] = False
        assert not grad[unused].any() and grad[~unused].any(dim=2).any(dim=1).all()


def test_ties_and_maxima_of_zero_share_the_gradient():
    graph = RelationGraph.from_edges(
        torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]]), torch.zeros(4, dtype=torch.int64), 3, 1
    )
    for top in (2.0, 0.0):
        x = torch.tensor([[top], [top], [top - 1.0]], requires_grad=True)
        for impl in ("cpu", "torch", "reference"):
            out = relation_conv(x, torch.ones(1, 1, 1), graph, aggr="max", impl=impl)
            (grad,) = torch.autograd.grad(out.sum(), x)
            torch.testing.assert_close(grad[:, 0], torch.tensor([1 / 3, 2 / 3, 0.0]))


def test_values_that_are_not_finite_stay_where_they_are():
    graph = bind(direction(1, 2, 0), (30,))
    for aggr in AGGREGATIONS:
        x = rand(30, 8, seed=1)
        clean = relation_conv(x, rand(5, 8, 4, seed=2), graph, aggr=aggr, impl="cpu")
        x[10, 3] = float("nan")
        out = relation_conv(x, rand(5, 8, 4, seed=2), graph, aggr=aggr, impl="cpu")
        reached = torch.zeros(30, dtype=torch.bool)
        reached[10:13] = True
        assert out[reached].isnan().all()
        assert torch.equal(out[~reached], clean[~reached])


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_64_bit_indices(aggr, monkeypatch):
    for graph in (bind(dialoguegcn(2, 5, 2), (40, 9)), random_edges(40, 30, 4, 200)):
        inputs = inputs_of(graph, 6, 4)
        narrow = run("cpu", graph, inputs, torch.ones(graph.num_dst, 4), aggr)
        graph._derived.pop("bands", None)
        graph._derived.pop("edge_lists", None)
        with monkeypatch.context() as patch:
            patch.setattr(bands, "_INT32_END", 1)
            assert torch.int64 in {tensor.dtype for tensor in bands.layout(graph).tensors[:1]}
            wide = run("cpu", graph, inputs, torch.ones(graph.num_dst, 4), aggr)
        assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("form", ["full", "blocks", "basis"])
def test_implicit_equals_explicit_equals_rgcnconv(aggr, form):
    pyg = pytest.importorskip("torch_geometric.nn")
    graph = bind(dialoguegcn(3, 6, 4), (40, 1, 23))
    edge_index, edge_type = graph.to_edges()
    explicit = RelationGraph.from_edges(edge_index, edge_type, graph.num_src, 18)
    forms = {"full": {}, "blocks": {"num_blocks": 2}, "basis": {"num_bases": 3}}
    conv = pyg.RGCNConv(12, 8, 18, aggr=aggr, **forms[form])
    conv.use_segment_matmul = False
    inputs = {
        "x": rand(graph.num_src, 12, seed=1),
        "weight": conv.weight.detach(),
        "root": conv.root.detach(),
        "bias": rand(8, seed=2),
    }
    if form == "basis":
        inputs["coefficients"] = conv.comp.detach()
    upstream = rand(graph.num_src, 8, seed=3)
    conv.bias.data = inputs["bias"].clone()
    x = inputs["x"].clone().requires_grad_()
    leaves = {"x": x, "weight": conv.weight, "root": conv.root, "bias": conv.bias}
    if form == "basis":
        leaves["coefficients"] = conv.comp
    out = conv(x, edge_index, edge_type)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    expected = {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
    for either in (graph, explicit):
        actual = run("cpu", either, inputs, upstream, aggr)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=2e-5)


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_rule_equals_its_edges(data):
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    window = st.one_of(st.none(), st.integers(0, 12))
    keys, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 999))
    spec = RelationSpec(data.draw(window), data.draw(window), random_table(keys, 6, seed), 6)
    graph = bind(spec, lengths, data.draw(st.sampled_from([None, "shared", "unsorted"])), seed)
    explicit = RelationGraph.from_edges(*graph.to_edges(), graph.num_src, 6)
    aggr = data.draw(st.sampled_from(AGGREGATIONS))
    inputs = inputs_of(graph, 5, 3, ties=aggr == "max")
    upstream = rand(graph.num_dst, 3, seed=seed)
    actual, expected = (run("cpu", g, inputs, upstream, aggr) for g in (graph, explicit))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_order_of_edges_does_not_matter(aggr):
    graph = random_edges(30, 30, 4, 200)
    edge_index, kind = graph.to_edges()
    inputs = inputs_of(graph, 9, 5, edge_weight=rand(200, seed=4))
    upstream = rand(30, 5, seed=5)
    expected = run("cpu", graph, inputs, upstream, aggr)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(6))
    other = RelationGraph.from_edges(edge_index[:, shuffle], kind[shuffle], 30, 4)
    shuffled = inputs | {"edge_weight": inputs["edge_weight"][shuffle]}
    actual = run("cpu", other, shuffled, upstream, aggr)
    expected["edge_weight"] = expected["edge_weight"][shuffle]
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_dialogues_do_not_depend_on_their_batch_nor_on_the_names_of_speakers(aggr):
    lengths, table = [40, 1, 70, 0, 30], random_table(3, 6, 5)
    spec = RelationSpec(7, None, table, 6)
    x = [rand(length, 6, seed=at) for at, length in enumerate(lengths)]
    keys = [torch.arange(length) * 7 % 11 % 3 for length in lengths]
    weight = rand(6, 6, 4, seed=9)

    def run_batch(order, spec=spec, keys=keys):
        cu_seqlens = torch.tensor([0] + [lengths[i] for i in order]).cumsum(0)
        graph = spec.bind(torch.cat([keys[i] for i in order]), cu_seqlens)
        out = relation_conv(torch.cat([x[i] for i in order]), weight, graph, aggr=aggr, impl="cpu")
        return dict(zip(order, out.split([lengths[i] for i in order]), strict=True))

    together = run_batch([0, 1, 2, 3, 4])
    rename = torch.tensor([2, 0, 1])
    renamed_table = torch.empty_like(table)
    renamed_table[rename[:, None], rename[None, :]] = table
    others = (
        run_batch([3, 2, 0, 4, 1]),
        run_batch([0, 1]) | run_batch([2, 3, 4]),
        run_batch(
            [0, 1, 2, 3, 4],
            RelationSpec(7, None, renamed_table, 6),
            [rename[key] for key in keys],
        ),
    )
    for other in others:
        for dialogue, out in other.items():
            torch.testing.assert_close(out, together[dialogue], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_windows_of_everything_and_of_nothing(aggr):
    x, weight = rand(80, 6, seed=1), rand(5, 6, 4, seed=2)
    keys, cu_seqlens = torch.arange(80) * 5 % 7 % 2, torch.tensor([0, 80])
    outs = [
        relation_conv(x, weight, direction(2, w, w).bind(keys, cu_seqlens), aggr=aggr, impl="cpu")
        for w in (None, 79, 10**15, 0)
    ]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs[3], x @ weight[1])


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_bitwise_equal_over_repeats_and_numbers_of_threads(aggr):
    for graph in (bind(dialoguegcn(3, 9, None), (120, 30, 90)), random_edges(300, 260, 5, 3000)):
        inputs = inputs_of(graph, 17, 9)
        upstream = rand(graph.num_dst, 9, seed=1)
        first = run("cpu", graph, inputs, upstream, aggr)
        for repeat in range(100):
            if repeat == 50:
                torch.set_num_threads(1)
            for name, value in run("cpu", graph, inputs, upstream, aggr).items():
                assert torch.equal(value, first[name]), name
        torch.set_num_threads(2)


class TestRegisteredOperators:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        torch.compiler.reset()

    @staticmethod
    def arguments(explicit, form="full"):
        sources = 17 if form == "full" else 20  # a root needs targets that are the sources
        graph = bind(dialoguegcn(2, 3, 2), (15, 9))
        if explicit:
            graph = random_edges(sources, 17, 4, 90)
        tensors, past, future = bands.layout(graph)
        x = rand(graph.num_src, 6, seed=1)
        weight = random_weight(form, graph.num_relations, 6, 4)[0]
        root = rand(6, 4, seed=5) if form == "full" else None
        addend = rand(4, seed=2) if explicit else rand(graph.num_dst, 4, seed=2)
        edge_weight = rand(90, seed=3) if explicit else None
        layout = (list(tensors), past, future, "mean")
        return x, weight, root, addend, edge_weight, layout, graph.num_dst

    @pytest.mark.parametrize("explicit", [False, True])
    @pytest.mark.parametrize("form", ["full", "blocks"])
    def test_opcheck(self, explicit, form):
        x, weight, root, addend, edge_weight, layout, num_dst = self.arguments(explicit, form)
        rooted = root is not None
        torch.library.opcheck(
            torch.ops.rdfkern.relation_conv_fwd.default,
            (x, weight, root, addend, edge_weight, *layout, num_dst, "cpu"),
        )
        everything = [True, True, rooted, True, explicit]
        for needs in (everything, [False, True] + [False] * 3, [True] + [False] * 4):
            torch.library.opcheck(
                torch.ops.rdfkern.relation_conv_bwd.default,
                (rand(num_dst, 4, seed=4), x, weight, root, edge_weight, *layout, needs, "cpu"),
            )

    @pytest.mark.parametrize("positions", [None, "shared"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_to_one_graph_with_graphs_never_seen_before(self, positions, dynamic):
        spec = dialoguegcn(2, 3, None)

        def convolve(x, weight, bias, graph):
            return relation_conv(x, weight, graph, bias=bias)

        compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        leaves = [rand(8, 6, 4, seed=2).requires_grad_(), rand(4, seed=3).requires_grad_()]
        for lengths in ((15, 9), (7, 8), (15, 9)):
            x = rand(sum(lengths), 6, seed=1).requires_grad_()
            results = []
            for function in (compiled, compiled, convolve):
                graph = bind(spec, lengths, positions)
                out = function(x, *leaves, graph)
                results.append((out, *torch.autograd.grad(out.sum(), [x, *leaves])))
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other))

    @pytest.mark.parametrize("explicit", [False, True])
    def test_compiles_with_the_binding_inside(self, explicit):
        spec = dialoguegcn(2, 3, None)

        def convolve(x, weight, first, second):
            if explicit:
                graph = RelationGraph.from_edges(first, second, 9, 8)
            else:
                graph = spec.bind(first, second)
            return relation_conv(x, weight, graph, aggr="max")

        compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
        if explicit:
            graph = (torch.randint(9, (2, 30)), torch.randint(8, (30,)))
        else:
            graph = (torch.arange(9) % 2, torch.tensor([0, 4, 9]))
        x, weight = rand(9, 6, seed=1).requires_grad_(), rand(8, 6, 4, seed=2)
        assert torch.equal(compiled(x, weight, *graph), convolve(x, weight, *graph))

    def test_export(self):
        spec = dialoguegcn(2, 3, 1)

        class Convolve(torch.nn.Module):
            def forward(self, x, weight, keys, cu_seqlens):
                graph = spec.bind(keys, cu_seqlens)
                return relation_conv(x, weight, graph, aggr="sum")

        inputs = (rand(9, 6, seed=1), rand(8, 6, 4, seed=2), torch.arange(9) % 2)
        inputs = (*inputs, torch.tensor([0, 4, 9]))
        program = torch.export.export(Convolve(), inputs)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("rdfkern.relation_conv_fwd.default") == 1
        other = (*inputs[:2], torch.arange(9) % 3 % 2, torch.tensor([0, 7, 9]))
        for given_inputs in (inputs, other):
            assert torch.equal(program.module()(*given_inputs), Convolve()(*given_inputs))
        graph = spec.bind(*inputs[2:])

        class WithGraph(torch.nn.Module):
            def forward(self, x, weight):
                return relation_conv(x, weight, graph)

        program = torch.export.export(WithGraph(), inputs[:2])
        assert torch.equal(program.module()(*inputs[:2]), WithGraph()(*inputs[:2]))

    def test_only_the_gradients_that_are_needed_are_made(self, monkeypatch):
        graph, asked = random_edges(9, 9, 3, 20), []
        from rdfkern.ops.relation_mp import conv_native

        original = conv_native.backward

        def spy(*arguments, root, needs_root, needs_bias):
            asked.append((*arguments[-1], needs_root, needs_bias))
            return original(*arguments, root=root, needs_root=needs_root, needs_bias=needs_bias)

        monkeypatch.setattr(conv_native, "backward", spy)
        inputs = {"x": rand(9, 4, seed=1), "weight": rand(3, 4, 2, seed=2)}
        inputs |= {"edge_weight": rand(20, seed=3), "root_weight": rand(4, 2, seed=4)}
        inputs["bias"] = rand(2, seed=5)
        for name in inputs:
            leaves = {n: t.clone().requires_grad_(n == name) for n, t in inputs.items()}
            relation_conv(**leaves, graph=graph, impl="cpu").sum().backward()
        assert asked == [tuple(at == needed for at in range(5)) for needed in range(5)]

    @pytest.mark.parametrize("explicit", [False, True])
    def test_a_graph_first_used_in_inference_mode_still_trains(self, explicit):
        graph = bind(RelationSpec.speaker_direction(2, 3, 3), [5, 3])
        if explicit:
            graph = RelationGraph.from_edges(*graph.to_edges(), 8, graph.num_relations)
        x, weight = rand(8, 4, seed=1), rand(5, 4, 6, seed=2).requires_grad_()
        with torch.inference_mode():
            relation_conv(x, weight, graph, impl="cpu")
        relation_conv(x, weight, graph, impl="cpu").sum().backward()
        assert weight.grad.isfinite().all()

    def test_double_backward_is_refused(self):
        x = rand(9, 4, seed=1).requires_grad_()
        out = relation_conv(x, rand(3, 4, 2, seed=2), random_edges(9, 9, 3, 20), impl="cpu")
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_fake_shapes(self):
        x, weight, root, addend, edge_weight, layout, num_dst = self.arguments(True, "blocks")
        fake = conv_op._fake_forward(x, weight, root, addend, edge_weight, *layout, num_dst, "cpu")
        assert fake.shape == (num_dst, 4)


class TestChoice:
    def test_is_first_on_the_cpu(self):
        graph = random_edges(9, 9, 3, 20)
        x, weight = rand(9, 4, seed=1), rand(3, 4, 2, seed=2)
        assert rdfkern.explain("relation_conv", x, weight, graph).startswith("relation_conv: cpu")
        auto, chosen = (relation_conv(x, weight, graph, impl=name) for name in ("auto", "cpu"))
        assert torch.equal(auto, chosen)

    def test_what_it_cannot_do_it_says(self):
        graph = random_edges(9, 9, 3, 20)
        x, weight = rand(9, 4, seed=1).double(), rand(3, 4, 2, seed=2).double()
        with pytest.raises(rdfkern.BackendUnavailableError, match="float64"):
            relation_conv(x, weight, graph, impl="cpu")
        assert relation_conv(x, weight, graph).dtype == torch.float64


PEAK = """
import resource, sys, torch
from rdfkern import RelationSpec, relation_conv
nodes, window = int(sys.argv[1]), None if sys.argv[2] == "None" else int(sys.argv[2])
spec = RelationSpec.dialoguegcn(2, window, window)
keys = torch.arange(nodes) * 7 % 11 % 2
x = torch.randn(nodes, 256, requires_grad=True)
weight = torch.randn(8, 256, 256, requires_grad=True)
upstream = torch.randn(nodes, 256)
graph = spec.bind(keys[:9], torch.tensor([0, 9]))
relation_conv(x[:9], weight, graph, impl="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graph = spec.bind(keys, torch.tensor([0, nodes]))
relation_conv(x, weight, graph, impl="cpu").backward(upstream)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "window"), [(100_000, 20), (20_000, None)])
def test_peak_memory(nodes, window):
    command = [sys.executable, "-c", PEAK, str(nodes), str(window)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) * 1024 < 2e9
