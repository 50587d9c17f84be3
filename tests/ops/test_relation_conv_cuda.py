"""The CUDA C++ kernels of relation convolution against the reference, run by the CPU emulator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdfkern import RelationGraph, RelationSpec, relation_conv
from rdfkern._backends import jit
from rdfkern._backends.dispatch import Implementation
from rdfkern.ops.relation_mp import api, bands, conv_cuda, conv_op
from rdfkern.testing import assert_within_budget

OPERATORS = (
    "_relation_conv_bands_cuda",
    "_relation_conv_edges_cuda",
    "_relation_conv_bands_dweight_cuda",
    "_relation_conv_edges_dweight_cuda",
    "_relation_conv_inverse_counts_cuda",
    "_relation_conv_dedge_cuda",
    "_relation_conv_bands_maxima_cuda",
    "_relation_conv_edges_maxima_cuda",
)
AGGREGATIONS = ("sum", "mean", "max")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def emulator(cuda_emulator):
    return cuda_emulator.load("relation_conv.cu", OPERATORS)


@pytest.fixture(scope="module", autouse=True)
def kernels_take_cpu_tensors(emulator):
    """Fresh memory is NaN, and impl="cuda" runs here without a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jit._outcomes, "cuda", None)
        emulated = Implementation(".ops.relation_mp.conv_cuda")
        patch.setitem(api.CONV.implementations, "cuda", emulated)
        torch.use_deterministic_algorithms(True)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        yield
        torch.use_deterministic_algorithms(False)


