"""Triton kernels of relation_conv against the reference (see triton_runs)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_conv
from rdfkern.ops.relation_mp import bands, conv_config
from rdfkern.testing import assert_within_budget
from triton_runs import (
    DEVICE,
    in_the_interpreter,
    kernels_run,
    on_a_gpu,
    outside,
    selections,
    under_ttsem,
)


@outside
@selections
def test_in_the_interpreter(select):
    in_the_interpreter(__file__, select)


@outside
@selections
def test_under_ttsem(select):
    under_ttsem(__file__, select)


def set_tiles(monkeypatch, block_m, block_n, block_c=32, block_e=32, splits=1):
    tiles = conv_config.Tiles(block_m, block_n, block_c, block_e, 4, 1)
    monkeypatch.setattr(conv_config, "tiles", lambda *_: tiles)
    monkeypatch.setattr(conv_config, "splits", lambda *_: splits)


def random_rule(spec, lengths, *, positions=None, seed=0):
    """`spec` bound to dialogues of these lengths with random keys."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(spec.num_keys, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if positions is not None:
        positions = torch.randint(12, (sum(lengths),), generator=generator).to(positions)
    return spec.bind(keys, cu_seqlens, positions)


def random_edges(num_src, num_dst, relations, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = [torch.randint(n, (edges,), generator=generator) for n in (num_src, num_dst)]
    kind = torch.randint(relations, (edges,), generator=generator)
    return RelationGraph.from_edges(torch.stack(ends), kind, (num_src, num_dst), relations)


def problem(
    graph,
    width_in=20,
    width_out=24,
    *,
    aggr="mean",
    dtype=torch.float32,
    form="full",
    weighted=False,
    rooted=False,
    strided=False,
    seed=0,
):
    """Tensors of `relation_conv` by name, the gradient of its output, the graph and options."""
    generator = torch.Generator().manual_seed(seed * 10007 + graph.num_src)

    def draw(*shape):
        if strided:
            wide = torch.randn(*shape[:-2], shape[-1], 2 * shape[-2], generator=generator)
            return wide.to(dtype)[..., ::2].transpose(-1, -2)
        return torch.randn(shape, generator=generator).to(dtype)

    relations = graph.num_relations
    inputs = {"x": draw(graph.num_src, width_in)}
    if form == "full":
        inputs["weight"] = draw(relations, width_in, width_out) / width_in**0.5
    elif form == "blocks":
        inputs["weight"] = draw(relations, 3, width_in // 3, width_out // 3)
    else:
        inputs["coefficients"] = draw(relations, 2)
        inputs["bases"] = draw(2, width_in, width_out) / width_in**0.5
    if weighted:
        edges = graph.to_edges()[1].shape[0]
        inputs["edge_weight"] = torch.randn(edges, generator=generator).to(dtype)
    if rooted:
        inputs["x_dst"] = draw(graph.num_dst, 5)
        inputs["root_weight"] = draw(5, width_out)
        inputs["bias"] = torch.randn(width_out, generator=generator).to(dtype)
    return inputs, draw(graph.num_dst, width_out), graph, aggr


def conv(inputs, graph, aggr, impl):
    x, weight = inputs["x"], inputs.get("weight")
    if weight is None:
        weight = (inputs["coefficients"], inputs["bases"])
    optional = {n: inputs[n] for n in ("edge_weight", "root_weight", "bias") if n in inputs}
    x = (x, inputs["x_dst"]) if "x_dst" in inputs else x
    return relation_conv(x, weight, graph, aggr=aggr, impl=impl, **optional)


def plain_conv(inputs, graph, aggr, _):
    """The formula, relation by relation, in the dtype of its inputs."""
    (source, target), kind = graph.to_edges()
    x, weight = inputs["x"], inputs.get("weight")
    if weight is None:
        bases = inputs["bases"]
        weight = (inputs["coefficients"] @ bases.flatten(1)).unflatten(1, bases.shape[1:])
    elif weight.dim() == 4:
        weight = torch.stack([torch.block_diag(*matrices) for matrices in weight])
    out = x.new_zeros(graph.num_dst, weight.shape[2])
    for relation in range(graph.num_relations):
        edges = (kind == relation).nonzero()[:, 0]
        message = x[source[edges]]
        if "edge_weight" in inputs:
            message = message * inputs["edge_weight"][edges, None]
        heard = x.new_zeros(graph.num_dst, x.shape[1])
        if aggr == "max":
            # Without itself, its gradient would still count the zeros it starts from as ties.
            into, least = target[edges, None].expand_as(message), heard - math.inf
            heard = least.scatter_reduce(0, into, message, "amax")
            heard = heard.where(heard > least, 0.0)
        else:
            heard = heard.index_add(0, target[edges], message)
        if aggr == "mean":
            counts = torch.bincount(target[edges], minlength=graph.num_dst).clamp(min=1)
            heard = heard / counts[:, None].to(x.dtype)
        out = out + heard @ weight[relation]
    if "root_weight" in inputs:
        out = out + inputs["x_dst"] @ inputs["root_weight"]
    return out + inputs["bias"] if "bias" in inputs else out


def run(function, inputs, grad, graph, aggr, impl=None, dtype=None):
    """The output and the gradient of every input, by name."""
    device = DEVICE if impl == "triton" else "cpu"
    leaves = {n: x.detach().to(device, dtype).requires_grad_() for n, x in inputs.items()}
    out = function(leaves, graph.to(device), aggr, impl)
    grad = grad.to(device, dtype)
    # Without edges the reference's maximum has no use for its inputs.
    gradients = torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)
    results = {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: x.cpu() for name, x in results.items()}


def run_kernels(*described):
    # Uninitialised memory is filled with what is not a number.
    torch.use_deterministic_algorithms(True)
    try:
        return run(conv, *described, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)


def check(*described):
    actual = run_kernels(*described)
    truth = run(conv, *described, impl="reference", dtype=torch.float64)
    plain = run(plain_conv, *described)
    # Where sums nearly cancel, one way to write the formula can be right by luck.
    for name, x in run(conv, *described, impl="torch").items():
        if x.numel() and (x - truth[name]).abs().max() > (plain[name] - truth[name]).abs().max():
            plain[name] = x
    assert_within_budget(actual, plain, truth)


BF16, FP16 = torch.bfloat16, torch.float16
SHARED = torch.tensor([[[0, 1, 0], [0, 1, 2]], [[2, 2, 2], [1, -1, 1]]])
RULES = {
    "window": (RelationSpec.dialoguegcn(2, 5, 4), (35, 1, 0, 5), {"width_in": 37, "width_out": 37}),
    "one speaker": (RelationSpec.speaker_direction(1, 3, 20), (37, 3), {"strided": True}),
    "complete": (RelationSpec.speaker_direction(2, None, None), (38, 2), {"width_in": 33}),
    "all of the past": (RelationSpec.speaker_direction(2, None, 0), (23, 18), {"aggr": "sum"}),
    "the node itself": (RelationSpec.speaker_direction(2, 0, 0), (9, 4), {"width_in": 5}),
    "one utterance": (RelationSpec.dialoguegcn(2, 1, 1), (1, 1, 1), {"width_out": 1}),
    "relations shared by keys": (RelationSpec(4, 6, SHARED), (34,), {}),
    "relations without edges": (RelationSpec(4, None, SHARED, 9), (19,), {"aggr": "sum"}),
    "float16": (RelationSpec.speaker_direction(2, 4, 30), (34,), {"dtype": FP16}),
    "bfloat16": (RelationSpec.dialoguegcn(2, 7, 2), (23,), {"dtype": BF16, "rooted": True}),
    "bfloat16 sums": (RelationSpec(None, 3, SHARED), (24,), {"dtype": BF16, "aggr": "sum"}),
    "root and bias": (RelationSpec.redifu_self(2, 6), (20,), {"rooted": True, "strided": True}),
    "basis": (RelationSpec.dialoguegcn(2, 3, 3), (17, 2), {"form": "basis", "dtype": BF16}),
    "blocks": (
        RelationSpec.dialoguegcn(2, 9, 0),
        (21,),
        {"form": "blocks", "width_in": 51, "width_out": 9},
    ),
}
POSITIONS = {
    "modalities": (RelationSpec.cross_modal(1, 2, 4, 2), (31,), torch.int64),
    "narrow positions": (RelationSpec(3, None, SHARED), (28, 9), torch.int16),
    "many at a position": (RelationSpec(None, None, SHARED), (40,), torch.int32),
}
LISTS = {
    "random": ((23, 23, 4, 110), {"width_in": 37, "width_out": 37}),
    "bipartite": ((9, 40, 3, 80), {"rooted": True, "strided": True}),
    "sums": ((30, 11, 5, 60), {"aggr": "sum"}),
    "weighted": ((23, 19, 4, 120), {"weighted": True}),
    "weighted sums": ((20, 20, 2, 90), {"weighted": True, "aggr": "sum", "width_out": 37}),
    "many of a kind": ((3, 4, 2, 30), {"weighted": True}),
    "one edge": ((1, 1, 3, 1), {"width_in": 1, "width_out": 1}),
    "no edges": ((5, 3, 2, 0), {"weighted": True, "rooted": True}),
    "isolated nodes": ((50, 50, 3, 12), {}),
    "bfloat16": ((21, 17, 3, 90), {"weighted": True, "dtype": BF16}),
    "float16": ((21, 17, 3, 90), {"dtype": FP16}),
    "blocks": ((12, 12, 3, 50), {"form": "blocks", "width_in": 51, "width_out": 9}),
    "weighted blocks": (
        (12, 9, 2, 40),
        {"form": "blocks", "width_in": 6, "width_out": 9, "weighted": True},
    ),
    "basis": ((18, 12, 5, 50), {"form": "basis", "weighted": True}),
}
# The interpreter takes the neighbours of a maximum one by one.
MAXIMA = {
    "window": (RelationSpec.dialoguegcn(2, 3, 2), (18, 1, 0, 4), {"width_in": 19}),
    "strided": (RelationSpec.speaker_direction(1, 1, 9), (18, 3), {"strided": True}),
    "complete": (RelationSpec.speaker_direction(2, None, None), (17, 2), {"width_out": 33}),
    "one utterance": RULES["one utterance"],
    "relations without edges": (RelationSpec(2, None, SHARED, 9), (9,), {"rooted": True}),
    "float16": (RelationSpec.speaker_direction(2, 4, 30), (12,), {"dtype": FP16}),
    "bfloat16": (RelationSpec.dialoguegcn(1, 7, 2), (11,), {"dtype": BF16, "rooted": True}),
    "basis": (RelationSpec.dialoguegcn(1, 3, 3), (9, 2), {"form": "basis", "dtype": BF16}),
    "blocks": (RelationSpec(3, 0, SHARED), (12,), {**RULES["blocks"][2], "width_in": 51}),
    "list": ((23, 23, 4, 60), {"width_in": 19}),
    "list, bipartite": LISTS["bipartite"],
    "list, weighted": ((13, 19, 4, 70), {"weighted": True, "width_in": 37}),
    "list, many of a kind": LISTS["many of a kind"],
    "list, no edges": LISTS["no edges"],
    "list, isolated nodes": LISTS["isolated nodes"],
    "list, bfloat16": LISTS["bfloat16"],
    "list, weighted blocks": LISTS["weighted blocks"],
    "list, basis": LISTS["basis"],
}
QUICK_MAXIMA = ("one utterance", "relations without edges", "bfloat16", "list, weighted")
QUICK_MAXIMA += ("list, bipartite", "list, no edges", "list, weighted blocks")
TILES = ((16, 32), (32, 16))


@kernels_run
@pytest.mark.parametrize("case", RULES)
def test_rules(case, monkeypatch):
    set_tiles(monkeypatch, *TILES[list(RULES).index(case) % 2])
    spec, lengths, options = RULES[case]
    check(*problem(random_rule(spec, lengths), **options))


@kernels_run
@pytest.mark.parametrize("case", POSITIONS)
def test_positions(case, monkeypatch):
    set_tiles(monkeypatch, *TILES[list(POSITIONS).index(case) % 2])
    spec, lengths, dtype = POSITIONS[case]
    check(*problem(random_rule(spec, lengths, positions=dtype)))


@kernels_run
@pytest.mark.parametrize("case", LISTS)
def test_lists_of_edges(case, monkeypatch):
    set_tiles(monkeypatch, *TILES[list(LISTS).index(case) % 2])
    sizes, options = LISTS[case]
    check(*problem(random_edges(*sizes), **options))


def maxima(case):
    """The problem of a case, by maximum."""
    *graph, options = MAXIMA[case]
    graph = random_edges(*graph[0]) if case.startswith("list") else random_rule(*graph)
    return problem(graph, **{**options, "aggr": "max"})


@kernels_run
@pytest.mark.parametrize(
    "case", [c if c in QUICK_MAXIMA else pytest.param(c, marks=pytest.mark.slow) for c in MAXIMA]
)
def test_maxima(case, monkeypatch):
    set_tiles(monkeypatch, *TILES[list(MAXIMA).index(case) % 2], block_c=16)
    check(*maxima(case))


def tied(graph, **options):
    """Features and edge weights of few values, all exact: the maxima are attained many times."""
    inputs, *rest = problem(graph, 10, 6, aggr="max", **options)
    inputs["x"] = inputs["x"].round().clamp(-1, 1)
    if "edge_weight" in inputs:
        inputs["edge_weight"] = 2.0 ** inputs["edge_weight"].round()
    return inputs, *rest


TIED = {
    "rule": lambda: random_rule(RelationSpec(4, 3, SHARED), (13,), positions=torch.int64),
    "list": lambda: random_edges(13, 9, 3, 60),
}


@kernels_run
@pytest.mark.parametrize("kind", TIED)
def test_what_ties_shares_the_gradient_of_the_maximum(kind, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    described = tied(TIED[kind](), weighted=kind == "list")
    check(*described)
    expected = run_kernels(*described)
    of_one = 8 * described[2].num_dst * 10
    for relations in (1, 2):
        monkeypatch.setattr(conv_config, "MAX_KEPT_BYTES", relations * of_one)
        for name, value in run_kernels(*described).items():
            assert torch.equal(value, expected[name]), name


@kernels_run
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", TIED)
def test_maxima_that_are_not_finite(kind, value, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    inputs, *rest = tied(TIED[kind](), weighted=kind == "list")
    inputs["x"][[2, 5], 1] = value
    actual = run_kernels(inputs, *rest)
    expected = run(conv, inputs, *rest, impl="reference")
    assert value == -float("inf") or not expected["weight"].isfinite().all()
    for name, result in expected.items():
        options = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True, "msg": name}
        torch.testing.assert_close(actual[name], result, **options)


@kernels_run
def test_positions_far_apart(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    spec = RelationSpec(2**60, None, SHARED)
    positions = torch.arange(40) * 2**56 - 2**61 - 2**60
    graph = spec.bind(torch.arange(40) % 3 % 2, torch.tensor([0, 40]), positions)
    check(*problem(graph, 3, 4))


@kernels_run
def test_64_bit_indices(monkeypatch):
    monkeypatch.setattr(bands, "_INT32_END", 0)
    set_tiles(monkeypatch, 16, 16)
    graph = random_rule(RelationSpec.dialoguegcn(2, 5, 4), (25, 2))
    assert bands.layout(graph).tensors[0].dtype == torch.int64
    check(*problem(graph))
    check(*problem(graph, 5, 6, aggr="max"))
    check(*problem(random_edges(9, 8, 3, 50), weighted=True))
    check(*problem(random_edges(9, 8, 3, 50), 5, 6, weighted=True, aggr="max"))


@kernels_run
def test_more_groups_than_a_search_takes_at_once(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    lengths = [(0, 1, 0, 0, 2)[at % 5] for at in range(130)] + [20]
    graph = random_rule(RelationSpec.speaker_direction(1, 2, 1), lengths)
    x, weight = torch.randn(graph.num_src, 3), torch.randn(5, 3, 4)
    out = relation_conv(x.to(DEVICE), weight.to(DEVICE), graph.to(DEVICE), impl="triton")
    torch.testing.assert_close(out.cpu(), relation_conv(x, weight, graph, impl="reference"))


@kernels_run
@pytest.mark.slow
def test_300_speakers(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    spec = RelationSpec.speaker_direction(300, 4, None)
    keys = torch.tensor([0, 299, 17, 0, 299, 17, 17, 150, 0, 299])
    check(*problem(spec.bind(keys, torch.tensor([0, 8, 10])), 6, 7))


@kernels_run
@pytest.mark.slow
def test_a_thousand_relations(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    check(*problem(random_edges(8, 8, 1000, 40), 6, 7))
    table = torch.randint(-1, 1000, (5, 5, 3), generator=torch.Generator().manual_seed(1))
    check(*problem(random_rule(RelationSpec(3, 3, table, 1000), (20, 5)), 6, 7))


@kernels_run
def test_splits_of_the_rows(monkeypatch):
    set_tiles(monkeypatch, 16, 16, splits=3)
    for aggr in ("mean", "max"):
        rule = random_rule(RelationSpec.speaker_direction(2, 4, 3), (33, 4))
        check(*problem(rule, 6, 7, aggr=aggr))
        check(*problem(random_edges(9, 37, 2, 90), 6, 7, aggr=aggr))


@st.composite
def graphs(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    seed, relations = draw(st.integers(0, 99)), one_of(1, 3, 8)
    if one_of(True, False):
        sizes = (one_of(1, 4, 17, 33), one_of(1, 5, 16, 35))
        return random_edges(*sizes, relations, one_of(0, 1, 7, 60), seed)
    keys = one_of(1, 2, 3)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-1, relations, (keys, keys, 3), generator=generator)
    sides = (None, 0, 1, 4, 17)
    spec = RelationSpec(one_of(*sides), one_of(*sides), table, relations)
    lengths = draw(st.lists(st.sampled_from((0, 1, 3, 16, 17, 34)), min_size=1, max_size=3))
    positions = one_of(None, None, torch.int64, torch.int16)
    return random_rule(spec, [*lengths, 2], positions=positions, seed=seed)


@st.composite
def problems(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    graph = draw(graphs())
    return problem(
        graph,
        one_of(3, 6, 18, 33),
        one_of(3, 9, 33),
        aggr=one_of("sum", "mean", "max"),
        dtype=one_of(torch.float32, BF16, FP16),
        # Gradients of a basis are torch's own sums of dweight, which may cancel: RULES has them.
        form=one_of("full", "blocks"),
        weighted=not graph.is_implicit and one_of(False, True),
        rooted=one_of(False, True),
        strided=one_of(False, True),
    )


SETTINGS = {"deadline": None, "derandomize": True, "database": None, "phases": (Phase.generate,)}


@kernels_run
@settings(max_examples=6, **SETTINGS)
@given(problems(), st.sampled_from(TILES))
def test_any_problem(described, tiles):
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, *tiles)
        check(*described)


@kernels_run
@pytest.mark.slow
@settings(max_examples=40, **SETTINGS)
@given(problems(), st.sampled_from(TILES))
def test_many_problems(described, tiles):
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, *tiles)
        check(*described)


@kernels_run
@pytest.mark.parametrize("aggr", ["mean", "max"])
def test_only_the_gradients_asked_for(aggr, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    graph = random_edges(9, 8, 3, 50).to(DEVICE)
    inputs, grad, *_ = problem(graph.to("cpu"), 6, 7, weighted=True)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    grad = grad.to(DEVICE)
    whole = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected = torch.autograd.grad(conv(whole, graph, aggr, "triton"), list(whole.values()), grad)
    for name, gradient in zip(whole, expected, strict=True):
        given = {**inputs, name: whole[name]}
        (alone,) = torch.autograd.grad(conv(given, graph, aggr, "triton"), whole[name], grad)
        assert torch.equal(alone, gradient), name


class NoValueIsRead(TorchDispatchMode):
    """Fails where the host reads a value or a shape that depends on values."""

    READING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")
    READING += ("unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "allclose")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.READING, f"the host reads a value: {function}"
        assert name != "repeat_interleave" or "output_size" in (kwargs or {}), function
        return function(*args, **(kwargs or {}))


@kernels_run
@pytest.mark.parametrize("aggr", ["mean", "max"])
def test_no_value_is_read_on_the_host(aggr, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    graph = random_rule(RelationSpec(5, None, SHARED), (9, 4)).to(DEVICE)
    inputs, grad, *_ = problem(graph.to("cpu"), 6, 7)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    with NoValueIsRead():
        out = relation_conv(*leaves, graph, aggr=aggr, impl="triton")
        torch.autograd.grad(out, leaves, grad.to(DEVICE))
    with pytest.raises(AssertionError, match="the host reads"), NoValueIsRead():
        out.sum().item()


@kernels_run
@pytest.mark.usefixtures("tracing")
def test_one_node_in_compiled_and_exported_programs():
    graph = random_rule(RelationSpec.speaker_direction(2, 3, 2), (9, 4)).to(DEVICE)
    inputs, *_ = problem(graph.to("cpu"), 6, 7)
    tensors = tuple(x.to(DEVICE).requires_grad_() for x in inputs.values())

    class Convolve(torch.nn.Module):
        def forward(self, x, weight):
            return relation_conv(x, weight, graph, impl="triton")

    compiled = torch.compile(Convolve(), fullgraph=True, backend="aot_eager")
    outs = [f(*tensors) for f in (Convolve(), compiled)]
    assert torch.equal(*outs)
    for one, other in zip(*(torch.autograd.grad(o.sum(), tensors) for o in outs), strict=True):
        torch.testing.assert_close(one, other)
    program = torch.export.export(Convolve(), tensors)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("rdfkern.relation_conv_fwd.default") == 1


@kernels_run
@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("implicit", [False, True])
def test_opcheck(implicit, aggr, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    graph = random_edges(3, 3, 1, 5)
    if implicit:
        graph = random_rule(RelationSpec(3, 2, SHARED[:1, :1, :1].expand(1, 1, 3)), (4,))
    inputs, grad, _, _ = problem(graph, 5, 6, weighted=not implicit)
    tensors, past, future = bands.layout(graph.to(DEVICE))
    x, weight, factor, grad = (
        None if tensor is None else tensor.to(DEVICE)
        for tensor in (inputs["x"], inputs["weight"], inputs.get("edge_weight"), grad)
    )
    rest = (list(tensors), past, future, aggr)
    forward, backward = torch.ops.rdfkern.relation_conv_fwd, torch.ops.rdfkern.relation_conv_bwd
    bias = torch.randn(6).to(DEVICE)
    arguments = (x, weight, None, bias, factor, *rest, graph.num_dst, "triton")
    torch.library.opcheck(forward.default, arguments)
    needs = [True, True, False, True, not implicit]
    arguments = (grad, x, weight, None, factor, *rest, needs, "triton")
    torch.library.opcheck(backward.default, arguments)


SIZES = {
    "iemocap": (RelationSpec.dialoguegcn(2, 20, 20), (110,) * 16, 512),
    "meld": (RelationSpec.dialoguegcn(9, 10, 10), (60,) * 16, 128),
    "complete": (RelationSpec.speaker_direction(2, None, None), (2000,), 128),
    "odd widths": (RelationSpec.speaker_direction(3, 7, None), (300, 1, 77), 200),
}


@kernels_run
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_default_tiles(dtype):
    spec, lengths, width = RelationSpec.speaker_direction(2, 30, None), (150, 9, 40), 70
    check(*problem(random_rule(spec, lengths), width, width, dtype=dtype))
    check(*problem(random_edges(70, 90, 3, 400), width, width, dtype=dtype, weighted=True))


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("case", RULES)
def test_default_tiles_on_rules(case, dtype):
    spec, lengths, options = RULES[case]
    check(*problem(random_rule(spec, lengths), **{**options, "dtype": dtype}))


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("case", LISTS)
def test_default_tiles_on_lists(case, dtype):
    sizes, options = LISTS[case]
    check(*problem(random_edges(*sizes), **{**options, "dtype": dtype}))


@on_a_gpu
@pytest.mark.parametrize("case", MAXIMA)
def test_default_tiles_on_maxima(case):
    check(*maxima(case))


@on_a_gpu
@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("case", SIZES)
def test_real_sizes(case, dtype, aggr):
    spec, lengths, width = SIZES[case]
    check(*problem(random_rule(spec, lengths), width, width, dtype=dtype, aggr=aggr))


@on_a_gpu
def test_large_lists_of_edges():
    check(*problem(random_edges(5000, 4000, 20, 100_000), 128, 128, dtype=BF16, weighted=True))


@on_a_gpu
@pytest.mark.parametrize("aggr", ["mean", "max"])
@pytest.mark.parametrize("implicit", [False, True])
def test_the_same_bits_over_100_repeats(implicit, aggr):
    spec, lengths, width = SIZES["meld"]
    graph = random_rule(spec, lengths) if implicit else random_edges(900, 900, 20, 20_000)
    described = problem(graph, width, width, dtype=BF16, weighted=not implicit, aggr=aggr)
    first = run_kernels(*described)
    for _ in range(100):
        for name, value in run_kernels(*described).items():
            assert torch.equal(value, first[name]), name


@on_a_gpu
@pytest.mark.parametrize("aggr", ["mean", "max"])
def test_cuda_graph(aggr):
    spec, lengths, width = SIZES["iemocap"]
    graph = random_rule(spec, lengths).to(DEVICE)
    inputs, grad, *_ = problem(graph.to("cpu"), width, width, dtype=BF16)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    grad = grad.to(DEVICE)

    def step():
        out = relation_conv(*leaves, graph, aggr=aggr, impl="triton")
        return out, *torch.autograd.grad(out, leaves, grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step()
    with torch.no_grad():
        leaves[0].mul_(2)
    captured.replay()
    for actual, expected in zip(results, step(), strict=True):
        assert torch.equal(actual, expected)


@on_a_gpu
@pytest.mark.parametrize("aggr", ["mean", "max"])
def test_no_synchronisation_on_a_gpu(aggr):
    spec, lengths, width = SIZES["meld"]
    graph = random_rule(spec, lengths).to(DEVICE)
    inputs, grad, *_ = problem(graph.to("cpu"), width, width)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    grad = grad.to(DEVICE)
    relation_conv(*leaves, graph, aggr=aggr, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = relation_conv(*leaves, graph, aggr=aggr, impl="triton")
        torch.autograd.grad(out, leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@outside
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_default_tiles_follow_the_problem(architecture):
    for kernel in conv_config.KERNELS:
        large = conv_config.tiles(kernel, 512, 512, 1000, BF16, architecture)
        assert large.block_c * large.block_e >= 64 * 64
        small = conv_config.tiles(kernel, 5, 20, 6.7, BF16, architecture)
        assert (small.block_m, small.block_c, small.block_e) == (16, 16, 32)
        exact = conv_config.tiles(kernel, 512, 512, 1000, torch.float32, architecture)
        assert exact == conv_config.FLOAT32


@outside
def test_splits_fill_the_device_and_stay_small():
    assert conv_config.splits(1000, 500, 10**6, 132) == 1
    assert conv_config.splits(10, 500, 10**5, 132) == 26
    assert conv_config.splits(10, 20, 10**5, 132) == 5
    assert conv_config.splits(1, 500, 10**7, 132) == 1


@outside
def test_reasons_to_refuse():
    graph = random_edges(4, 4, 2, 6)
    x, weight = torch.zeros(4, 3), torch.zeros(2, 3, 5)
    assert rdfkern.available_backends("relation_conv")["triton"] == "no GPU is visible"
    with pytest.raises(rdfkern.BackendUnavailableError, match="triton.*inputs are on cpu"):
        relation_conv(x, weight, graph, impl="triton")


@kernels_run
def test_reasons_that_the_arguments_give():
    graph = random_edges(4, 4, 2, 6).to(DEVICE)

    def reason(graph=graph, dtype=torch.float32):
        x = torch.zeros(graph.num_src, 3, dtype=dtype, device=DEVICE)
        return conv_config.can_run({"x_src": x, "graph": graph})

    assert reason() is None
    assert "torch.float64" in reason(dtype=torch.float64)
    table = torch.zeros(1366, 1366, 3, dtype=torch.int64)
    many = RelationSpec(1, 1, table).bind(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]))
    assert reason(many.to(DEVICE)) == "takes up to 1365 keys, got 1366"
