"""The C++ kernels of relation attention against the reference, at every form, graph and edge."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_attention, relation_dot_attention
from rdfkern.ops.relation_mp import attention_op, bands
from rdfkern.ops.relation_mp.windows import Windows, windows
from rdfkern.testing import assert_within_budget

REASON = rdfkern.available_backends("relation_attention")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

INF = float("inf")
FORMS = {
    "additive": (relation_attention, ("value", "logit_dst", "logit_src", "logit_rel")),
    "dot": (relation_dot_attention, ("query", "key", "value", "logit_rel")),
}
SOFTMAX = ("across", "within")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The largest of few errors is one draw of noise, and so is its budget, so that a factor of 2 fails
# now and then, most of all for the gradients of logits, sums that nearly cancel.
# `test_rms_error_is_that_of_plain_torch` compares what does not depend on luck.
GRADIENT = 3.0
NOISY = 6.0


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bound(spec, lengths, positions=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(spec.num_keys, (sum(lengths),), generator=generator)
    return spec.bind(keys, torch.tensor([0, *lengths]).cumsum(0), positions)


def drawn(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


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


def check(form, inputs, graph, seed=99, luck=1.0, **options):
    value = inputs[0 if form == "additive" else 2]
    upstream = rand(graph.num_dst, *value.shape[1:], seed=seed).to(value.dtype)
    results = [
        run("cpu", form, inputs, graph, upstream, **options),
        run("torch", form, inputs, graph, upstream, **options),
        run("torch", form, inputs, graph, upstream, wide=True, **options),
    ]
    logits = {name for name in results[0] if name.startswith("logit")}
    gradients = results[0].keys() - logits - {"out"}
    for names, factor in (({"out"}, 2.0), (gradients, luck * GRADIENT), (logits, luck * NOISY)):
        parts = ({name: result[name] for name in names} for result in results)
        assert_within_budget(*parts, factor=factor)
    return results[0]["out"]


def cross_modal():
    spec, steps = RelationSpec.cross_modal(2, 3, 4, 2), [9, 1, 30]
    speakers = drawn(4, 0, 2, sum(steps))
    keys = torch.cat([speakers * 3 + modality for modality in range(3)])
    positions = torch.cat([torch.arange(length) for length in steps]).repeat(3)
    dialogue = torch.arange(3).repeat_interleave(torch.tensor(steps)).repeat(3)
    packed = torch.argsort(dialogue, stable=True)
    cu_seqlens = torch.tensor([0, *steps]).cumsum(0) * 3
    return spec.bind(keys[packed], cu_seqlens, positions[packed])


HOLES = torch.where(drawn(7, 0, 4, 4, 4, 3) == 0, drawn(8, 0, 5, 4, 4, 3), -1)
IMPLICIT = {
    "one utterance each": lambda: bound(RelationSpec.dialoguegcn(2, 3, 3), [1, 1, 1]),
    "complete": lambda: bound(RelationSpec.dialoguegcn(2, None, None), [60, 3, 1, 0, 110]),
    "window": lambda: bound(RelationSpec.dialoguegcn(3, 20, 5), [130, 7]),
    "past only": lambda: bound(RelationSpec.speaker_direction(3, None, 0), [70, 18]),
    "self only": lambda: bound(RelationSpec.speaker_direction(3, 0, 0), [20, 3]),
    "300 speakers": lambda: bound(RelationSpec.speaker_direction(300, 12, 12), [80]),
    "1083 relations": lambda: bound(
        RelationSpec(9, 9, torch.arange(19 * 19 * 3).view(19, 19, 3)), [50, 40]
    ),
    "beyond one block": lambda: bound(RelationSpec.dialoguegcn(2, None, None), [400, 30]),
    "split dialogue": lambda: bound(RelationSpec.redifu_self(2, 20), [900, 30]),
    "many short": lambda: bound(RelationSpec.redifu_cross(3, 2), drawn(2, 0, 6, 90).tolist()),
    "modalities share steps": cross_modal,
    "positions in any order": lambda: bound(
        RelationSpec(5, 9, drawn(3, -1, 6, 9, 9, 3)), [60, 0, 33], drawn(5, -20, 40, 93)
    ),
    "isolated nodes": lambda: bound(RelationSpec(6, 6, HOLES, 5), [40, 25]),
    "empty relations": lambda: bound(RelationSpec(3, 3, torch.full((1, 1, 3), 4), 9), [20]),
    "no edges": lambda: bound(RelationSpec(3, 3, torch.full((2, 2, 3), -1), 2), [20]),
    "unlimited numbers": lambda: bound(RelationSpec.speaker_direction(2, 2**70, 2**70), [20, 4]),
}
EXPLICIT = {
    "random": lambda: listed(60, 60, 5, 700),
    "bipartite": lambda: listed(25, 70, 3, 300),
    "duplicates": lambda: listed(3, 4, 2, 200),
    "isolated nodes": lambda: listed(90, 90, 4, 30),
    "no edges": lambda: listed(7, 9, 2, 0),
    "1000 relations": lambda: listed(30, 30, 1000, 400),
    "one target": lambda: listed(500, 1, 3, 3000),
    "one source": lambda: listed(1, 300, 3, 2000),
}
GRAPHS = {f"rule, {name}": make for name, make in IMPLICIT.items()}
GRAPHS |= {f"list, {name}": make for name, make in EXPLICIT.items()}


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GRAPHS)
def test_error_budget(name, form, softmax):
    graph = GRAPHS[name]()
    check(form, inputs_of(form, graph), graph, softmax=softmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["rule, complete", "rule, beyond one block", "rule, positions in any order"]
)
def test_error_budget_of_other_dtypes(name, form, softmax, dtype):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph, dtype=dtype, width=24, depth=16)
    assert check(form, inputs, graph, softmax=softmax).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_error_budget_of_other_dtypes_on_lists(form, dtype):
    graph = GRAPHS["list, bipartite"]()
    assert check(form, inputs_of(form, graph, dtype=dtype), graph).dtype == dtype


@pytest.mark.parametrize(
    ("heads", "width", "depth"), [(1, 1, 1), (3, 16, 5), (1, 130, 64), (5, 33, 16), (2, 64, 33)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, window", "list, random"])
def test_widths(name, form, heads, width, depth):
    graph = GRAPHS[name]()
    check(form, inputs_of(form, graph, heads, width, depth), graph)


@pytest.mark.parametrize("negative_slope", [0.0, 1.0, 1.7, -0.5])
@pytest.mark.parametrize("name", ["rule, window", "list, random"])
def test_negative_slopes(name, negative_slope):
    graph = GRAPHS[name]()
    check("additive", inputs_of("additive", graph), graph, negative_slope=negative_slope)


@pytest.mark.parametrize("scale", [0.0, -0.8, 3.0])
@pytest.mark.parametrize("name", ["rule, window", "list, random"])
def test_scales(name, scale):
    graph = GRAPHS[name]()
    check("dot", inputs_of("dot", graph), graph, scale=scale)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["complete", "beyond one block", "split dialogue", "random"])
def test_rms_error_is_that_of_plain_torch(name, form, softmax):
    graph = GRAPHS[f"list, {name}" if name == "random" else f"rule, {name}"]()
    inputs, upstream = inputs_of(form, graph), rand(graph.num_dst, 2, 20, seed=9)
    actual, plain, truth = (
        run(impl, form, inputs, graph, upstream, wide=wide, softmax=softmax)
        for impl, wide in (("cpu", False), ("torch", False), ("torch", True))
    )
    for key, expected in truth.items():
        error, allowed = ((x[key] - expected).square().mean().sqrt() for x in (actual, plain))
        rounding = expected.abs().max() * torch.finfo(torch.float32).eps / 8
        assert error <= 1.5 * allowed + rounding, key


@st.composite
def problems(draw):
    keys = draw(st.integers(1, 5))
    relations = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 999))
    lengths = draw(st.lists(st.sampled_from([0, 1, 5, 15, 16, 17, 63, 64, 65, 140]), max_size=4))
    sides = st.one_of(st.none(), st.sampled_from([0, 1, 7, 40, 300]))
    table = drawn(seed, -1, relations, keys, keys, 3)
    spec = RelationSpec(draw(sides), draw(sides), table, relations)
    positions = None
    if draw(st.booleans()):
        positions = drawn(seed + 1, -30, 90, sum(lengths))
    graph = bound(spec, lengths, positions, seed)
    if draw(st.booleans()):
        order = torch.randperm(
            len(graph.to_edges()[1]), generator=torch.Generator().manual_seed(seed)
        )
        edge_index, kind = graph.to_edges()
        graph = RelationGraph.from_edges(
            edge_index[:, order], kind[order], graph.num_src, relations
        )
    form = draw(st.sampled_from(list(FORMS)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 20)))
    dtype = draw(st.sampled_from(DTYPES))
    return form, inputs_of(form, graph, *shape, dtype, seed), graph, draw(st.sampled_from(SOFTMAX))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_error_budget_on_drawn_problems(problem):
    form, inputs, graph, softmax = problem
    check(form, inputs, graph, softmax=softmax, luck=5.0)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
def test_implicit_equals_explicit(form, softmax):
    graph = GRAPHS["rule, positions in any order"]()
    edges = RelationGraph.from_edges(*graph.to_edges(), graph.num_src, graph.num_relations)
    inputs, upstream = inputs_of(form, graph), rand(graph.num_dst, 2, 20, seed=3)
    results = [run("cpu", form, inputs, g, upstream, softmax=softmax) for g in (graph, edges)]
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("mechanism", ["rule", "list"])
def test_equals_rgatconv(mechanism, softmax):
    """PyG's layer with one weight for all relations, and relation logits as its edge features."""
    nn = pytest.importorskip("torch_geometric.nn")
    heads, width, relations = 2, 8, 3
    table = drawn(1, 0, relations, 2, 2, 3)
    graph = bound(RelationSpec(6, 4, table, relations), [30, 12])
    (edge_index, kind) = graph.to_edges()
    if mechanism == "list":
        graph = RelationGraph.from_edges(edge_index, kind, graph.num_src, relations)
    layer = nn.RGATConv(
        16,
        width,
        relations,
        heads=heads,
        edge_dim=4,
        attention_mechanism=f"{softmax}-relation",
    )
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
        layer.bias.zero_()
    x, embedding = rand(graph.num_src, 16, seed=2), rand(relations, 4, seed=3)
    leaves = [t.requires_grad_() for t in (x, embedding, layer.q, layer.k)]
    theirs = layer(x, edge_index, kind, embedding[kind])
    hidden = x @ layer.weight[0]
    ours = relation_attention(
        hidden.view(-1, heads, width),
        hidden @ layer.q,
        hidden @ layer.k,
        embedding @ layer.lin_edge.weight.T @ layer.e,
        graph,
        softmax=softmax,
        impl="cpu",
    ).flatten(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = rand(*ours.shape, seed=4)
    gradients = [torch.autograd.grad(out, leaves, upstream) for out in (ours, theirs)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, window", "rule, beyond one block", "list, random"])
def test_minus_infinity_hides(name, form, softmax):
    """Relations, sources and targets whose logits are -inf; the truth handles them as well."""
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph)
    inputs[3][graph.num_relations // 2] = -INF
    if form == "additive":
        inputs[1][[1, 4]] = -INF
        inputs[2][[0, 2]] = -INF
    out = check(form, inputs, graph, softmax=softmax)
    assert out.isfinite().all()
    inputs[3][:] = -INF
    upstream = torch.ones(graph.num_dst, 2, 20)
    for value in run("cpu", form, inputs, graph, upstream, softmax=softmax).values():
        assert not value.any()


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, complete", "rule, beyond one block", "list, random"])
def test_large_logits_stay_finite(name, form, softmax):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph)
    for at in (1, 2, 3) if form == "additive" else (0, 3):
        inputs[at] = 1000 * inputs[at].sign()
    upstream = rand(graph.num_dst, 2, 20, seed=6)
    actual = run("cpu", form, inputs, graph, upstream, softmax=softmax)
    truth = run("torch", form, inputs, graph, upstream, wide=True, softmax=softmax)
    assert all(value.isfinite().all() for value in actual.values())
    torch.testing.assert_close(actual["out"].double(), truth["out"], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_not_hidden_and_stays_in_its_dialogue(form):
    graph = bound(RelationSpec.dialoguegcn(2, 3, 3), [20, 20])
    inputs = inputs_of(form, graph)
    inputs[0][5] = float("nan")
    out = FORMS[form][0](*inputs, graph, impl="cpu")
    assert out[5].isnan().all() and out[20:].isfinite().all()
    if form == "dot":
        assert out[:5].isfinite().all() and out[6:].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rule, window", "rule, modalities share steps", "list, random"])
def test_strides(name, form):
    graph = GRAPHS[name]()
    inputs = inputs_of(form, graph, width=16, depth=16)
    upstream = rand(graph.num_dst, 2, 16, seed=3)
    expected = run("cpu", form, inputs, graph, upstream)
    for strided in (
        [x.mT.contiguous().mT for x in inputs],
        [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in inputs],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs],
    ):
        actual = run("cpu", form, strided, graph, upstream.mT.contiguous().mT)
        assert all(torch.equal(value, expected[key]) for key, value in actual.items())
    expanded = rand(graph.num_dst, 1, 1, seed=4).expand(-1, 2, 16)
    actual, expected = (
        run("cpu", form, inputs, graph, grad) for grad in (expanded, expanded.contiguous())
    )
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())


