"""The CUDA C++ kernels of relation attention against plain torch, run by the CPU emulator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_attention, relation_dot_attention
from rdfkern._backends import jit
from rdfkern._backends.dispatch import Implementation
from rdfkern.ops.relation_mp import api, attention_cuda, bands
from rdfkern.ops.relation_mp.windows import windows
from rdfkern.testing import assert_within_budget

INF = float("inf")
OPERATORS = tuple(
    f"_relation_attention_{kind}_{direction}_cuda"
    for kind in ("windows", "edges")
    for direction in ("fwd", "bwd")
)
FORMS = {
    "additive": (relation_attention, ("value", "logit_dst", "logit_src", "logit_rel")),
    "dot": (relation_dot_attention, ("query", "key", "value", "logit_rel")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOFTMAX = ("across", "within")
# As for the CPU kernels: the largest of few errors is one draw of noise, and so is its budget.
GRADIENT = 3.0
NOISY = 6.0


@pytest.fixture(scope="module")
def emulator(cuda_emulator):
    return cuda_emulator.load("relation_attention.cu", OPERATORS)


@pytest.fixture(scope="module", autouse=True)
def kernels_take_cpu_tensors(emulator):
    """Fresh memory is NaN, and impl="cuda" runs here without a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jit._outcomes, "cuda", None)
        emulated = Implementation(".ops.relation_mp.attention_cuda")
        for operation in (api.ATTENTION, api.DOT_ATTENTION):
            patch.setitem(operation.implementations, "cuda", emulated)
        torch.use_deterministic_algorithms(True)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        yield
        torch.use_deterministic_algorithms(False)


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def bound(spec, lengths, positions=None, seed=0):
    keys = drawn(seed, 0, spec.num_keys, sum(lengths))
    return spec.bind(keys, torch.tensor([0, *lengths]).cumsum(0), positions)


def listed(num_src, num_dst, relations, edges, seed=0):
    source, target, kind = (
        drawn(3 * seed + at, 0, size, edges)
        for at, size in enumerate((num_src, num_dst, relations))
    )
    edge_index = torch.stack([source, target])
    return RelationGraph.from_edges(edge_index, kind, (num_src, num_dst), relations)


def inputs_of(form, graph, heads=2, width=20, depth=9, dtype=torch.float32, seed=1):
    values, logits = (graph.num_src, heads, width), (graph.num_relations, heads)
    shapes = {
        "additive": (values, (graph.num_dst, heads), (graph.num_src, heads), logits),
        "dot": ((graph.num_dst, heads, depth), (graph.num_src, heads, depth), values, logits),
    }[form]
    return [rand(*shape, seed=10 * seed + at).to(dtype) for at, shape in enumerate(shapes)]


def run(impl, form, inputs, graph, upstream, wide=False, **options):
    """Output and all gradients by name; `wide` computes in float64."""
    function, names = FORMS[form]
    leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
    out = function(*leaves, graph, impl=impl, **options)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def check(form, inputs, graph, luck=1.0, **options):
    value = inputs[0 if form == "additive" else 2]
    upstream = rand(graph.num_dst, *value.shape[1:], seed=99).to(value.dtype)
    results = [
        run("cuda", form, inputs, graph, upstream, **options),
        run("torch", form, inputs, graph, upstream, **options),
        run("torch", form, inputs, graph, upstream, wide=True, **options),
    ]
    logits = {name for name in results[0] if name.startswith("logit")}
    gradients = results[0].keys() - logits - {"out"}
    for names, factor in (({"out"}, 2.0), (gradients, luck * GRADIENT), (logits, luck * NOISY)):
        parts = ({name: result[name] for name in names} for result in results)
        assert_within_budget(*parts, factor=factor)
    return results[0]["out"]


def shared_positions():
    spec = RelationSpec.cross_modal(2, 3, 3, 2)
    return bound(spec, [15, 3, 12], torch.arange(30) // 3)


HOLES = torch.where(drawn(7, 0, 4, 4, 4, 3) == 0, drawn(8, 0, 5, 4, 4, 3), -1)
GRAPHS = {
    "rule, one utterance each": lambda: bound(RelationSpec.dialoguegcn(2, 3, 3), [1, 1, 1]),
    "rule, complete": lambda: bound(RelationSpec.dialoguegcn(2, None, None), [40, 3, 0, 15]),
    "rule, window": lambda: bound(RelationSpec.dialoguegcn(3, 20, 5), [50, 7]),
    "rule, past only": lambda: bound(RelationSpec.speaker_direction(3, None, 0), [40, 18]),
    "rule, self only": lambda: bound(RelationSpec.speaker_direction(3, 0, 0), [20, 3]),
    "rule, 40 speakers": lambda: bound(RelationSpec.speaker_direction(40, 9, 9), [50]),
    "rule, modalities share steps": shared_positions,
    "rule, positions in any order": lambda: bound(
        RelationSpec(5, 9, drawn(3, -1, 6, 9, 9, 3)), [30, 0, 13], drawn(5, -20, 40, 43)
    ),
    "rule, isolated nodes": lambda: bound(RelationSpec(6, 6, HOLES, 5), [40, 25]),
    "rule, no edges": lambda: bound(RelationSpec(3, 3, torch.full((2, 2, 3), -1), 2), [20]),
    "list, random": lambda: listed(30, 30, 5, 150),
    "list, bipartite": lambda: listed(25, 50, 3, 150),
    "list, duplicates": lambda: listed(3, 4, 2, 200),
    "list, isolated nodes": lambda: listed(90, 90, 4, 30),
    "list, no edges": lambda: listed(7, 9, 2, 0),
    "list, 300 relations": lambda: listed(30, 30, 300, 200),
    "list, one target": lambda: listed(100, 1, 3, 120),
    "list, one source": lambda: listed(1, 60, 3, 200),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GRAPHS)
def test_error_budget(name, form):
    graph = GRAPHS[name]()
    check(form, inputs_of(form, graph), graph)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GRAPHS)
