"""Launches of relation attention's Triton kernels on lists of edges, made without running them."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..._backends.triton_utils import Launch
from . import attention_config as config
from .attention_triton_edges import relation_attn_edges_fwd_kernel
from .attention_triton_edges_bwd import (
    relation_attn_edges_bwd_dst_kernel,
    relation_attn_edges_bwd_rel_kernel,
    relation_attn_edges_bwd_src_kernel,
)
from .attention_triton_launch import Problem, padded_width
from .bands import EdgeLists


def edges_forward_launch(problem: Problem, out: Tensor) -> Launch:
    """The launch that fills `out`."""
    return Launch(
        relation_attn_edges_fwd_kernel,
        lambda meta: (out.shape[0] * problem.heads,),
        {**_edges_arguments(problem), "out_ptr": out},
    )


def edges_by_target_launch(
    problem: Problem, grad: Tensor, weights: Tensor, slopes: Tensor, ddst: Tensor
) -> Launch:
    """The launch that fills `ddst` and, for every edge and head, `weights` and `slopes`."""
    return Launch(
        relation_attn_edges_bwd_dst_kernel,
        lambda meta: (ddst.shape[0] * problem.heads,),
        {
            **_edges_arguments(problem),
            "grad_ptr": grad,
            "grad_strides": grad.stride()[:2],
            "weights_ptr": weights,
            "slopes_ptr": slopes,
            "ddst_ptr": ddst,
        },
    )


def edges_by_source_launch(
    problem: Problem, grad: Tensor, weights: Tensor, slopes: Tensor, dvalue: Tensor, dsrc: Tensor
) -> Launch:
    """The launch that fills `dvalue` and `dsrc`."""
    given = _edges_arguments(problem)
    shared = ("dst_ptr", "dst_strides", "heads", "scale", "D", "C", "BLOCK_D", "BLOCK_C")
    shared += ("BLOCK_E", "IS_DOT", "num_warps", "num_stages")
    return Launch(
        relation_attn_edges_bwd_src_kernel,
        lambda meta: (dvalue.shape[0] * problem.heads,),
        {
            **{name: given[name] for name in shared},
            "grad_ptr": grad,
            "grad_strides": grad.stride()[:2],
            "start_ptr": problem.graph.src_start,
            "target_ptr": problem.graph.src_target,
            "edge_ptr": problem.graph.src_edge,
            "weights_ptr": weights,
            "slopes_ptr": slopes,
            "dvalue_ptr": dvalue,
            "dsrc_ptr": dsrc,
        },
    )


def edges_by_relation_launch(problem: Problem, slopes: Tensor, parts: Tensor) -> Launch:
    """The launch that fills the parts of drel."""
    edges = slopes.shape[0]
    return Launch(
        relation_attn_edges_bwd_rel_kernel,
        lambda meta: (
            triton.cdiv(problem.relations, meta["RELATIONS"]),
            parts.shape[0],
            problem.heads,
        ),
        {
            "relation_ptr": problem.graph.dst_relation,
            "edge_ptr": problem.graph.dst_edge,
            "slopes_ptr": slopes,
            "parts_ptr": parts,
            "heads": problem.heads,
            "relations": problem.relations,
            "edges": edges,
            "length": triton.cdiv(edges, parts.shape[0]),
            "BLOCK_E": config.SUMMED_EDGES,
            "RELATIONS": config.SUMMED_RELATIONS,
            "num_warps": 4,
            "num_stages": 1,
        },
    )


def new_of_edges(problem: Problem) -> tuple[Tensor, Tensor]:
    """Memory for weights and slopes, (E, H) float32 each."""
    return problem.new_wide(2, problem.graph.dst_edge.shape[0], problem.heads).unbind()


def new_edge_parts(problem: Problem, slopes: Tensor) -> Tensor:
    """Memory for drel by parts of the edges, (P, H, R) float32."""
    parts = min(config.MOST_PARTS, triton.cdiv(slopes.shape[0], config.SUMMED_EDGES))
    return slopes.new_empty(parts, problem.heads, problem.relations)


def _edges_arguments(problem: Problem) -> dict[str, Any]:
    graph: EdgeLists = problem.graph
    widest = padded_width(max(problem.depth, problem.width))
    return {
        **problem.arguments(),
        "start_ptr": graph.dst_start,
        "source_ptr": graph.dst_source,
        "relation_ptr": graph.dst_relation,
        "edge_ptr": graph.dst_edge,
        "count_ptr": graph.dst_count,
        "WITHIN": problem.within,
        "BLOCK_E": config.edge_block(widest),
        "num_warps": config.edge_warps(widest),
        "num_stages": 1,
    }
