"""Relation attention in Triton: what `attention_op` and the dispatcher look for by name.

On windows one launch forward and, back, one for targets and relations, one for sources and a sum;
on lists of edges, one forward and three back. Nothing is read on the host, and no grid depends on
values, so that all of it can be captured in a CUDA graph.

A source that a target does not hear is multiplied by 0 where it stands near one that it hears: of
what is not finite, that makes what is not a number.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._backends.triton_utils import unit_stride
from . import attention_op
from . import attention_triton_edges_launch as edge_launches
from . import attention_triton_launch as launches
from .bands import EdgeLists
from .windows import Windows

relation_attention = partial(attention_op.relation_attention, impl="triton")
relation_dot_attention = partial(attention_op.relation_dot_attention, impl="triton")
relation_gat = partial(attention_op.relation_gat, impl="triton")


def forward(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: Windows | EdgeLists,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, softmax), as `attention_op` says."""
    problem = launches.describe(value, dst, src, rel, graph, **options)
    kept = attention_op.keeps_softmax("triton", len(graph), problem.within)
    out, softmax = attention_op.empty_outputs(value, dst, kept)
    if isinstance(graph, Windows):
        launches.windows_forward_launch(problem, out, softmax).run(value.device)
    else:
        edge_launches.edges_forward_launch(problem, out).run(value.device)
    return out, softmax


def backward(
    grad_out: Tensor,
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    out: Tensor,
    softmax: Tensor,
    graph: Windows | EdgeLists,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dvalue, ddst, dsrc, drel), as `attention_op` says; always deterministic."""
    problem, device = launches.describe(value, dst, src, rel, graph, **options), value.device
    grad = unit_stride(grad_out)
    dvalue, ddst, dsrc = (x.new_empty(x.shape) for x in (value, dst, src))
    if isinstance(graph, Windows) and problem.within:
        # Only where there are edges does a tile of targets have a part in a relation.
        parts = launches.new_window_parts(problem).zero_()
        softmax = launches.new_softmax(problem)
        of_sources = (softmax, None, dvalue, dsrc)
        launches.windows_within_by_target_launch(problem, grad, softmax, ddst, parts).run(device)
        launches.windows_by_source_launch(problem, grad, *of_sources).run(device)
    elif isinstance(graph, Windows):
        parts, delta = launches.new_window_parts(problem), torch.empty_like(softmax[0])
        of_targets = (out, softmax, delta, ddst, parts)
        of_sources = (softmax, delta, dvalue, dsrc)
        launches.windows_by_target_launch(problem, grad, *of_targets).run(device)
        launches.windows_by_source_launch(problem, grad, *of_sources).run(device)
    else:
        weights, slopes = edge_launches.new_of_edges(problem)
        parts = edge_launches.new_edge_parts(problem, slopes)
        of_edges = (weights, slopes)
        edge_launches.edges_by_target_launch(problem, grad, *of_edges, ddst).run(device)
        edge_launches.edges_by_source_launch(problem, grad, *of_edges, dvalue, dsrc).run(device)
        if parts.shape[0] > 0:
            edge_launches.edges_by_relation_launch(problem, slopes, parts).run(device)
    drel = parts.sum(dim=0).mT.to(rel.dtype)  # [R, H]
    return dvalue, ddst, dsrc, drel.contiguous()
