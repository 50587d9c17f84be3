"""How the layers of relation message passing are computed without this package.

PyG's modules get the leaves as their parameters; lists of edges are made before the time starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdfkern._backends.dispatch import CHAINS

from . import relation_by_hand as by_hand
from .candidates import Candidate, Run, Unsuitable, check_memory, fresh
from .relation_problem import RelationProblem, ours
from .shapes import RANDOM, RelationShape


def candidates(shape: RelationShape, device: torch.device) -> list[Candidate]:
    """All that compute the shape's operation on a kind of device."""
    found = [ours(impl) for impl in CHAINS[device.type] if impl != "reference"]
    if shape.op == "relation_conv":
        return [
            *found,
            Candidate("PyG RGCNConv", _rgcn_loop),
            Candidate("PyG FastRGCNConv", _rgcn_fast),
            Candidate("torch-scatter", _torch_scatter),
            Candidate("torch by hand", _conv_by_hand),
        ]
    is_dot = shape.op == "relation_dot_attention"
    if shape.transforms and not is_dot:
        found.append(Candidate("PyG RGATConv", _rgat))
    if shape.conversations is None and shape.rule != RANDOM:
        if is_dot:
            found.append(Candidate("dense SDPA", partial(_dot_dense, attend=_sdpa)))
            found.append(Candidate("dense products", partial(_dot_dense, attend=_products)))
        else:
            found.append(Candidate("ReDiFu, dense", partial(_redifu_dense, pairs=_paired)))
            as_released = partial(_redifu_dense, pairs=_repeated, unused_softmax=True)
            found.append(Candidate("ReDiFu, dense as released", as_released))
    return [*found, Candidate("torch by hand", _attention_by_hand)]


def _rgcn_loop(problem: RelationProblem) -> Run:
    """The loop over relations: PyG's grouped product takes the mean over all edges of a target."""
    # Both ends and the messages of one relation at a time, of about E / R edges.
    shape = problem.shape
    edges = problem.edges(3 * shape.width * shape.dtype.itemsize)
    backend = _import("torch_geometric.backend", "torch-geometric")
    convs = _import("torch_geometric.nn.conv", "torch-geometric")

    def forward(conv: Any, leaves: dict[str, Tensor]) -> Tensor:
        before, backend.use_segment_matmul = backend.use_segment_matmul, False
        try:
            return conv(leaves["x"], *edges)
        finally:
            backend.use_segment_matmul = before

    return _rgcn(problem, convs.RGCNConv, forward)


def _rgcn_fast(problem: RelationProblem) -> Run:
    """A weight for every edge."""
    shape = problem.shape
    edges = problem.edges(2 * shape.width * shape.out * shape.dtype.itemsize)
    convs = _import("torch_geometric.nn.conv", "torch-geometric")
    return _rgcn(problem, convs.FastRGCNConv, lambda conv, leaves: conv(leaves["x"], *edges))


def _rgcn(
    problem: RelationProblem, kind: type, forward: Callable[[Any, dict[str, Tensor]], Tensor]
) -> Run:
    shape = problem.shape
    conv = kind(shape.width, shape.out, problem.graph.num_relations)
    leaves = fresh(problem.inputs)
    for name in ("weight", "root", "bias"):
        leaves[name] = torch.nn.Parameter(leaves[name].detach())
        setattr(conv, name, leaves[name])
    return Run(lambda: forward(conv, leaves), leaves)


def _torch_scatter(problem: RelationProblem) -> Run:
    """Means by (target, relation), then one product with all weights."""
    scatter = _import("torch_scatter", "torch-scatter").scatter
    edges, leaves = _means_fit(problem), fresh(problem.inputs)

    def forward() -> Tensor:
        x = leaves["x"]
        messages = x[edges.source]
        means = scatter(messages, edges.place, dim=0, dim_size=edges.rows, reduce="mean")
        return by_hand.one_product(leaves, x, means)

    return Run(forward, leaves)


def _conv_by_hand(problem: RelationProblem) -> Run:
    edges, leaves = _means_fit(problem), fresh(problem.inputs)
    return Run(lambda: by_hand.conv(leaves, leaves["x"], edges), leaves)


def _means_fit(problem: RelationProblem) -> by_hand.Edges:
    row = problem.shape.width * problem.shape.dtype.itemsize
    check_memory(4 * problem.graph.num_dst * problem.graph.num_relations * row, problem.device)
    return _edges(problem, 2 * row)


def _edges(problem: RelationProblem, bytes_of_an_edge: float) -> by_hand.Edges:
    (source, target), kind = problem.edges(bytes_of_an_edge)
    graph = problem.graph
    return by_hand.Edges(source, target, kind, graph.num_dst, graph.num_relations)