@pytest.mark.parametrize(("num_src", "num_dst", "edges"), [(0, 0, 0), (0, 3, 0), (3, 0, 0)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_empty(num_src, num_dst, edges, form, softmax):
    graph = RelationGraph.from_edges(
        torch.empty(2, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64),
        (num_src, num_dst), 2,
    )  # fmt: skip
    upstream = torch.ones(num_dst, 2, 20)
    for value in run("cpu", form, inputs_of(form, graph), graph, upstream).values():
        assert not value.any()
    no_dialogues = bound(RelationSpec.redifu_self(2, 3), [], torch.empty(0, dtype=torch.int64))
    for graph in (no_dialogues, bound(RelationSpec.redifu_self(2, 3), [0, 0])):
        inputs = inputs_of(form, graph)
        for value in run("cpu", form, inputs, graph, torch.ones(0, 2, 20)).values():
            assert not value.any()
    graph = bound(RelationSpec.redifu_self(2, 3), [5])
    for heads, width in ((0, 4), (2, 0)):
        upstream = torch.ones(5, heads, width)
        result = run("cpu", form, inputs_of(form, graph, heads, width), graph, upstream)
        assert result["out"].shape == (5, heads, width)
        assert all(not value.any() for value in result.values())


@pytest.mark.parametrize("name", ["rule, split dialogue", "rule, complete", "list, random"])
@pytest.mark.parametrize("form", FORMS)
def test_bitwise_equal_over_repeats_and_threads(name, form):
    graph = GRAPHS[name]()
    inputs, upstream = inputs_of(form, graph), rand(graph.num_dst, 2, 20, seed=1)
    first = run("cpu", form, inputs, graph, upstream)
    for repeat in range(100):
        torch.set_num_threads(1 + repeat % 3)
        for key, value in run("cpu", form, inputs, graph, upstream).items():
            assert torch.equal(value, first[key]), key


class TestProperties:
    @pytest.mark.parametrize("softmax", SOFTMAX)
    @pytest.mark.parametrize("form", FORMS)
    def test_dialogues_do_not_depend_on_their_batch(self, form, softmax):
        spec, lengths = RelationSpec.dialoguegcn(3, 12, 9), [40, 1, 70, 25]
        graph = bound(spec, lengths)
        inputs, upstream = inputs_of(form, graph), rand(graph.num_dst, 2, 20, seed=1)
        whole = run("cpu", form, inputs, graph, upstream, softmax=softmax)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        for first, end in zip(starts[:-1], starts[1:], strict=True):
            alone = spec.bind(graph.keys[first:end], torch.tensor([0, end - first]))
            part = [*(x[first:end] for x in inputs[:3]), inputs[3]]
            result = run("cpu", form, part, alone, upstream[first:end], softmax=softmax)
            for name, value in result.items():
                if name != "logit_rel":
                    assert torch.equal(value, whole[name][first:end]), name

    @pytest.mark.parametrize("form", FORMS)
    def test_order_of_edges_does_not_matter(self, form):
        graph = GRAPHS["list, random"]()
        (edge_index, kind), order = graph.to_edges(), torch.randperm(700)
        other = RelationGraph.from_edges(edge_index[:, order], kind[order], 60, 5)
        inputs = inputs_of(form, graph)
        outs = [FORMS[form][0](*inputs, g, impl="cpu") for g in (graph, other)]
        torch.testing.assert_close(*outs)

    @pytest.mark.parametrize("form", FORMS)
    def test_speakers_relabelled_with_the_table(self, form):
        table, relabel = drawn(1, -1, 7, 5, 5, 3), torch.tensor([3, 0, 4, 1, 2])
        graph = bound(RelationSpec(9, 4, table, 7), [50, 31])
        relabelled = torch.empty_like(table)
        relabelled[relabel[:, None], relabel[None, :]] = table
        other = RelationSpec(9, 4, relabelled, 7).bind(relabel[graph.keys], graph.cu_seqlens)
        inputs = inputs_of(form, graph)
        outs = [FORMS[form][0](*inputs, g, impl="cpu") for g in (graph, other)]
        assert torch.equal(*outs)

    def test_unlimited_window_equals_a_long_one_and_self_only_is_the_value(self):
        lengths = [50, 31]
        graphs = [bound(RelationSpec.dialoguegcn(2, w, w), lengths) for w in (None, 49, 0)]
        inputs = inputs_of("additive", graphs[0])
        outs = [relation_attention(*inputs, graph, impl="cpu") for graph in graphs]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[2], inputs[0])


class TestDropout:
    NODES = 200

    def kept(self, graph, p, seed, heads=2):
        """(N_dst, heads, N_src) the factors of every weight: logits are 0, values one-hot."""
        value = torch.eye(graph.num_src)[:, None].expand(-1, heads, -1)
        dst, src = torch.zeros(graph.num_dst, heads), torch.zeros(graph.num_src, heads)
        rel = torch.zeros(graph.num_relations, heads)
        torch.manual_seed(seed)
        dropped = relation_attention(value, dst, src, rel, graph, dropout_p=p, impl="cpu")
        plain = relation_attention(value, dst, src, rel, graph, impl="cpu")
        return torch.where(plain > 0, dropped / plain, 0.0)

    @pytest.mark.parametrize("explicit", [False, True])
    def test_statistics(self, explicit):
        p = 0.3
        graph = bound(RelationSpec.speaker_direction(2, None, None), [self.NODES])
        if explicit:
            graph = RelationGraph.from_edges(*graph.to_edges(), self.NODES, 5)
        factors = self.kept(graph, p, 1)
        kept = factors != 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
        noise = (p * (1 - p)) ** 0.5
        assert abs(kept.double().mean() - (1 - p)) < 4 * noise / kept.numel() ** 0.5
        for dim in (0, 2):
            rates = kept.double().mean(dim)
            assert (rates - (1 - p)).abs().max() < 6 * noise / self.NODES**0.5
        centred = kept.double() - (1 - p)
        pairs = [
            (centred[:, 0], centred[:, 1]),
            (centred[1:], centred[:-1]),
            (centred[..., 1:], centred[..., :-1]),
        ]
        for a, b in pairs:
            assert abs((a * b).mean()) < 5 * noise**2 / a.numel() ** 0.5

    def test_seed_decides(self):
        graph = GRAPHS["rule, window"]()
        first, same, other = (self.kept(graph, 0.5, seed) for seed in (1, 1, 2))
        assert torch.equal(first, same) and not torch.equal(first, other)

    @pytest.mark.parametrize("softmax", SOFTMAX)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "name", ["rule, window", "rule, beyond one block", "rule, modalities share steps", "list"]
    )
    def test_gradients_use_the_same_factors(self, name, form, softmax):
        """Against the formula with the factors that the kernel itself shows."""
        if name == "list":
            graph = GRAPHS["rule, window"]()
            graph = RelationGraph.from_edges(*graph.to_edges(), graph.num_src, 18)
        else:
            graph = GRAPHS[name]()
        inputs, upstream = inputs_of(form, graph), rand(graph.num_dst, 2, 20, seed=3)
        (source, target), kind = graph.to_edges()
        keep = self.kept(graph, 0.4, 5)[target, :, source].double()  # [E, H]
        leaves = [x.double().requires_grad_() for x in inputs]
        if form == "additive":
            value, dst, src, rel = leaves
            logit = dst[target] + src[source] + rel[kind]
            logit = torch.nn.functional.leaky_relu(logit, 0.2)
        else:
            query, key, value, rel = leaves
            logit = (query[target] * key[source]).sum(-1) / 3 + rel[kind]
        group = target if softmax == "across" else target * graph.num_relations + kind
        total = torch.zeros(int(group.max()) + 1, 2).double().index_add(0, group, logit.exp())
        weight = logit.exp() / total[group] * keep
        truth = torch.zeros(graph.num_dst, 2, 20).double()
        truth = truth.index_add(0, target, weight[:, :, None] * value[source])
        gradients = torch.autograd.grad(truth, leaves, upstream.double())
        torch.manual_seed(5)
        actual = run("cpu", form, inputs, graph, upstream, dropout_p=0.4, softmax=softmax)
        for got, want in zip(actual.values(), (truth, *gradients), strict=True):
            assert (got - want).abs().max() < 5e-5 * max(1.0, float(want.abs().max()))


