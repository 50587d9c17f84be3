import pytest
import torch
import torch.nn.functional as F

from rdfkern import RelationGraph, RelationSpec
from rdfkern.nn import RelationAttention, RelationConv

FORMS = [{}, {"num_bases": 3}, {"num_blocks": 2}]


def random_edges(num_src, num_dst, relations, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(num_src, (edges,), generator=generator)
    target = torch.randint(num_dst, (edges,), generator=generator)
    return torch.stack([source, target]), torch.randint(relations, (edges,), generator=generator)


def matrices(layer):
    if layer.num_bases is not None:
        return torch.einsum("rb,bio->rio", layer.comp, layer.weight)
    if layer.num_blocks is not None:
        return torch.stack([torch.block_diag(*blocks) for blocks in layer.weight])
    return layer.weight


def loops(messages, edge_index, edge_type, num_dst, aggr):
    """messages(relation, source) per edge, aggregated per relation, relations summed."""
    rows = []
    for node in range(num_dst):
        row = 0.0
        for relation in edge_type.unique().tolist():
            edges = ((edge_index[1] == node) & (edge_type == relation)).nonzero()[:, 0].tolist()
            if edges:
                heard = torch.stack([messages(relation, int(edge_index[0, e])) for e in edges])
                how = {"sum": heard.sum, "mean": heard.mean, "max": heard.amax}[aggr]
                row = row + how(dim=0)
        rows.append(row if isinstance(row, torch.Tensor) else messages(0, 0) * 0.0)
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggr", ["sum", "mean"])
def test_conv_equals_loops(form, aggr):
    edge_index, edge_type = random_edges(6, 6, 4, 25)
    layer = RelationConv(4, 6, 4, aggr=aggr, **form).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(6, 4).double()
    weight = matrices(layer)
    expected = loops(lambda r, j: x[j] @ weight[r], edge_index, edge_type, 6, aggr)
    expected = expected + x @ layer.root + layer.bias
    torch.testing.assert_close(layer(x, edge_index, edge_type), expected)
    graph = RelationGraph.from_edges(edge_index, edge_type, 6, 4)
    torch.testing.assert_close(layer(x, graph), expected)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("aggr", ["sum", "mean", "max"])
def test_conv_of_indices_looks_up_rows_of_the_weights(form, aggr):
    edge_index, edge_type = random_edges(5, 5, 3, 20)
    layer = RelationConv(7, 4, 3, aggr=aggr, **form).double()
    torch.nn.init.normal_(layer.bias)
    index = torch.tensor([6, 0, 3, 3, 1])
    weight = matrices(layer)
    expected = loops(lambda r, j: weight[r, index[j]], edge_index, edge_type, 5, aggr)
    expected = expected + layer.root[index] + layer.bias
    out = layer(index, edge_index, edge_type)
    torch.testing.assert_close(out, expected)
    parameters = list(layer.parameters())
    upstream = torch.randn(out.shape).double()
    actual = torch.autograd.grad(out, parameters, upstream)
    for got, want in zip(actual, torch.autograd.grad(expected, parameters, upstream), strict=True):
        torch.testing.assert_close(got, want)


def test_conv_without_features_uses_every_row():
    edge_index, edge_type = random_edges(5, 5, 3, 20)
    layer = RelationConv(5, 4, 3).double()
    every = torch.arange(5)
    torch.testing.assert_close(
        layer(None, edge_index, edge_type), layer(every, edge_index, edge_type)
    )
    with pytest.raises(ValueError, match="x must hold features with num_blocks=5"):
        RelationConv(5, 5, 3, num_blocks=5)(None, edge_index, edge_type)


def test_conv_of_bipartite_graphs():
    edge_index, edge_type = random_edges(5, 3, 2, 12)
    layer = RelationConv((4, 2), 6, 2).double()
    x_src, x_dst = torch.randn(5, 4).double(), torch.randn(3, 2).double()
    expected = loops(lambda r, j: x_src[j] @ layer.weight[r], edge_index, edge_type, 3, "mean")
    out = layer((x_src, x_dst), edge_index, edge_type)
    torch.testing.assert_close(out, expected + x_dst @ layer.root)
    looked_up = layer((x_src, torch.tensor([1, 1, 0])), edge_index, edge_type)
    torch.testing.assert_close(looked_up, expected + layer.root[[1, 1, 0]])
    bare = RelationConv((4, 2), 6, 2, root_weight=False, bias=False).double()
    bare.load_state_dict({"weight": layer.weight})
    graph = RelationGraph.from_edges(edge_index, edge_type, (5, 3), 2)
    torch.testing.assert_close(bare((x_src, None), graph), expected)


def test_conv_parameters_are_those_of_pyg():
    def shapes(layer):
        return {name: tuple(value.shape) for name, value in layer.state_dict().items()}

    assert shapes(RelationConv(4, 6, 5)) == {"weight": (5, 4, 6), "root": (4, 6), "bias": (6,)}
    assert shapes(RelationConv((4, 3), 6, 5, num_bases=2, bias=False)) == {
        "weight": (2, 4, 6),
        "comp": (5, 2),
        "root": (3, 6),
    }
    assert shapes(RelationConv(4, 6, 5, num_blocks=2, root_weight=False)) == {
        "weight": (5, 2, 2, 3),
        "bias": (6,),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggr", ["add", "mean", "max"])
def test_conv_equals_pyg(form, aggr, monkeypatch):
    pyg = pytest.importorskip("torch_geometric")
    # PyG's grouped product takes the mean over all relations together; the loop is the meaning.
    monkeypatch.setattr(pyg.backend, "use_segment_matmul", False)
    edge_index, edge_type = random_edges(9, 9, 4, 50)
    torch.manual_seed(0)
    theirs = pyg.nn.RGCNConv(4, 6, 4, aggr=aggr, **form)
    torch.manual_seed(0)
    ours = RelationConv(4, 6, 4, aggr=aggr, is_sorted=False, **form)
    for (name, mine), (their_name, their) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == their_name and torch.equal(mine, their)
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(9, 4).double()
    inputs = [x] if form.get("num_blocks") else [x, torch.randint(4, (9,))]
    for features in inputs:
        out, expected = (layer(features, edge_index, edge_type) for layer in (ours, theirs))
        torch.testing.assert_close(out, expected)
        upstream = torch.randn(out.shape).double()
        actual = torch.autograd.grad(out, list(ours.parameters()), upstream)
        wanted = torch.autograd.grad(expected, list(theirs.parameters()), upstream)
        for got, want in zip(actual, wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_conv_of_bipartite_graphs_equals_pyg(monkeypatch):
    pyg = pytest.importorskip("torch_geometric")
    monkeypatch.setattr(pyg.backend, "use_segment_matmul", False)
    edge_index, edge_type = random_edges(5, 3, 2, 12)
    theirs = pyg.nn.RGCNConv((4, 2), 6, 2).double()
    ours = RelationConv((4, 2), 6, 2).double()
    ours.load_state_dict(theirs.state_dict())
    x = (torch.randn(5, 4).double(), torch.randn(3, 2).double())
    torch.testing.assert_close(ours(x, edge_index, edge_type), theirs(x, edge_index, edge_type))


def test_conv_ignores_the_order_of_edges_whatever_is_promised():
    edge_index, edge_type = random_edges(6, 6, 4, 25)
    layer = RelationConv(4, 6, 4, is_sorted=True).double()
    x = torch.randn(6, 4).double()
    order = edge_type.argsort()
    torch.testing.assert_close(
        layer(x, edge_index, edge_type), layer(x, edge_index[:, order], edge_type[order])
    )


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: RelationConv(4, 6, 2, num_bases=1, num_blocks=2), ValueError, "exclude each"),
        (lambda: RelationConv(4, 6, 2, num_blocks=4), ValueError, "num_blocks must divide"),
        (lambda: RelationConv(4, 6, 2, num_blocks=0), ValueError, "num_blocks must divide"),
        (lambda: RelationAttention(4, 6, 2, heads=0), ValueError, "heads must be at least 1"),
        (lambda: RelationAttention(4, 6, 2, dropout=1.0), ValueError, "dropout must be in"),
        (lambda: RelationAttention(4, 6, 2, logits="sum"), ValueError, "logits must be.*'sum'"),
        (
            lambda: RelationAttention(4, 6, 2, logits="dot", negative_slope=0.1),
            ValueError,
            "negative_slope belongs to the additive form, got 0.1",
        ),
    ],
)
def test_constructors_reject(run, error, message):
    with pytest.raises(error, match=message):
        run()