def _rgat(problem: RelationProblem) -> Run:
    """PyG's layer, one weight for all relations, whose logits come in as features of edges."""
    shape, relations = problem.shape, problem.graph.num_relations
    heads, channels = shape.heads, shape.out // shape.heads
    (edge_index, kind) = problem.edges(4 * shape.width * shape.out * shape.dtype.itemsize)
    convs = _import("torch_geometric.nn.conv", "torch-geometric")
    conv = convs.RGATConv(
        shape.width, channels, relations, heads=heads, edge_dim=relations, bias=False
    )
    conv.to(problem.device, shape.dtype)
    leaves = fresh(problem.inputs)
    edge_attr = F.one_hot(kind, relations).to(shape.dtype)
    # One column of PyG's edge projection per head carries the relation's logit.
    pick = torch.zeros(shape.out, heads, device=problem.device, dtype=shape.dtype)
    pick[torch.arange(heads) * channels, torch.arange(heads)] = 1

    def forward() -> Tensor:
        a_dst, a_src, logit_rel = problem.vectors(leaves)
        projection = (pick[:, :, None] * logit_rel.T).sum(1)  # [H C, R]
        parameters = {
            "weight": leaves["weight"].expand(relations, -1, -1),
            "q": torch.block_diag(*a_dst[:, :, None]),
            "k": torch.block_diag(*a_src[:, :, None]),
            "e": pick,
            "lin_edge.weight": projection,
        }
        inputs = (leaves["x"], edge_index, kind, edge_attr)
        return torch.func.functional_call(conv, parameters, inputs)

    return Run(forward, leaves)


def _redifu_dense(
    problem: RelationProblem,
    pairs: Callable[[Tensor, Tensor], Tensor],
    unused_softmax: bool = False,
) -> Run:
    """ReDiFu's attention: every pair of a padded dialogue with its 2 d + 10 features.

    The released code repeats the rows of either side in memory before it joins them, and takes a
    second softmax, without a mask, that nothing uses.
    """
    shape, heads = problem.shape, problem.shape.heads
    length, channels = shape.length, shape.out // heads
    # The rows of either side, their pairs, and these with the relation's features.
    copies = 3 if pairs is _repeated else 1
    codes = _codes(problem, copies * heads * (2 * channels + 10))
    leaves = fresh(problem.inputs)

    def features() -> list[Tensor]:
        """h of every head, [B, N, C]."""
        if not shape.transforms:
            return list(leaves["h"].unflatten(0, (-1, length)).unbind(2))
        x = leaves["x"].unflatten(0, (-1, length))
        return [x @ weight for weight in leaves["weight"].unflatten(1, (heads, -1)).unbind(1)]

    def forward() -> Tensor:
        embedding = F.pad(leaves["embedding"], (0, 0, 1, 0))  # its first row: no edge
        relation = embedding[codes]  # [B, N, N, 10]
        outs = []
        for h, a in zip(features(), leaves["a"], strict=True):
            logits = F.leaky_relu(pairs(h, relation) @ a, 0.2)
            if unused_softmax:
                logits.softmax(-1)
            attention = torch.where(codes > 0, logits, -9e15).softmax(-1)
            outs.append(attention @ h)
        return torch.cat(outs, dim=-1).flatten(0, 1)

    return Run(forward, leaves)


def _paired(h: Tensor, relation: Tensor) -> Tensor:
    """[B, N, N, 2 C + 10] of h [B, N, C] and features of relations, in one copy."""
    length = h.shape[1]
    of_target = h[:, :, None].expand(-1, -1, length, -1)
    of_source = h[:, None].expand(-1, length, -1, -1)
    return torch.cat([of_target, of_source, relation], dim=-1)


def _repeated(h: Tensor, relation: Tensor) -> Tensor:
    """The same, made of rows that are repeated, of their pairs, and of these with the relation."""
    length = h.shape[1]
    of_target, of_source = h.repeat_interleave(length, dim=1), h.repeat(1, length, 1)
    pairs = torch.cat([of_target, of_source], dim=-1).unflatten(1, (length, length))
    return torch.cat([pairs, relation], dim=-1)


def _dot_dense(problem: RelationProblem, attend: Callable[..., Tensor]) -> Run:
    """Attention over padded dialogues; logits of relations, -inf without an edge, as its mask."""
    length = problem.shape.length
    codes, leaves = _codes(problem, 4 * problem.shape.heads), fresh(problem.inputs)

    def forward() -> Tensor:
        query, key, value = (
            rows.unflatten(0, (-1, length)).transpose(1, 2) for rows in problem.transform(leaves)
        )  # [B, H, N, C]
        rel = F.pad(leaves["rel"], (0, 0, 1, 0), value=-torch.inf)
        bias = rel[codes].permute(0, 3, 1, 2)  # [B, H, N, N]
        return attend(query, key, value, bias).transpose(1, 2).flatten(2).flatten(0, 1)

    return Run(forward, leaves)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, bias)


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    logits = query @ key.mT * query.shape[3] ** -0.5 + bias
    return logits.softmax(-1) @ value


def _codes(problem: RelationProblem, floats_of_a_pair: int) -> Tensor:
    """[B, N, N], one more than the relation of every pair, 0 without an edge."""
    shape = problem.shape
    size, length = shape.dialogues, shape.length
    bytes_of_a_pair = 4 * floats_of_a_pair * shape.dtype.itemsize
    check_memory(size * length**2 * bytes_of_a_pair, problem.device)
    (source, target), kind = problem.edges(0)
    codes = torch.zeros(size, length, length, dtype=torch.long, device=problem.device)
    codes[target // length, target % length, source % length] = kind + 1
    return codes


def _attention_by_hand(problem: RelationProblem) -> Run:
    edges = _edges(problem, 3 * problem.shape.out * problem.shape.dtype.itemsize)
    leaves = fresh(problem.inputs)
    return Run(lambda: problem.by_hand(leaves, edges), leaves)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unsuitable(f"{package} is not installed ({error})") from None