class TestRegisteredOperators:
    CASES = ("rule, window", "rule, modalities share steps", "list, bipartite")

    def arguments(self, name, form, within):
        graph = GRAPHS[name]()
        inputs = inputs_of(form, graph)
        if form == "dot":
            inputs = [inputs[2], *inputs[:2], inputs[3]]
        layout = windows(graph) if graph.is_implicit else bands.layout(graph).tensors
        return (*inputs, list(layout), torch.tensor(3), 0.3, 0.2, within, False, 0.25, "cpu")

    @pytest.mark.parametrize("within", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", CASES)
    def test_opcheck(self, name, form, within):
        arguments = self.arguments(name, form, within)
        torch.library.opcheck(torch.ops.rdfkern.relation_attn_fwd.default, arguments)
        out, softmax = torch.ops.rdfkern.relation_attn_fwd(*arguments)
        torch.library.opcheck(
            torch.ops.rdfkern.relation_attn_bwd.default,
            (torch.ones_like(out), *arguments[:4], out, softmax, *arguments[4:]),
        )

    @pytest.mark.parametrize("name", CASES[:2])
    def test_kept_softmax(self, name):
        value, dst, src, rel, layout, _, *_ = self.arguments(name, "additive", False)
        graph = GRAPHS[name]()
        options = (layout, None, 1.0, 0.2, False, False, 0.0, "cpu")
        _, softmax = torch.ops.rdfkern.relation_attn_fwd(value, dst, src, rel, *options)
        (source, target), kind = graph.to_edges()
        logit = (dst[target] + src[source] + rel[kind]).double()
        logit = torch.nn.functional.leaky_relu(logit, 0.2)
        total = torch.zeros(dst.shape).double().index_add(0, target, logit.exp())
        base, factor = softmax.double()
        expected = Windows(*layout).rows(total)
        assert torch.equal(factor == 0, expected == 0) and (base[expected == 0] == INF).all()
        heard = expected > 0
        lse = base[heard] - factor[heard].log()
        torch.testing.assert_close(lse, expected[heard].log(), rtol=1e-5, atol=1e-5)

    def test_edge_lists_of_int64(self):
        arguments = self.arguments("list, bipartite", "additive", True)
        wide = (*arguments[:4], [x.long() for x in arguments[4]], *arguments[5:])
        results = [torch.ops.rdfkern.relation_attn_fwd(*a) for a in (arguments, wide)]
        assert torch.equal(results[0][0], results[1][0])
        gradients = [
            torch.ops.rdfkern.relation_attn_bwd(results[0][0], *a[:4], *results[0], *a[4:])
            for a in (arguments, wide)
        ]
        assert all(map(torch.equal, *gradients))

    @pytest.mark.parametrize(
        ("name", "form", "dynamic"),
        [
            (CASES[0], "additive", True),
            (CASES[0], "dot", False),
            (CASES[1], "additive", False),
            (CASES[2], "dot", True),
        ],
    )
    def test_compiles_to_one_graph_without_an_eager_call_before(self, name, form, dynamic):
        torch.compiler.reset()
        function = FORMS[form][0]
        fresh, graph = GRAPHS[name](), GRAPHS[name]()
        leaves = [x.requires_grad_() for x in inputs_of(form, graph)]

        def attend(*tensors):
            return function(*tensors, fresh, softmax="within", impl="cpu")

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        expected = function(*leaves, graph, softmax="within", impl="cpu")
        outs = compiled(*leaves), expected
        assert torch.equal(*outs) and torch.equal(compiled(*leaves), expected)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outs]
        assert all(map(torch.equal, *grads))

    def test_compiled_dropout_draws_anew(self):
        graph = GRAPHS["rule, window"]()
        inputs = inputs_of("additive", graph)

        def attend(*tensors):
            return relation_attention(*tensors, graph, dropout_p=0.5, impl="cpu")

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert not torch.equal(compiled(*inputs), compiled(*inputs))

    @pytest.mark.parametrize("name", CASES)
    def test_export(self, name):
        graph = GRAPHS[name]()

        class Attend(torch.nn.Module):
            def forward(self, *tensors):
                return relation_attention(*tensors, graph)

        inputs = tuple(inputs_of("additive", graph))
        program = torch.export.export(Attend(), inputs)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("rdfkern.relation_attn_fwd.default") == 1
        assert torch.equal(program.module()(*inputs), Attend()(*inputs))

    def test_double_backward_is_refused(self):
        graph = GRAPHS["rule, window"]()
        leaves = [x.requires_grad_() for x in inputs_of("additive", graph)]
        out = relation_attention(*leaves, graph, impl="cpu")
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_a_graph_first_used_in_inference_mode_still_trains(self):
        for name in self.CASES:
            graph = GRAPHS[name]()
            inputs = inputs_of("additive", graph)
            with torch.inference_mode():
                relation_attention(*inputs, graph, impl="cpu")
            run("cpu", "additive", inputs, graph, torch.ones(graph.num_dst, 2, 20))