EDGES = torch.tensor([[0, 1], [1, 0]])
KINDS = torch.tensor([0, 1])
GRAPH = RelationGraph.from_edges(EDGES, KINDS, 2, 2)


@pytest.mark.parametrize(
    ("x", "edge_index", "edge_type", "error", "message"),
    [
        (torch.ones(2, 4), EDGES, None, ValueError, "edge_type must be given"),
        (torch.ones(2, 4), GRAPH, KINDS, ValueError, "edge_type must be None"),
        (torch.ones(2, 4), [[0], [1]], KINDS, TypeError, "edge_index must be a .* got list"),
        (torch.ones(2, 4), EDGES, KINDS + 1, ValueError, "edge_type.*got 2 at flat index 1"),
        (torch.ones(2, 3), EDGES, KINDS, ValueError, "weight must have shape"),
        ((torch.ones(2, 4), None), EDGES, KINDS, ValueError, r"x\[1\] must be given"),
        (torch.tensor([0, 4]), EDGES, KINDS, ValueError, r"x must be in \[0, 4\).*got 4"),
        (torch.tensor([[0, 1]]), GRAPH, None, ValueError, r"x must have shape \(N_src,\)"),
        (
            torch.ones(2, 4),
            RelationGraph.from_edges(EDGES, KINDS, 2, 3),
            None,
            ValueError,
            "num_relations=2, got 3",
        ),
    ],
)
def test_conv_rejects(x, edge_index, edge_type, error, message):
    with pytest.raises(error, match=message):
        RelationConv(4, 6, 2)(x, edge_index, edge_type)


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("bipartite", [True, False])
def test_attention_equals_loops(concat, bipartite):
    num_dst = 4 if bipartite else 6
    edge_index, edge_type = random_edges(6, num_dst, 3, 20)
    graph = RelationGraph.from_edges(edge_index, edge_type, (6, num_dst), 3)
    layer = RelationAttention(5, 4, 3, heads=2, concat=concat, dropout=0.5).double().eval()
    torch.nn.init.normal_(layer.bias)
    x_src = torch.randn(6, 5).double()
    x_dst = torch.randn(num_dst, 5).double() if bipartite else x_src
    rows = []
    for node in range(num_dst):
        heads = []
        for head in range(2):
            weight = layer.weight[:, 4 * head : 4 * head + 4]
            edges = (edge_index[1] == node).nonzero()[:, 0].tolist()
            scores, values = [], []
            for edge in edges:
                values.append(x_src[edge_index[0, edge]] @ weight)
                score = (x_dst[node] @ weight) @ layer.att_dst[head]
                score = score + values[-1] @ layer.att_src[head] + layer.rel[edge_type[edge], head]
                scores.append(F.leaky_relu(score, 0.2))
            value = torch.zeros(4).double()
            if edges:
                value = torch.stack(scores).softmax(0) @ torch.stack(values)
            heads.append(value)
        rows.append(torch.cat(heads) if concat else (heads[0] + heads[1]) / 2)
    expected = torch.stack(rows) + layer.bias
    out = layer((x_src, x_dst) if bipartite else x_src, graph)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("softmax", ["across", "within"])