def test_softmax_within_relations(name, form):
    graph = GRAPHS[name]()
    check(form, inputs_of(form, graph), graph, luck=2.0, softmax="within")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, positions in any order", "list, bipartite"])
def test_half_types(name, form, dtype):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph, dtype=dtype)
    assert check(form, inputs, graph).dtype == dtype
    check(form, inputs, graph, luck=2.0, softmax="within")


@pytest.mark.parametrize(
    ("heads", "width", "depth"), [(1, 1, 1), (3, 16, 5), (1, 130, 64), (1, 33, 140)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, window", "list, random"])
def test_widths(name, form, heads, width, depth):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph, heads, width, depth)
    check(form, inputs, graph)
    check(form, inputs, graph, luck=2.0, softmax="within")


@pytest.mark.parametrize("negative_slope", [0.0, 1.7, -0.5])
def test_negative_slopes(negative_slope):
    graph = GRAPHS["rule, window"]()
    check("additive", inputs_of("additive", graph), graph, negative_slope=negative_slope)


@pytest.mark.parametrize("scale", [0.0, -0.8, 3.0])
def test_scales(scale):
    graph = GRAPHS["list, random"]()
    check("dot", inputs_of("dot", graph), graph, luck=2.0, scale=scale)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, window", "list, random"])
def test_minus_infinity_hides(name, form, softmax):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph)
    inputs[3][graph.num_relations // 2] = -INF
    if form == "additive":
        inputs[1][[1, 4]] = -INF
        inputs[2][[0, 2]] = -INF
    assert check(form, inputs, graph, luck=2.0, softmax=softmax).isfinite().all()
    inputs[3][:] = -INF
    upstream = torch.ones(graph.num_dst, 2, 20)
    results = run("cuda", form, inputs, graph, upstream, softmax=softmax)
    assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("form", FORMS)
def test_large_logits_stay_finite(form):
    graph = GRAPHS["rule, complete"]()
    inputs = inputs_of(form, graph)
    for at in (1, 2, 3) if form == "additive" else (0, 3):
        inputs[at] = 1000 * inputs[at].sign()
    upstream = rand(graph.num_dst, 2, 20, seed=6)
    actual = run("cuda", form, inputs, graph, upstream)
    truth = run("torch", form, inputs, graph, upstream, wide=True)
    assert all(value.isfinite().all() for value in actual.values())
    torch.testing.assert_close(actual["out"].double(), truth["out"], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, modalities share steps", "list, random"])
def test_strides(name, form):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph, width=16, depth=16)
    upstream = rand(graph.num_dst, 2, 16, seed=3)
    expected = run("cuda", form, inputs, graph, upstream)
    for strided in (
        [x.mT.contiguous().mT for x in inputs],
        [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in inputs],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs],
    ):
        actual = run("cuda", form, strided, graph, upstream.mT.contiguous().mT)
        assert all(torch.equal(value, expected[key]) for key, value in actual.items())


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
def test_dropout_on_rules_is_that_of_the_cpu_kernels(form, softmax):
    if reason := rdfkern.available_backends("relation_attention")["cpu"]:
        pytest.skip(reason)
    graph = GRAPHS["rule, window"]()
    inputs, upstream = inputs_of(form, graph), rand(graph.num_dst, 2, 20, seed=1)
    results = []
    for impl in ("cpu", "cuda"):
        torch.manual_seed(3)
        options = {"softmax": softmax, "dropout_p": 0.3}
        results.append(run(impl, form, inputs, graph, upstream, **options))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=2e-5, msg=name)
    undropped = run("cuda", form, inputs, graph, upstream, softmax=softmax)["out"]
    assert not torch.allclose(undropped, results[1]["out"], atol=0.01)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