class TestChoice:
    @pytest.mark.parametrize("form", FORMS)
    def test_is_first_on_the_cpu(self, form):
        graph = GRAPHS["rule, window"]()
        inputs, name = inputs_of(form, graph), FORMS[form][0].__name__
        assert rdfkern.explain(name, *inputs, graph).startswith(f"{name}: cpu")
        outs = [FORMS[form][0](*inputs, graph, impl=impl) for impl in ("auto", "cpu")]
        assert torch.equal(*outs)

    def test_what_it_cannot_do_it_says(self):
        graph = GRAPHS["rule, window"]()
        wide = [x.double() for x in inputs_of("additive", graph)]
        with pytest.raises(rdfkern.BackendUnavailableError, match="float64"):
            relation_attention(*wide, graph, impl="cpu")
        assert relation_attention(*wide, graph).dtype == torch.float64

    @pytest.mark.parametrize("name", ["rule, window", "rule, modalities share steps"])
    def test_no_edge_of_a_rule_is_ever_listed(self, name):
        graph = GRAPHS[name]()
        inputs = inputs_of("additive", graph)
        run("cpu", "additive", inputs, graph, torch.ones(graph.num_dst, 2, 20))
        assert set(graph._derived) == {"windows"}


class TestWindows:
    @pytest.mark.parametrize("name", IMPLICIT)
    def test_ranges_and_table_give_the_edges(self, name):
        graph = IMPLICIT[name]()
        order, key, ranges, table = windows(graph)
        first, end, heard_first, heard_end, same_first, same_end = ranges.tolist()
        node = order.tolist() or list(range(graph.num_src))
        edges, heard = [], set()
        for i in range(graph.num_src):
            assert first[i] <= same_first[i] <= i < same_end[i] <= end[i]
            for j in range(first[i], end[i]):
                direction = 0 if j < same_first[i] else 2 if j >= same_end[i] else 1
                relation = int(table[key[i], key[j], direction])
                heard.add((i, j))
                if relation >= 0:
                    edges.append((node[i], node[j], relation))
        expected = {(i, j) for j in range(len(node)) for i in range(heard_first[j], heard_end[j])}
        assert heard == expected
        (source, target), relation = graph.to_edges()
        listed = torch.stack([target, source, relation], dim=1).tolist()
        assert sorted(edges) == sorted(map(tuple, listed))

    def test_positions_that_span_too_much(self):
        spec = RelationSpec.speaker_direction(1, 10, None)
        far = torch.tensor([2**62, -(2**62)])
        graph = spec.bind(torch.tensor([0, 0]), torch.tensor([0, 2]), far)
        with pytest.raises(ValueError, match=r"positions must span less than 2\*\*62.*in 1 dia"):
            windows(graph)
        near = spec.bind(torch.tensor([0, 0]), torch.tensor([0, 2]), far // 4)
        assert windows(near).ranges[:2].tolist() == [[0, 1], [2, 2]]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    or "ATEN_CPU_CAPABILITY" in os.environ,
    reason="needs a wider instruction set to step down from",
)
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_instruction_sets(capability):
    """The same source for AVX2 and for vectors of four lanes, as NEON has them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "test_error_budget and (window or complete or random) or test_widths"]
    done = subprocess.run(
        command,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_kernel_table_names_what_exists():
    assert attention_op.KERNELS["cpu"] == ".attention_native"
