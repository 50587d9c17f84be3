"""Relation message passing as its formulas read: the implementation `reference`.

Dense in the nodes (relation_conv) or a loop over targets (relation_attention); half types are
computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import masked_softmax
from .graph import RelationGraph


def relation_conv(
    x_src: Tensor,
    x_dst: Tensor | None,
    weight: Tensor,
    coefficients: Tensor | None,
    graph: RelationGraph,
    aggr: str,
    edge_weight: Tensor | None,
    root_weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """out_i = root x_i + bias + sum_r AGG_{j in N_r(i)} (w_e x_j) W_r."""
    exact = _at_least_float32(x_src)
    (source, target), edge_type = graph.to_edges()
    if edge_weight is None:
        edge_weight = exact.new_ones(len(edge_type))
    edge_weight = _at_least_float32(edge_weight)
    matrices = _matrices(_at_least_float32(weight), coefficients)  # [R, in, out]
    out = exact.new_zeros((graph.num_dst, matrices.shape[2]))
    for relation in range(graph.num_relations):
        of_relation = edge_type == relation
        edges = (source[of_relation], target[of_relation], edge_weight[of_relation])
        if aggr == "max":
            heard = _largest(exact, *edges, graph.num_dst)
        else:
            heard = _adjacency(*edges, graph, mean=aggr == "mean") @ exact
        out = out + heard @ matrices[relation]
    if root_weight is not None:
        out = out + _at_least_float32(x_dst) @ _at_least_float32(root_weight)
    if bias is not None:
        out = out + _at_least_float32(bias)
    return out.to(x_src.dtype)


def relation_attention(
    value: Tensor,
    logit_dst: Tensor,
    logit_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    negative_slope: float,
    softmax: str,
    dropout_p: float,
) -> Tensor:
    """out_i = sum_e a_e value_{source of e}, logits LeakyReLU(dst_i + src_j + rel_r)."""
    dst, src, rel = (_at_least_float32(logit) for logit in (logit_dst, logit_src, logit_rel))
    (source, target), edge_type = graph.to_edges()
    logit = F.leaky_relu(dst[target] + src[source] + rel[edge_type], negative_slope)  # [E, H]
    return _attend(logit, value, graph, softmax, dropout_p)


def relation_gat(
    value: Tensor,
    att_dst: Tensor,
    att_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    negative_slope: float,
    softmax: str,
    dropout_p: float,
) -> Tensor:
    """`relation_attention` with dst_i = att_dst . value_i and src_j = att_src . value_j."""
    wide = _at_least_float32(value)
    dst, src = ((wide * _at_least_float32(vector)).sum(dim=2) for vector in (att_dst, att_src))
    rel, options = _at_least_float32(logit_rel), (negative_slope, softmax, dropout_p)
    return relation_attention(wide, dst, src, rel, graph, *options).to(value.dtype)


def relation_dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    scale: float,
    softmax: str,
    dropout_p: float,
) -> Tensor:
    """out_i = sum_e a_e value_{source of e}, logits scale * query_i . key_j + rel_r."""
    query, key, rel = (_at_least_float32(tensor) for tensor in (query, key, logit_rel))
    (source, target), edge_type = graph.to_edges()
    logit = scale * (query[target] * key[source]).sum(dim=2) + rel[edge_type]  # [E, H]
    return _attend(logit, value, graph, softmax, dropout_p)


def _attend(
    logit: Tensor, value: Tensor, graph: RelationGraph, softmax: str, dropout_p: float
) -> Tensor:
    """Softmax of the (E, H) logits at every target, over all its edges or each relation's."""
    exact = _at_least_float32(value)
    (source, target), edge_type = graph.to_edges()
    keep = F.dropout(torch.ones_like(logit), dropout_p)
    rows = [exact[:0]]
    for node in range(graph.num_dst):
        edges = (target == node).nonzero()[:, 0]
        relations = edge_type[edges]
        groups = [edges]
        if softmax == "within":
            groups = [edges[relations == relation] for relation in relations.unique()]
        out = exact.new_zeros((1, *exact.shape[1:]))
        for group in groups:
            attention = masked_softmax(logit[group].T, None).T * keep[group]  # [edges, H]
            message = attention[:, :, None] * exact[source[group]]
            out = out + message.sum(dim=0, keepdim=True)
        rows.append(out)
    return torch.cat(rows).to(value.dtype)


def _adjacency(
    source: Tensor, target: Tensor, edge_weight: Tensor, graph: RelationGraph, *, mean: bool
) -> Tensor:
    """(N_dst, N_src), the weights of one relation, over the number of its edges for the mean."""
    empty = edge_weight.new_zeros((graph.num_dst, graph.num_src))
    weights = empty.index_put((target, source), edge_weight, accumulate=True)
    if not mean:
        return weights
    return weights / torch.bincount(target, minlength=graph.num_dst).clamp(min=1)[:, None]


def _largest(
    x: Tensor, source: Tensor, target: Tensor, edge_weight: Tensor, num_dst: int
) -> Tensor:
    """(N_dst, in), the elementwise maximum over the edges of one relation; 0 without any."""
    messages = x[source] * edge_weight[:, None]
    heard = x.new_zeros((num_dst, x.shape[1]))
    for node in target.unique():
        largest = messages[target == node].amax(dim=0)
        heard = heard.index_put((node,), largest)
    return heard


def _matrices(weight: Tensor, coefficients: Tensor | None) -> Tensor:
    """Weights of any form as (R, in, out)."""
    if coefficients is not None:
        return torch.einsum("rb,bio->rio", _at_least_float32(coefficients), weight)
    if weight.dim() == 3:
        return weight
    relations, blocks, rows, columns = weight.shape
    matrices = weight.new_zeros((relations, blocks * rows, blocks * columns))
    for block in range(blocks):
        row = slice(block * rows, (block + 1) * rows)
        column = slice(block * columns, (block + 1) * columns)
        matrices[:, row, column] = weight[:, block]
    return matrices


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
