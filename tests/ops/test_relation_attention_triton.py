"""Triton kernels of relation attention against the reference (see triton_runs)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import rdfkern
from rdfkern import RelationGraph, RelationSpec, relation_attention, relation_dot_attention
from rdfkern.ops.relation_mp import attention_config as config
from rdfkern.testing import assert_within_budget
from triton_runs import (
    DEVICE,
    INTERPRETED,
    compiled,
    in_the_interpreter,
    kernels_run,
    on_a_gpu,
    outside,
    selections,
    under_ttsem,
)

# On hardware, and under ttsem, exp2 is an approximation of two units in the last place.
FACTOR, RMS = (2.0, 2.0) if INTERPRETED else (4.0, 3.0)


@outside
@selections
def test_in_the_interpreter(select):
    in_the_interpreter(__file__, select)


@outside
@selections
def test_under_ttsem(select):
    under_ttsem(__file__, select)


def windows_of(lengths, num_keys=3, relations=4, past=None, future=None, steps=None, seed=0):
    """A random rule on dialogues of these lengths; `steps` different positions, else the running
    index."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    table = torch.randint(-1, relations, (num_keys, num_keys, 3), generator=generator)
    keys = torch.randint(num_keys, (total,), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    positions = None if steps is None else torch.randint(steps, (total,), generator=generator)
    return RelationSpec(past, future, table, relations).bind(keys, cu_seqlens, positions)


def edges_of(num_src, num_dst, relations, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = [
        torch.randint(max(n, 1), (edges,), generator=generator)
        for n in (num_src, num_dst, relations)
    ]
    return RelationGraph.from_edges(torch.stack(ends[:2]), ends[2], (num_src, num_dst), relations)


def problem(graph, heads=2, width=24, depth=None, dtype=torch.float32, strided=False, seed=1):
    """Tensors by name, and the gradient of the output; the dot form where there is a depth."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, *columns):
        if strided and len(columns) == 2:
            heads, width = columns
            x = torch.randn(heads, rows, width, 2, generator=generator)[..., 0].transpose(0, 1)
        elif strided:
            x = torch.randn(*columns, rows, generator=generator).mT
        else:
            x = torch.randn(rows, *columns, generator=generator)
        return x.to(dtype)

    src, dst = graph.num_src, graph.num_dst
    inputs = {"value": draw(src, heads, width)}
    if depth is None:
        inputs |= {"logit_dst": draw(dst, heads), "logit_src": draw(src, heads)}
    else:
        inputs |= {"query": draw(dst, heads, depth), "key": draw(src, heads, depth)}
    inputs["logit_rel"] = draw(graph.num_relations, heads)
    return inputs, draw(dst, heads, width)


def plain_formula(
    inputs, graph, negative_slope=0.2, scale=None, softmax="across", keep=None, grad=None
):
    """The formula on lists of edges at the dtype of its inputs; `keep` (E, H) are factors.

    With the gradient of the output, a tensor whose gradients are those of it, where what flows into
    a softmax is not summed weight by weight but taken from the output, as kernels do that store no
    weights.
    """
    (source, target), kind = graph.to_edges()
    logits = inputs["logit_rel"][kind]
    if "query" in inputs:
        scale = inputs["query"].shape[2] ** -0.5 if scale is None else scale
        products = (inputs["query"][target] * inputs["key"][source]).sum(dim=2)
        logits = products * scale + logits  # [E, H]
    else:
        logits = inputs["logit_dst"][target] + inputs["logit_src"][source] + logits
        logits = F.leaky_relu(logits, negative_slope)
    group, count = target, graph.num_dst
    if softmax == "within":
        group, count = target * graph.num_relations + kind, count * graph.num_relations
    peak = logits.new_full((count, logits.shape[1]), float("-inf"))
    peak = peak.scatter_reduce(0, group[:, None].expand_as(logits), logits.detach(), "amax")
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    raw = (logits - peak[group]).exp()
    total = torch.zeros_like(peak).index_add(0, group, raw)
    total = total.masked_fill(total == 0.0, 1.0)[group]
    value = inputs["value"]
    weights = raw / (total if grad is None else total.detach())
    kept = weights if keep is None else weights * keep.to(weights.dtype)
    messages = kept[:, :, None] * value[source]

    def summed(group, count):
        return value.new_zeros(count, *value.shape[1:]).index_add(0, group, messages)

    out = summed(target, graph.num_dst)
    if grad is None:
        return out
    at_edges = (summed(group, count).detach()[group] * grad[target]).sum(dim=2)
    return (out * grad).sum() - (weights * at_edges).sum()


def operation(inputs):
    return relation_dot_attention if "query" in inputs else relation_attention


def derived(inputs, grad, attend):
    """out and the gradient of every tensor."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = attend(leaves)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), grad.to(out), materialize_grads=True
    )
    results = {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: x.cpu() for name, x in results.items()}


def run_kernels(inputs, grad, graph, **options):
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    attend = operation(inputs)
    moved = graph.to(DEVICE)
    return derived(
        inputs, grad, lambda leaves: attend(**leaves, graph=moved, impl="triton", **options)
    )


def check(inputs, grad, graph, factor=FACTOR, keep=None, **options):
    actual = run_kernels(inputs, grad, graph, **options)
    options.pop("dropout_p", None)
    attend = operation(inputs)

    def formula(leaves):
        return plain_formula(leaves, graph, keep=keep, **options)

    def reference(leaves):
        return attend(**leaves, graph=graph, impl="reference", **options)

    wide = {name: x.double() for name, x in inputs.items()}
    truth = derived(wide, grad, reference if keep is None else formula)
    plain = derived(inputs, grad, formula)
    # Where sums nearly cancel, one way to write the formula can be right by luck.
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    surrogate = plain_formula(leaves, graph, keep=keep, grad=grad, **options)
    gradients = torch.autograd.grad(surrogate, list(leaves.values()), materialize_grads=True)
    for name, x in zip(leaves, gradients, strict=True):
        if error(x, truth[name]) > error(plain[name], truth[name]):
            plain[name] = x
    assert_within_budget(actual, plain, truth, factor=factor, rms=RMS)
    return actual


def error(x, truth):
    return (x - truth).abs().max() if x.numel() else 0.0


def set_tiles(monkeypatch, block_m, block_n):
    monkeypatch.setattr(config, "tiles", lambda *_: config.Tiles(block_m, block_n, 4, 1))
    monkeypatch.setattr(config, "MOST_EDGES", 16)


LENGTHS = (19, 1, 0, 33, 5)
GRAPHS = {
    "complete": windows_of(LENGTHS),
    "window": windows_of(LENGTHS, past=9, future=3, seed=1),
    "narrow window": windows_of(LENGTHS, past=1, future=0, seed=2),
    "past only": windows_of(LENGTHS, past=None, future=0, seed=4),
    "one speaker": windows_of((37,), num_keys=1, relations=1, past=5, future=30),
    "positions": windows_of(LENGTHS, past=4, future=2, steps=9, seed=5),
    "many relations": windows_of((19, 14), num_keys=9, relations=243, past=12, future=5, seed=6),
    "edges": edges_of(13, 11, 4, 90),
    "few edges": edges_of(19, 17, 9, 12, seed=1),
    "long rows": edges_of(23, 2, 3, 99, seed=2),
    "no edges": edges_of(5, 6, 2, 0),
}
FORMS = {
    "additive": {},
    "dot": {"depth": 24, "width": 40},
    "additive, bfloat16": {"dtype": torch.bfloat16, "width": 17, "heads": 3},
    "dot, bfloat16": {"dtype": torch.bfloat16, "depth": 20, "width": 16, "heads": 1},
    "additive, float16, strided": {"dtype": torch.float16, "width": 33, "strided": True},
    "dot, strided": {"depth": 16, "width": 5, "strided": True},
}
TILES = ((16, 32), (32, 16))


ONE_EDGE_EACH = {
    "itself only": windows_of(LENGTHS, past=0, future=0, seed=3),
    "one-utterance dialogues": windows_of((1,) * 37, past=3, future=3, seed=7),
    "one edge": RelationGraph.from_edges(
        torch.stack([torch.randint(9, (23,)), torch.arange(23)]), torch.arange(23) % 4, (9, 25), 4
    ),
}

# Every graph meets two forms by default, one of either kind, and all of them in the slow tests.
CASES = [
    pytest.param(name, form, marks=() if (at - number) % 3 == 0 else pytest.mark.slow)
    for at, name in enumerate(GRAPHS)
    for number, form in enumerate(FORMS)
]


@kernels_run
@pytest.mark.parametrize(("name", "form"), CASES)
def test_against_the_reference(name, form, monkeypatch):
    order = list(GRAPHS).index(name) + list(FORMS).index(form) // 3
    set_tiles(monkeypatch, *TILES[order % 2])
    check(*problem(GRAPHS[name], **FORMS[form]), GRAPHS[name])


@kernels_run
@pytest.mark.parametrize("form", ["additive", "dot, bfloat16"])
@pytest.mark.parametrize("name", ONE_EDGE_EACH)
def test_an_only_edge_weighs_1_whatever_its_logit(name, form, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    graph = ONE_EDGE_EACH[name]
    inputs, grad = problem(graph, **FORMS[form])
    actual = run_kernels(inputs, grad, graph)
    source, target = graph.to_edges()[0]
    value = inputs["value"].double()
    expected = torch.zeros(grad.shape).double().index_add(0, target, value[source])
    assert torch.equal(actual.pop("out").double(), expected)
    expected = torch.zeros_like(value).index_add(0, source, grad.double()[target])
    torch.testing.assert_close(actual.pop("value").double(), expected, rtol=1e-2, atol=1e-6)
    products = (grad.double()[target].abs() * value[source].abs()).sum(dim=2).max()
    for logits in actual.values():
        assert logits.abs().max() <= 8 * 2**-23 * len(target) * products


WITHIN = {
    "complete": ("complete", "dot, strided"),
    "positions": ("positions", "additive, bfloat16"),
    "edges": ("edges", "additive"),
    "long rows": ("long rows", "dot, bfloat16"),
    "few edges": ("few edges", "dot, strided"),
}


@kernels_run
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if c == "positions" else ()) for c in WITHIN],
)
def test_softmax_within_relations(case, monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    name, form = WITHIN[case]
    check(*problem(GRAPHS[name], **FORMS[form]), GRAPHS[name], softmax="within")


@kernels_run
@pytest.mark.parametrize(("name", "slope"), [("window", -0.5), ("few edges", 1.5)])
def test_other_slopes(name, slope, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    check(*problem(GRAPHS[name], heads=1), GRAPHS[name], negative_slope=slope)


@kernels_run
@pytest.mark.parametrize("name", ["window", "few edges"])
def test_other_scales(name, monkeypatch):
    set_tiles(monkeypatch, 32, 16)
    check(*problem(GRAPHS[name], **FORMS["dot"]), GRAPHS[name], scale=-0.7)


@kernels_run
def test_relations_are_summed_in_chunks(monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    monkeypatch.setattr(config, "MANY_RELATIONS", 64)
    graph = windows_of((19, 14), num_keys=9, relations=243, past=12, future=5, seed=6)
    check(*problem(graph), graph)
    for relations in (8, 9):
        graph = windows_of((17, 8), num_keys=2, relations=relations, seed=3)
        check(*problem(graph, depth=16, width=16), graph)


@kernels_run
def test_long_lists_are_summed_in_parts():
    graph = edges_of(9, 7, 70, 300)
    check(*problem(graph, heads=1, width=5), graph)


@kernels_run
@pytest.mark.parametrize("name", ["complete", "edges"])
def test_logits_of_minus_infinity(name, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    graph = GRAPHS[name]
    inputs, grad = problem(graph)
    inputs["logit_src"][3:9] = float("-inf")
    inputs["logit_dst"][5] = float("-inf")
    actual = check(inputs, grad, graph)
    assert not actual["out"][5].any()
    # Of dialogues, the second has one utterance, which hears nothing then.
    inputs["logit_src"][:] = float("-inf")
    actual = run_kernels(inputs, grad, graph)
    assert not any(x.any() for x in actual.values())


@kernels_run
@pytest.mark.parametrize("name", ["window", "edges"])
def test_not_a_number_stays_so(name, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    graph = GRAPHS[name]
    inputs, grad = problem(graph)
    source, target = graph.to_edges()[0].tolist()
    inputs["logit_dst"][target[0]] = float("nan")
    actual = run_kernels(inputs, grad, graph)
    assert actual["out"][target[0]].isnan().all()
    assert actual["value"][source[0]].isnan().all()


@kernels_run
def test_large_logits_stay_finite(monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    for name in ("complete", "edges"):
        inputs, grad = problem(GRAPHS[name], heads=1)
        for part in ("logit_dst", "logit_src", "logit_rel"):
            inputs[part] *= 1000
        for result, x in run_kernels(inputs, grad, GRAPHS[name]).items():
            assert x.isfinite().all(), result


def kept_edges(graph, heads, dropout_p, seed, dot=False):
    """(E, H) factors of the edges of an implicit graph; the values show the map itself."""
    nodes = graph.num_src
    value = torch.eye(nodes)[:, None].expand(nodes, heads, nodes)
    zeros = torch.zeros(nodes, heads)
    inputs = {"value": value, "logit_dst": zeros, "logit_src": zeros}
    inputs["logit_rel"] = torch.zeros(graph.num_relations, heads)
    torch.manual_seed(seed)
    out = run_kernels(inputs, value, graph, dropout_p=dropout_p)["out"]
    source, target = graph.to_edges()[0]
    return (out[target, :, source] != 0) / (1 - dropout_p)


@kernels_run
@pytest.mark.parametrize(
    ("form", "softmax"), [("additive", "across"), ("dot", "across"), ("additive", "within")]
)
def test_dropout_on_windows(form, softmax, monkeypatch):
    graph = windows_of((17, 1, 8), past=11, future=4, steps=12, seed=8)
    set_tiles(monkeypatch, 32, 32)
    keep = kept_edges(graph, 2, 0.3, seed=5)
    assert abs((keep > 0).float().mean() - 0.7) < 0.08
    assert abs((keep[:, 0] == keep[:, 1]).float().mean() - 0.58) < 0.1
    set_tiles(monkeypatch, *TILES[form == "dot"])
    torch.manual_seed(5)
    described = problem(graph, heads=2, width=16, depth=FORMS[form].get("depth"))
    check(*described, graph, dropout_p=0.3, keep=keep, softmax=softmax)


@kernels_run
@pytest.mark.parametrize("softmax", ["across", "within"])
def test_dropout_on_edges(softmax):
    # Values that differ show which of the edges of a relation into a target are kept.
    target = torch.randint(3, (40,), generator=torch.Generator().manual_seed(9))
    ends = torch.stack([torch.arange(40), target])
    graph = RelationGraph.from_edges(ends, torch.arange(40) % 3, (40, 3), 3)
    inputs, grad = problem(graph)
    shown = dict(inputs, value=torch.eye(40)[:, None].expand(40, 2, 40))
    torch.manual_seed(6)
    out = run_kernels(shown, out_like(grad, 40), graph, dropout_p=0.4, softmax=softmax)["out"]
    keep = (out[target, :, torch.arange(40)] != 0) / 0.6
    assert abs((keep > 0).float().mean() - 0.6) < 0.15
    assert not torch.equal(keep[:, 0], keep[:, 1])
    torch.manual_seed(6)
    check(inputs, grad, graph, dropout_p=0.4, keep=keep, softmax=softmax)


def out_like(grad, width):
    return torch.ones(*grad.shape[:2], width)


@kernels_run
@pytest.mark.skipif(
    rdfkern.available_backends("relation_attention")["cpu"] is not None or DEVICE != "cpu",
    reason="compares with the CPU kernels on the same device",
)
@pytest.mark.parametrize("name", ["positions", "edges"])
def test_the_same_dropout_as_on_the_cpu(name, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    inputs, _ = problem(GRAPHS[name])
    outs = []
    for impl in ("triton", "cpu"):
        torch.manual_seed(3)
        outs.append(relation_attention(**inputs, graph=GRAPHS[name], dropout_p=0.5, impl=impl))
    torch.testing.assert_close(*outs)


@kernels_run
def test_indices_of_64_bits():
    from rdfkern.ops.relation_mp import attention_triton, bands

    graph = GRAPHS["few edges"].to(DEVICE)
    inputs, grad = problem(graph)
    grad, *tensors = (x.to(DEVICE) for x in (grad, *inputs.values()))
    options = {"scale": 1.0, "negative_slope": 0.2, "within": True, "dropout_p": 0.3, "seed": 2**61}
    narrow = bands.layout(graph).tensors
    assert narrow[0].dtype == torch.int32
    results = []
    for lists in (bands.EdgeLists(*narrow), bands.EdgeLists(*(x.long() for x in narrow))):
        out, softmax = attention_triton.forward(*tensors, lists, **options)
        saved = (out, softmax, lists)
        results.append((out, *attention_triton.backward(grad, *tensors, *saved, **options)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@st.composite
def problems(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    depth = one_of(None, 1, 16, 20)
    seed = draw(st.integers(0, 99))
    features = {
        "heads": one_of(1, 2, 3),
        "width": one_of(1, 15, 16, 33),
        "depth": depth,
        "dtype": one_of(torch.float32, torch.bfloat16, torch.float16),
        "strided": one_of(False, True),
        "seed": seed,
    }
    if one_of(False, False, True):
        sizes = (one_of(1, 9, 21), one_of(1, 7, 17), one_of(1, 3, 20), one_of(0, 30, 80))
        return edges_of(*sizes, seed=seed), features, {"softmax": one_of("across", "within")}
    graph = windows_of(
        draw(st.lists(st.sampled_from((0, 1, 5, 16, 31)), min_size=1, max_size=3)) + [6],
        num_keys=one_of(1, 2, 5),
        relations=one_of(1, 5, 12),
        past=one_of(None, 2, 15),
        future=one_of(None, 1, 16),
        steps=one_of(None, 4, 40),
        seed=seed,
    )
    return graph, features, {"softmax": one_of("across", "across", "within")}


SETTINGS = {"deadline": None, "derandomize": True, "database": None, "phases": (Phase.generate,)}


@kernels_run
@settings(max_examples=8, **SETTINGS)
@given(problems(), st.sampled_from(TILES))
def test_any_problem(described, tiles):
    graph, features, options = described
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, *tiles)
        # The largest of few errors is luck, and so is its budget.
        check(*problem(graph, **features), graph, factor=2 * FACTOR, **options)


@kernels_run
@pytest.mark.slow
@settings(max_examples=60, **SETTINGS)
@given(problems(), st.sampled_from(TILES))
def test_many_problems(described, tiles):
    graph, features, options = described
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, *tiles)
        check(*problem(graph, **features), graph, factor=3 * FACTOR, **options)


@kernels_run
def test_implicit_equals_explicit_and_batches_do_not_matter(monkeypatch):
    set_tiles(monkeypatch, 16, 16)
    graph = windows_of((13, 3, 6), past=7, future=2, steps=11, seed=11)
    inputs, grad = problem(graph, dtype=torch.float32)
    whole = run_kernels(inputs, grad, graph)
    edges = RelationGraph.from_edges(*graph.to_edges(), graph.num_src, graph.num_relations)
    for name, x in run_kernels(inputs, grad, edges).items():
        torch.testing.assert_close(whole[name], x, msg=name)
    rows = slice(13, 16)
    alone = graph.spec.bind(graph.keys[rows], torch.tensor([0, 3]), graph.positions[rows])
    part = {n: x if n == "logit_rel" else x[rows] for n, x in inputs.items()}
    for name, x in run_kernels(part, grad[rows], alone).items():
        if name != "logit_rel":
            torch.testing.assert_close(whole[name][rows], x, msg=name)


@kernels_run
@pytest.mark.parametrize("name", ["window", "few edges"])
def test_the_same_bits_every_time(name, monkeypatch):
    set_tiles(monkeypatch, 16, 32)
    described = problem(GRAPHS[name], heads=1)
    first = run_kernels(*described, GRAPHS[name])
    for result, x in run_kernels(*described, GRAPHS[name]).items():
        assert torch.equal(first[result], x), result


@kernels_run
@pytest.mark.parametrize("graph", [windows_of((0, 0)), edges_of(0, 3, 2, 0)], ids=["N", "N_src"])
def test_empty_graphs(graph):
    assert not any(x.any() for x in run_kernels(*problem(graph), graph).values())


class Attend(torch.nn.Module):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph.to(DEVICE)

    def forward(self, *tensors):
        return relation_attention(*tensors, self.graph, impl="triton")


@kernels_run
@pytest.mark.parametrize("kind", ["implicit", "explicit"])
@pytest.mark.usefixtures("tracing")
def test_one_node_in_compiled_and_exported_programs(kind):
    graph = windows_of((6, 3), past=2) if kind == "implicit" else edges_of(9, 9, 4, 12)
    inputs, _ = problem(graph, heads=1, width=5)
    tensors = tuple(x.to(DEVICE).requires_grad_() for x in inputs.values())
    attend = Attend(graph)
    expected = attend(*tensors)
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(out, expected)
    for one, other in zip(torch.autograd.grad(out.square().sum(), tensors), gradients, strict=True):
        torch.testing.assert_close(one, other)
    program = torch.export.export(attend, tensors)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("rdfkern.relation_attn_fwd.default") == 1


@kernels_run
@pytest.mark.parametrize("kind", ["implicit", "explicit"])
@pytest.mark.usefixtures("tracing")
def test_opcheck(kind):
    from rdfkern.ops.relation_mp import bands, windows

    graph = windows_of((6, 3), past=2) if kind == "implicit" else edges_of(4, 3, 2, 5)
    graph = graph.to(DEVICE)
    made = windows.windows(graph) if graph.is_implicit else bands.layout(graph).tensors
    inputs, grad = problem(graph, heads=1, width=5, depth=3)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    tensors = [inputs[name] for name in ("value", "query", "key", "logit_rel")]
    rest = (list(made), torch.tensor(7), 0.5, 1.0, False, False, 0.25, "triton")
    forward, backward = torch.ops.rdfkern.relation_attn_fwd, torch.ops.rdfkern.relation_attn_bwd
    torch.library.opcheck(forward.default, (*tensors, *rest))
    saved = forward(*tensors, *rest)
    torch.library.opcheck(backward.default, (grad.to(DEVICE), *tensors, *saved, *rest))


def test_nothing_is_read_on_the_host(monkeypatch):
    """No value of a tensor reaches Python, nor does a shape or a grid depend on one."""
    from rdfkern.ops.relation_mp import attention_triton, windows

    launched = []
    monkeypatch.setattr(
        attention_triton.launches.Launch,
        "run",
        lambda self, device: launched.append(self.grid(self.arguments)),
    )
    grids = []
    for lengths in ((9, 9), (17, 1)):
        graph = windows_of(lengths, past=3)
        made = windows.Windows(*(x.to("meta") for x in windows.windows(graph)))
        for depth in (None, 16):
            inputs, grad = problem(graph, depth=depth)
            grad, *tensors = (x.to("meta") for x in (grad, *inputs.values()))
            options = {"scale": 1.0, "negative_slope": 0.2, "within": False}
            options |= {"dropout_p": 0.1, "seed": 3}
            out, softmax = attention_triton.forward(*tensors, made, **options)
            attention_triton.backward(grad, *tensors, out, softmax, made, **options)
        grids.append(launched.copy())
        launched.clear()
    assert len(grids[0]) == 6 and grids[0] == grids[1]


LONG = {
    "complete": windows_of((2000, 3, 700), num_keys=2, relations=5, seed=1),
    "window": windows_of((60,) * 40, num_keys=9, relations=162, past=10, future=10, seed=2),
    "positions": windows_of((900, 1), num_keys=6, past=20, future=20, steps=300, seed=3),
    "edges": edges_of(3000, 2000, 20, 40000),
}


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GRAPHS)
def test_default_tiles(name, form, dtype):
    check(*problem(GRAPHS[name], **{**FORMS[form], "dtype": dtype}), GRAPHS[name])


@on_a_gpu
@pytest.mark.parametrize("features", [{"width": 64}, {"width": 128, "depth": 128}], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_long(name, features):
    graph = LONG[name]
    described = problem(graph, heads=4, dtype=torch.bfloat16, **features)
    first = run_kernels(*described, graph)
    truth = run_torch_in_float64(*described, graph)
    for result, x in first.items():
        scale = truth[result].abs().max()
        assert (x.double() - truth[result]).abs().max() <= 2**-6 * scale, result
    for _ in range(100):
        for result, x in run_kernels(*described, graph).items():
            assert torch.equal(first[result], x), result


def run_torch_in_float64(inputs, grad, graph):
    inputs = {name: x.double() for name, x in inputs.items()}
    attend = operation(inputs)
    return derived(inputs, grad, lambda leaves: attend(**leaves, graph=graph, impl="torch"))


@on_a_gpu
def test_cuda_graph_and_no_synchronisation():
    graph = LONG["complete"].to(DEVICE)
    inputs, grad = problem(graph, heads=2, width=64)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    grad = grad.to(DEVICE)

    def run():
        out = relation_attention(*leaves, graph, impl="triton")
        return out, *torch.autograd.grad(out, leaves, grad)

    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = run()
    captured.replay()
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@outside
def test_reasons_to_refuse():
    graph = edges_of(3, 3, 2, 4)
    arguments = {**problem(graph)[0], "graph": graph, "softmax": "across"}
    assert config.can_run(arguments) == "inputs are on cpu"
    assert config.can_run(None) == "no GPU is visible"
    with pytest.raises(rdfkern.BackendUnavailableError, match="triton.*inputs are on cpu"):
        relation_attention(**problem(graph)[0], graph=graph, impl="triton")


@kernels_run
def test_reasons_that_the_arguments_give():
    def reason(graph, softmax="across", **features):
        inputs = {name: x.to(DEVICE) for name, x in problem(graph, **features)[0].items()}
        return config.can_run({**inputs, "graph": graph, "softmax": softmax})

    rule, edges = windows_of((5,)), edges_of(3, 3, 2, 4)
    assert reason(rule) is None and reason(edges, "within") is None
    assert "torch.float64" in reason(rule, dtype=torch.float64)
    assert "up to 256 columns per head, got 257" in reason(edges, width=257)
    assert "got 300" in reason(edges, depth=300)
    many = windows_of((5,), relations=1025)
    assert reason(many) is None and reason(rule, "within") is None
    assert "up to 1024 relations with softmax='within', got 1025" in reason(many, "within")
    assert "numbers rows in 32 bits" in config.too_many_rows(type("", (), {"num_src": 2**31}))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_default_tiles_fit(architecture):
    for dtype in (torch.bfloat16, torch.float32):
        for depth, width in ((0, 16), (0, 256), (64, 64), (128, 128), (256, 256), (256, 16)):
            for kernel in config.DEFAULTS:
                tiles = config.tiles(kernel, depth, width, dtype, architecture)
                needed = config.needed_bytes(kernel, tiles, depth + width, dtype, architecture)
                assert needed <= config.shared_bytes(architecture), (kernel, depth, width)