@pytest.mark.parametrize("bipartite", [True, False])
def test_dot_attention_equals_loops(bipartite, softmax):
    num_dst = 4 if bipartite else 6
    edge_index, edge_type = random_edges(6, num_dst, 3, 20)
    graph = RelationGraph.from_edges(edge_index, edge_type, (6, num_dst), 3)
    layer = RelationAttention(5, 4, 3, heads=2, logits="dot", softmax=softmax).double()
    assert {name for name, _ in layer.named_parameters()} == {
        "weight",
        "query",
        "key",
        "rel",
        "bias",
    }
    torch.nn.init.normal_(layer.bias)
    x_src = torch.randn(6, 5).double()
    x_dst = torch.randn(num_dst, 5).double() if bipartite else x_src
    rows = []
    for node in range(num_dst):
        heads = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            edges = (edge_index[1] == node).nonzero()[:, 0]
            query = x_dst[node] @ layer.query[:, part]
            heard = x_src[edge_index[0, edges]]
            scores = heard @ layer.key[:, part] @ query / 2 + layer.rel[edge_type[edges], head]
            value = torch.zeros(4).double()
            groups = [torch.ones_like(edges, dtype=torch.bool)]
            if softmax == "within":
                groups = [edge_type[edges] == kind for kind in edge_type[edges].unique()]
            for group in groups:
                value = value + scores[group].softmax(0) @ (heard[group] @ layer.weight[:, part])
            heads.append(value)
        rows.append(torch.cat(heads))
    expected = torch.stack(rows) + layer.bias
    out = layer((x_src, x_dst) if bipartite else x_src, graph)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_attention_drops_only_while_training():
    graph = RelationSpec.redifu_self(2, 3).bind(torch.arange(9) % 2, torch.tensor([0, 9]))
    layer = RelationAttention(5, 4, 5, dropout=0.5)
    x = torch.randn(9, 5)
    assert not torch.equal(layer(x, graph), layer(x, graph))
    layer.eval()
    assert torch.equal(layer(x, graph), layer(x, graph))
    with pytest.raises(ValueError, match=r"x must have shape \(N_src, in\)"):
        layer(x[:, :4], graph)


def test_layers_under_autocast():
    graph = RelationSpec.redifu_self(2, 3).bind(torch.arange(9) % 2, torch.tensor([0, 9]))
    x = torch.randn(9, 5)
    dot = RelationAttention(5, 4, 5, heads=2, logits="dot")
    for layer in (RelationConv(5, 4, 5), RelationAttention(5, 4, 5, heads=2), dot):
        expected = layer(x, graph)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, graph)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