def test_dropout_on_lists_is_drawn_again_in_backward(form, softmax):
    """Values that are unit vectors show every weight: what was drawn, and what follows from it."""
    nodes, p = 40, 0.3
    pairs = torch.ones(nodes, nodes).nonzero().T
    graph = RelationGraph.from_edges(pairs, drawn(1, 0, 3, nodes**2), nodes, 3)
    inputs = inputs_of(form, graph, heads=2, width=nodes)
    at = 0 if form == "additive" else 2
    inputs[at] = torch.eye(nodes)[:, None].expand(nodes, 2, nodes).contiguous()
    upstream = rand(nodes, 2, nodes, seed=2)
    torch.manual_seed(4)
    actual = run("cuda", form, inputs, graph, upstream, softmax=softmax, dropout_p=p)
    # [target, head, source]
    weights = run("torch", form, inputs, graph, upstream, softmax=softmax)["out"]
    kept = actual["out"] / weights
    keep = kept.round(decimals=3) != 0
    torch.testing.assert_close(kept, keep / (1 - p), rtol=1e-4, atol=1e-4)
    assert 0.66 < keep.float().mean() < 0.74
    assert (keep[:, 0] == keep[:, 1]).float().mean() < 0.7
    expected = run("torch", form, inputs, graph, upstream * keep / (1 - p), softmax=softmax)
    for name in actual.keys() - {"out", "value"}:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    dvalue = torch.einsum("ihj,ihc->jhc", actual["out"], upstream)
    torch.testing.assert_close(actual["value"], dvalue, rtol=1e-4, atol=1e-5)


SCHEDULES = (("reverse", 0), ("eager warps", 1), ("random", 2))


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "{}-{}".format(*schedule))
def test_every_schedule_gives_the_same_bits(schedule, softmax, emulator):
    for name in ("rule, modalities share steps", "list, random"):
        graph = GRAPHS[name]()
        inputs, upstream = inputs_of("dot", graph), rand(graph.num_dst, 2, 20, seed=1)
        expected = run("cuda", "dot", inputs, graph, upstream, softmax=softmax)
        with emulator.schedule(*schedule):
            actual = run("cuda", "dot", inputs, graph, upstream, softmax=softmax)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("most", [1, 40])
def test_relation_gradients_in_few_parts(most, monkeypatch):
    monkeypatch.setattr(attention_cuda, "_PARTIAL_ELEMENTS", most)
    graph = GRAPHS["list, random"]()
    check("additive", inputs_of("additive", graph), graph)


def test_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(bands, "_index_dtype", lambda largest: torch.int64)
    graph = GRAPHS["list, random"]()
    assert bands.layout(graph).tensors[0].dtype == torch.int64
    for softmax in SOFTMAX:
        check("dot", inputs_of("dot", graph), graph, luck=2.0, softmax=softmax)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 31, 32, 33]), max_size=2),
    keys=st.integers(1, 5),
    sides=st.tuples(*(st.none() | st.sampled_from([0, 1, 7, 40]),) * 2),
    placed=st.booleans(),
    form=st.sampled_from(list(FORMS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    softmax=st.sampled_from(SOFTMAX),
)
def test_any_rule(lengths, keys, sides, placed, form, shape, dtype, softmax):
    spec = RelationSpec(*sides, drawn(keys, -1, 2 * keys, keys, keys, 3), 2 * keys)
    positions = drawn(keys + 1, -30, 30, sum(lengths)) if placed else None
    graph = bound(spec, lengths, positions)
    check(form, inputs_of(form, graph, *shape, dtype), graph, luck=5.0, softmax=softmax)


def test_registered_operators_give_the_shapes_that_their_fakes_promise():
    checks = ("test_schema", "test_faketensor")
    cases = itertools.product(("rule, positions in any order", "list, bipartite"), (False, True))
    for name, within in cases:
        graph, options = GRAPHS[name](), (None, 0.5, 1.0, within, False, 0.0, "cuda")
        tensors = windows(graph) if graph.is_implicit else bands.layout(graph).tensors
        query, key, value, rel = inputs_of("dot", graph)
        given = (value, query, key, rel)
        torch.library.opcheck(
            torch.ops.rdfkern.relation_attn_fwd,
            (*given, list(tensors), *options),
            test_utils=checks,
        )
        results = torch.ops.rdfkern.relation_attn_fwd(*given, list(tensors), *options)
        backward = (torch.ones_like(results[0]), *given, *results, list(tensors), *options)
        torch.library.opcheck(torch.ops.rdfkern.relation_attn_bwd, backward, test_utils=checks)


def test_nothing_to_do_never_reaches_the_kernels(monkeypatch):
    monkeypatch.setattr(attention_cuda, "forward", None)
    graph = RelationGraph.from_edges(
        torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), (3, 0), 2
    )
    assert relation_attention(*inputs_of("additive", graph), graph, impl="cuda").shape == (0, 2, 20)


class OnDevice:
    """What the predicate asks of a tensor, as if it were on a CUDA device."""

    device = torch.device("cuda")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"value": torch.empty(2, 2)}, "inputs are on cpu"),
        ({"value": OnDevice(torch.float64)}, "computes in float32, inputs are torch.float64"),
        ({"softmax": "within"}, None),
        ({}, None),
    ],
)
def test_predicate(changes, expected):
    arguments = {"value": OnDevice(), "graph": listed(3, 3, 2, 4), "softmax": "across"} | changes
    assert attention_cuda.can_run(arguments) == expected
