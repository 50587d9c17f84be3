"""Relation message passing composed of torch ops: the implementation `torch`.

Neighbours are summed in bags (`incidence`), so that neither features nor weights are gathered per
edge. Half types are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import RelationGraph
from .incidence import Incidence
from .plan import ConvPlan, Grouped, conv_plan, target_incidence


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
    """`rdfkern.relation_conv` on validated arguments; `coefficients` belong to basis weights."""
    dtype = x_src.dtype
    plan = conv_plan(graph)
    out = _neighbours(
        _widen(x_src),
        _weights_in_use(_widen(weight), _widen(coefficients), plan),
        plan,
        aggr,
        _widen(edge_weight),
    )
    if root_weight is not None:
        out = out + _widen(x_dst) @ _widen(root_weight)
    if bias is not None:
        out = out + _widen(bias)
    return out.to(dtype)


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
    """`rdfkern.relation_attention` on validated arguments."""
    incidence = target_incidence(graph)
    _, edge_type = graph.to_edges()
    logit = (
        _widen(logit_dst).index_select(0, incidence.row)
        + _widen(logit_src).index_select(0, incidence.col)
        + _widen(logit_rel).index_select(0, incidence.arrange(edge_type))
    )  # [E, H]
    return _attend(F.leaky_relu(logit, negative_slope), value, graph, softmax, dropout_p)


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
    """`rdfkern.relation_gat` on validated arguments."""
    wide = _widen(value)
    dst, src = ((wide * _widen(vector)).sum(dim=2) for vector in (att_dst, att_src))
    rel, options = _widen(logit_rel), (negative_slope, softmax, dropout_p)
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
    """`rdfkern.relation_dot_attention` on validated arguments."""
    incidence = target_incidence(graph)
    _, edge_type = graph.to_edges()
    query, key = _widen(query), _widen(key)
    logit = _widen(logit_rel).index_select(0, incidence.arrange(edge_type))  # [E, H]
    products = [incidence.products(query[:, head], key[:, head]) for head in range(query.shape[1])]
    if products:
        logit = logit + scale * torch.stack(products, dim=1)
    return _attend(logit, value, graph, softmax, dropout_p)


def _attend(
    logit: Tensor, value: Tensor, graph: RelationGraph, softmax: str, dropout_p: float
) -> Tensor:
    """(N_dst, H, C) from the (E, H) logits of the entries of `target_incidence`."""
    dtype, heads = value.dtype, value.shape[1]
    incidence = target_incidence(graph)
    group, count = incidence.row, graph.num_dst
    if softmax == "within":
        group, count = graph.derive("targets by relation", _targets_by_relation)
    peak = logit.new_full((count, heads), float("-inf"))
    peak = peak.scatter_reduce(0, group[:, None].expand(-1, heads), logit.detach(), "amax")
    # A group whose logits are all -inf hears nobody; so does one without edges.
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    raw = torch.exp(logit - peak.index_select(0, group))
    total = raw.new_zeros((count, heads)).index_add(0, group, raw)
    attention = raw / total.masked_fill(total == 0.0, 1.0).index_select(0, group)
    if dropout_p > 0.0:
        attention = attention * incidence.arrange(F.dropout(torch.ones_like(attention), dropout_p))
    value = _widen(value)
    out = [incidence.sum(value[:, head], attention[:, head].contiguous()) for head in range(heads)]
    if not out:
        return value.new_zeros((graph.num_dst, *value.shape[1:]), dtype=dtype)
    return torch.stack(out, dim=1).to(dtype)


def _targets_by_relation(graph: RelationGraph) -> tuple[Tensor, int]:
    """For every entry of `target_incidence`, a number for its (target, relation); their count."""
    incidence = target_incidence(graph)
    _, edge_type = graph.to_edges()
    pairs = torch.stack([incidence.row, incidence.arrange(edge_type)])
    distinct, group = torch.unique(pairs, dim=1, return_inverse=True)
    return group, distinct.shape[1]


def _neighbours(
    x: Tensor, weight: Tensor, plan: ConvPlan, aggr: str, edge_weight: Tensor | None
) -> Tensor:
    """(N_dst, out), the sum over relations; weight (R', in, out) or (R', NB, in/NB, out/NB)."""
    if aggr == "max" and plan.num_used > 0:
        return _transformed_sum(_largest(x, plan, edge_weight), weight, plan.grouped_targets, plan)
    factor = edge_weight
    if aggr == "mean":
        mean = plan.group_sizes.to(x.dtype).reciprocal()
        factor = mean if edge_weight is None else edge_weight * mean
    products = x.shape[1] * weight.shape[-1]
    if plan.sums_first(x.shape[1], _width_out(weight), products):
        if plan.targets_are_dense:
            return _transform_dense_sums(_sum(plan.dense_targets, x, factor), weight, plan)
        groups = plan.grouped_targets
        return _transformed_sum(_sum(groups.incidence, x, factor), weight, groups, plan)
    if plan.sources_are_dense:
        return _sum(plan.dense_sources, _transform_by_all(x, weight), factor)
    groups = plan.grouped_sources
    rows = _transform_groups(x.index_select(0, groups.node), weight, groups)
    return _sum(groups.incidence, rows, factor)


def _sum(incidence: Incidence, rows: Tensor, factor: Tensor | None) -> Tensor:
    return incidence.sum(rows, None if factor is None else incidence.arrange(factor))


def _largest(x: Tensor, plan: ConvPlan, edge_weight: Tensor | None) -> Tensor:
    """(G, in), the elementwise maximum of every (relation, target); ties share the gradient."""
    incidence = plan.grouped_targets.incidence
    messages = x.index_select(0, incidence.col)  # [E, in]
    if edge_weight is not None:
        messages = messages * incidence.arrange(edge_weight)[:, None]
    row = incidence.row[:, None].expand_as(messages)
    # Every row has entries. A start of 0 would count as one that ties with a maximum of 0.
    empty = x.new_full((incidence.rows, x.shape[1]), float("-inf"))
    return empty.scatter_reduce(0, row, messages, "amax", include_self=False)


def _transform_dense_sums(sums: Tensor, weight: Tensor, plan: ConvPlan) -> Tensor:
    """(N_dst * R', in) to (N_dst, out): transform and sum over relations in one product."""
    nodes, used = plan.num_dst, plan.num_used
    if weight.dim() == 3:
        return sums.view(nodes, used * weight.shape[1]) @ weight.flatten(0, 1)
    blocks = sums.view(nodes, used, *weight.shape[1:3])  # [N, R', NB, in/NB]
    return torch.einsum("nrbi,rbio->nbo", blocks, weight).flatten(1)


def _transform_by_all(x: Tensor, weight: Tensor) -> Tensor:
    """(N_src, in) to (N_src * R', out): every node by the weight of every relation."""
    if weight.dim() == 3:
        return torch.einsum("ni,rio->nro", x, weight).flatten(0, 1)
    blocks = x.unflatten(1, weight.shape[1:3])  # [N, NB, in/NB]
    return torch.einsum("nbi,rbio->nrbo", blocks, weight).flatten(2).flatten(0, 1)


def _transformed_sum(rows: Tensor, weight: Tensor, groups: Grouped, plan: ConvPlan) -> Tensor:
    """(G, in) to (N_dst, out): transform every group and sum those of a target."""
    out = rows.new_zeros((plan.num_dst, _width_out(weight)))
    return out.index_add(0, groups.node, _transform_groups(rows, weight, groups))


def _transform_groups(rows: Tensor, weight: Tensor, groups: Grouped) -> Tensor:
    """(G, in) to (G, out): every group by the weight of its relation."""
    pieces = zip(rows.split(groups.sizes), weight.unbind(0), strict=True)
    if weight.dim() == 3:
        return torch.cat([piece @ matrix for piece, matrix in pieces])
    return torch.cat(
        [
            torch.einsum("nbi,bio->nbo", piece.unflatten(1, blocks.shape[:2]), blocks).flatten(1)
            for piece, blocks in pieces
        ]
    )


def _weights_in_use(weight: Tensor, coefficients: Tensor | None, plan: ConvPlan) -> Tensor:
    """The weights of the R' relations that have edges."""
    of_relations = weight if coefficients is None else coefficients
    if plan.relations is not None:
        of_relations = of_relations.index_select(0, plan.relations)
    if coefficients is None:
        return of_relations
    return torch.einsum("rb,bio->rio", of_relations, weight)


def _width_out(weight: Tensor) -> int:
    return weight.shape[-1] * (weight.shape[1] if weight.dim() == 4 else 1)


def _widen(tensor: Tensor | None) -> Tensor | None:
    """Half types in float32; others as they are."""
    if tensor is None or tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()