def rand(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    elif positions == "far":
        positions = torch.cat([torch.arange(length) for length in lengths]) - 2**63
    return spec.bind(keys, torch.tensor([0, *lengths]).cumsum(0), positions)


def inputs_of(graph, width_in, width_out, form="full", dtype=torch.float32, **more):
    """x, weight (with coefficients of a basis) and what else is given, all in dtype."""
    relations = graph.num_relations
    shape = {
        "full": (relations, width_in, width_out),
        "blocks": (relations, 2, width_in // 2, width_out // 2),
        "basis": (3, width_in, width_out),
    }[form]
    named = {"x": rand(graph.num_src, width_in, seed=3), "weight": rand(*shape, seed=4), **more}
    if form == "basis":
        named["coefficients"] = rand(relations, 3, seed=5)
    return {name: value.to(dtype) for name, value in named.items()}


def run(impl, graph, inputs, upstream, aggr, wide=False):
    """Output and every gradient, by name; `wide` computes in float64."""
    leaves = {
        name: (value.double() if wide else value.clone(memory_format=torch.preserve_format))
        .detach()
        .requires_grad_()
        for name, value in inputs.items()
    }
    weight = leaves["weight"]
    if "coefficients" in leaves:
        weight = (leaves["coefficients"], weight)
    out = relation_conv(
        (leaves["x"], leaves["x_dst"]) if "x_dst" in leaves else leaves["x"],
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


def upstream_of(graph, inputs, seed=99):
    width = conv_op.width_out(inputs["weight"])
    return rand(graph.num_dst, width, seed=seed, dtype=inputs["x"].dtype)


def check(graph, inputs, aggr):
    upstream = upstream_of(graph, inputs)
    # The reference takes minutes on many relations; the torch form equals it.
    formula = "reference" if graph.num_relations <= 40 else "torch"
    actual = run("cuda", graph, inputs, upstream, aggr)
    plain = run(formula, graph, inputs, upstream, aggr)
    truth = run(formula, graph, inputs, upstream, aggr, wide=True)
    assert_within_budget(actual, plain, truth, factor=3.0)
    return actual


dialoguegcn, direction = RelationSpec.dialoguegcn, RelationSpec.speaker_direction
# spec, lengths, positions, width_in, width_out
CASES = {
    "window": (dialoguegcn(3, 4, 2), (20, 1, 0, 17, 10), None, 17, 9),
    "complete": (dialoguegcn(2, None, None), (40, 23), None, 24, 32),
    "past only": (direction(3, None, 0), (30, 10), None, 16, 16),
    "future only": (direction(3, 0, None), (30, 10), None, 33, 7),
    "itself only": (direction(2, 0, 0), (9, 1), None, 8, 8),
    "one utterance each": (dialoguegcn(2, 3, 3), (1, 1, 1, 1), None, 5, 3),
    "one speaker, width one": (dialoguegcn(1, 5, 5), (40,), None, 1, 1),
    "many speakers": (direction(40, 6, 3), (30, 25), None, 12, 20),
    "random rule": (RelationSpec(3, 6, random_table(4, 11), 13), (25, 31), None, 19, 8),
    "shared positions": (RelationSpec(2, 3, random_table(5, 7)), (30, 42), "shared", 16, 16),
    "unsorted positions": (RelationSpec(7, 2, random_table(3, 4)), (30, 41), "unsorted", 10, 6),
    "positions at the lowest integers": (direction(2, 3, None), (20, 9), "far", 4, 4),
    "wide matrices": (dialoguegcn(1, 3, 3), (33,), None, 290, 150),
    "just over a tile": (dialoguegcn(1, 2, 2), (33,), None, 129, 65),
}


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_implicit_graphs(case, aggr):
    spec, lengths, positions, width_in, width_out = CASES[case]
    graph = bind(spec, lengths, positions)
    more = {"root": rand(width_in, width_out, seed=7), "bias": rand(width_out, seed=8)}
    check(graph, inputs_of(graph, width_in, width_out, **more), aggr)


# sources, targets, relations, edges
GRAPHS = {
    "bipartite": (40, 25, 5, 200),
    "many duplicates": (3, 4, 2, 150),
    "isolated nodes": (70, 70, 3, 40),
    "few sources": (5, 100, 3, 200),
    "few targets": (100, 5, 3, 200),
    "no edges": (6, 4, 3, 0),
    "many relations": (8, 8, 100, 12),
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
    inputs = inputs_of(graph, 18, 6, form, **more)
    check(graph, inputs, aggr)
    del inputs["edge_weight"], inputs["root"], inputs["x_dst"]
    check(graph, inputs, aggr)


@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("form", ["full", "blocks"])
def test_wide_edge_weight_gradients(form, aggr):
    graph = random_edges(20, 40, 2, 60)
    check(graph, inputs_of(graph, 150, 70, form, edge_weight=rand(60, seed=9)), aggr)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("form", ["full", "blocks", "basis"])
def test_half_types(form, aggr, dtype):
    more = {"root": rand(10, 6, seed=7), "bias": rand(6, seed=8)}
    graph = bind(dialoguegcn(2, 5, None), (30, 10))
    actual = check(graph, inputs_of(graph, 10, 6, form, dtype, **more), aggr)
    assert {value.dtype for value in actual.values()} == {dtype}
    more["edge_weight"] = rand(100, seed=9)
    graph = random_edges(40, 40, 4, 100)
    check(graph, inputs_of(graph, 10, 6, form, dtype, **more), aggr)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("form", ["blocks", "basis"])
def test_forms_of_weights_on_implicit_graphs(form, aggr):
    graph = bind(dialoguegcn(2, 5, 9), (40, 10))
    check(graph, inputs_of(graph, 6, 140, form), aggr)


def test_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(bands, "_index_dtype", lambda largest: torch.int64)
    for graph in (bind(dialoguegcn(2, 5, 9), (40,)), random_edges(20, 30, 3, 90)):
        assert bands.layout(graph).tensors[0].dtype == torch.int64
        check(graph, inputs_of(graph, 7, 5), "mean")
        check(graph, inputs_of(graph, 7, 5), "max")


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
    check(graph, inputs, "max")
    inputs["x"] = rand(40, 32, seed=1)[:, ::2]
    inputs["weight"] = torch.eye(16).expand(8, 16, 16)
    check(graph, inputs, "sum")
    inputs["x"] = rand(1, 16, seed=1).expand(40, 16)
    inputs["weight"] = rand(8, 16, 32, seed=2)[..., 16:]
    check(graph, inputs, "sum")


def test_upstream_gradient_of_any_stride():
    graph = bind(dialoguegcn(2, 5, 2), (40,))
    x, weight = rand(40, 16, seed=1), rand(8, 16, 16, seed=2)
    grads = []
    for upstream in (torch.ones(()).expand(40, 16), torch.ones(40, 16)):
        leaf = x.clone().requires_grad_()
        out = relation_conv(leaf, weight, graph, impl="cuda")
        grads.append(torch.autograd.grad(out, leaf, upstream)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("wanted", ["x", "weight", "edge_weight"])
def test_one_gradient_alone(wanted, aggr):
    graph = random_edges(20, 20, 3, 60)
    inputs = inputs_of(graph, 7, 5, edge_weight=rand(60, seed=9))
    upstream = upstream_of(graph, inputs)
    expected = run("cuda", graph, inputs, upstream, aggr)[wanted]
    inputs[wanted].requires_grad_()
    given = {"edge_weight": inputs["edge_weight"], "aggr": aggr, "impl": "cuda"}
    out = relation_conv(inputs["x"], inputs["weight"], graph, **given)
    assert torch.equal(torch.autograd.grad(out, inputs[wanted], upstream)[0], expected)


@pytest.mark.parametrize(
    ("num_src", "num_dst", "relations", "width_in", "width_out"),
    [(0, 0, 2, 3, 4), (4, 0, 2, 3, 4), (0, 4, 2, 3, 4), (3, 3, 0, 3, 4), (3, 3, 2, 0, 4)]
    + [(3, 3, 2, 3, 0)],
)
def test_nothing_to_do_never_reaches_the_kernels(
    num_src, num_dst, relations, width_in, width_out, monkeypatch
):
    monkeypatch.setattr(conv_cuda, "forward", None)
    edges = 5 if num_src and num_dst and relations else 0
    graph = random_edges(num_src, num_dst, relations, edges)
    x, weight = rand(num_src, width_in, seed=1), rand(relations, width_in, width_out, seed=2)
    out = relation_conv(x, weight, graph, bias=rand(width_out, seed=3), impl="cuda")
    assert torch.equal(out, rand(width_out, seed=3).expand(num_dst, -1))


def test_isolated_nodes_and_unused_relations_get_exactly_nothing():
    graph = RelationGraph.from_edges(torch.tensor([[0], [1]]), torch.tensor([2]), 4, 5)
    inputs = inputs_of(graph, 3, 2, bias=torch.ones(2))
    for aggr in ("mean", "max"):
        actual = run("cuda", graph, inputs, torch.ones(4, 2), aggr)
        assert torch.equal(actual["out"][[0, 2, 3]], torch.ones(3, 2))
        assert not actual["x"][1:].any() and actual["x"][0].all()
        assert not actual["weight"][[0, 1, 3, 4]].any() and actual["weight"][2].all()


def tied_problems():
    """Features and edge weights of few values, all exact: the maxima are attained many times."""
    implicit = bind(dialoguegcn(2, 9, 4), (40, 9))
    explicit = random_edges(30, 20, 2, 200)
    edge_weight = torch.tensor([0.5, 1.0, 2.0, -1.0]).repeat(50)
    for graph, more in ((implicit, {}), (explicit, {}), (explicit, {"edge_weight": edge_weight})):
        inputs = inputs_of(graph, 70, 5, **more)
        inputs["x"] = inputs["x"].round().clamp(-1, 1)
        yield graph, inputs


def test_edges_that_tie_share_the_gradient_of_the_maximum():
    for graph, inputs in tied_problems():
        check(graph, inputs, "max")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_maxima_that_are_not_finite(value):
    for graph, inputs in tied_problems():
        inputs["x"][[3, 7], 1] = value
        upstream = upstream_of(graph, inputs)
        actual = run("cuda", graph, inputs, upstream, "max")
        expected = run("reference", graph, inputs, upstream, "max")
        assert not expected["weight"].isfinite().all()
        for name, result in expected.items():
            torch.testing.assert_close(
                actual[name], result, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name
            )


def test_maxima_of_any_number_of_relations_at_a_time(monkeypatch):
    for graph, inputs in tied_problems():
        upstream = upstream_of(graph, inputs)
        expected = run("cuda", graph, inputs, upstream, "max")
        of_one = 2 * graph.num_dst * 70
        for kept in (1, 3 * of_one):
            monkeypatch.setattr(conv_cuda, "_KEPT_ELEMENTS", kept)
            actual = run("cuda", graph, inputs, upstream, "max")
            for name, result in expected.items():
                assert torch.equal(actual[name], result), name


SCHEDULES = (("reverse", 0), ("eager warps", 1), ("random", 2))


def scheduled_problems():
    implicit = bind(dialoguegcn(2, 3, 3), (30, 12))
    explicit = random_edges(40, 40, 3, 90)
    sparse = random_edges(9, 200, 9, 25)
    yield implicit, inputs_of(implicit, 140, 70)
    yield explicit, inputs_of(explicit, 20, 36, "blocks", edge_weight=rand(90, seed=9))
    yield sparse, inputs_of(sparse, 4, 4)


@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "{}-{}".format(*schedule))
def test_every_schedule_gives_the_same_bits(schedule, aggr, emulator, monkeypatch):
    monkeypatch.setattr(conv_cuda, "_BLOCKS", 1)  # one block passes through all tiles
    for graph, inputs in scheduled_problems():
        upstream = upstream_of(graph, inputs)
        expected = run("cuda", graph, inputs, upstream, aggr)
        with emulator.schedule(*schedule):
            actual = run("cuda", graph, inputs, upstream, aggr)
            check(graph, inputs, aggr)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


def test_weight_gradients_in_any_number_of_chunks(monkeypatch):
    graph = bind(dialoguegcn(1, 3, 3), (170,))
    inputs = inputs_of(graph, 4, 4)
    for blocks in (1, 2 * 4, 1024):
        monkeypatch.setattr(conv_cuda, "_BLOCKS", blocks)
        assert conv_cuda._chunks(inputs["weight"][:, None], 170) == {1: 1, 8: 4, 1024: 6}[blocks]
        check(graph, inputs, "mean")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    keys=st.integers(1, 5),
    limits=st.tuples(*(st.none() | st.integers(0, 12),) * 2),
    positions=st.sampled_from([None, "shared", "unsorted"]),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    aggr=st.sampled_from(AGGREGATIONS),
)
def test_any_rule(lengths, keys, limits, positions, widths, dtype, aggr):
    spec = RelationSpec(*limits, random_table(keys, 2 * keys, sum(lengths)), 2 * keys)
    graph = bind(spec, lengths, positions)
    check(graph, inputs_of(graph, *widths, dtype=dtype), aggr)


def test_registered_operators_give_the_shapes_that_their_fakes_promise():
    checks = ("test_schema", "test_faketensor")
    graphs = (bind(dialoguegcn(2, 3, 3), (9,)), random_edges(9, 7, 8, 30))
    for graph, aggr in itertools.product(graphs, ("mean", "max")):
        tensors, past, future = bands.layout(graph)
        edge_weight = rand(30, seed=1) if past == bands.EXPLICIT else None
        given = (rand(9, 5, seed=2), rand(8, 5, 6, seed=3))
        rule = (list(tensors), past, future, aggr)
        forward = (*given, None, rand(6, seed=4), edge_weight, *rule)
        torch.library.opcheck(
            torch.ops.rdfkern.relation_conv_fwd,
            (*forward, graph.num_dst, "cuda"),
            test_utils=checks,
        )
        needs = [True, True, False, True, edge_weight is not None]
        backward = (rand(graph.num_dst, 6, seed=5), *given, None, edge_weight, *rule, needs, "cuda")
        torch.library.opcheck(torch.ops.rdfkern.relation_conv_bwd, backward, test_utils=checks)


class OnDevice:
    """What the predicate asks of a tensor, as if it were on a CUDA device."""

    device = torch.device("cuda")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x_src": torch.empty(2, 2)}, "inputs are on cpu"),
        ({"x_src": OnDevice(torch.float64)}, "computes in float32, inputs are torch.float64"),
        ({}, None),
    ],
)
def test_predicate(changes, expected):
    assert conv_cuda.can_run({"x_src": OnDevice()} | changes) == expected
