"""Relation attention in plain CUDA C++ (csrc/cuda/relation_*), where Triton cannot run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._backends import jit
from ..._backends.dispatch import Arguments
from . import attention_op
from .bands import EdgeLists
from .windows import Windows, too_many_rows

relation_attention = partial(attention_op.relation_attention, impl="cuda")
relation_dot_attention = partial(attention_op.relation_dot_attention, impl="cuda")
relation_gat = partial(attention_op.relation_gat, impl="cuda")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Partial sums of drel: parts that keep any device busy, and what they may take. They do not depend
# on the device at hand, nor does any result.
_CHUNKS = 1024
_PARTIAL_ELEMENTS = 2**22


def can_run(arguments: Arguments | None) -> str | None:
    """Why these kernels cannot run, or None; the first question about real inputs builds them."""
    if arguments is None:
        return jit.unavailable("cuda", build=False)
    value, graph = arguments["value"], arguments["graph"]
    if value.device.type != "cuda":
        return f"inputs are on {value.device.type}"
    if value.dtype not in DTYPES:
        return f"computes in float32, inputs are {value.dtype}"
    if graph.is_implicit and (reason := too_many_rows(graph)):
        return reason
    return jit.unavailable("cuda", build=True)


def forward(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: Windows | EdgeLists,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, softmax), as `attention_op` says."""
    out, softmax = attention_op.empty_outputs(value, dst, kept=False)
    numbers = _numbers(**options)
    jit.load("cuda")
    if isinstance(graph, EdgeLists):
        inputs = [_unit_stride(x) for x in (value, dst, src, rel)]
        torch.ops.rdfkern._relation_attention_edges_fwd_cuda(
            *inputs, *_by_target(graph), *numbers, out
        )
        return out, softmax
    inputs = [_unit_stride(x) for x in (*(graph.rows(x) for x in (value, dst, src)), rel)]
    torch.ops.rdfkern._relation_attention_windows_fwd_cuda(*inputs, *graph[1:], *numbers, out)
    return graph.nodes(out), softmax


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
) -> tuple[Tensor, ...]:
    """(dvalue, ddst, dsrc, drel), as `attention_op` says; always deterministic.

    Every softmax takes three numbers for each head: one softmax per target across relations; within
    them, one per (target, relation) of an implicit graph and one per edge of an explicit one.
    """
    numbers = _numbers(**options)
    gradients = [x.new_empty(x.shape) for x in (value, dst, src)]
    relations, heads = rel.shape
    softmaxes = dst.shape[0]
    if options["within"]:
        explicit = isinstance(graph, EdgeLists)
        softmaxes = graph.dst_edge.shape[0] if explicit else softmaxes * relations
    softmax = value.new_empty((3, softmaxes, heads), dtype=torch.float32)
    chunks = max(1, min(_CHUNKS, dst.shape[0], _PARTIAL_ELEMENTS // (relations * heads)))
    drel = value.new_zeros((chunks, relations, heads), dtype=torch.float32)
    filled = (softmax, *gradients, drel)
    jit.load("cuda")
    if isinstance(graph, EdgeLists):
        inputs = [_unit_stride(x) for x in (grad_out, value, dst, src, rel)]
        by_source = (graph.src_start, graph.src_target, graph.src_relation, graph.src_edge)
        torch.ops.rdfkern._relation_attention_edges_bwd_cuda(
            *inputs, *_by_target(graph), *by_source, *numbers, *filled
        )
    else:
        of_rows = (graph.rows(x) for x in (grad_out, value, dst, src))
        inputs = [_unit_stride(x) for x in (*of_rows, rel)]
        torch.ops.rdfkern._relation_attention_windows_bwd_cuda(
            *inputs, *graph[1:], *numbers, *filled
        )
        gradients = [graph.nodes(gradient) for gradient in gradients]
    return *gradients, drel.sum(0).to(rel.dtype)


def _by_target(graph: EdgeLists) -> tuple[Tensor, ...]:
    return graph.dst_start, graph.dst_source, graph.dst_relation, graph.dst_edge


def _unit_stride(x: Tensor) -> Tensor:
    """Logits (N, H) of any strides; (N, H, C) rows whose elements follow each other."""
    return x if x.dim() == 2 or x.stride(2) == 1 else x.contiguous()


def _numbers(
    *, seed: int | None, scale: float, negative_slope: float, within: bool, dropout_p: float
) -> tuple[Any, ...]:
    return scale, negative_slope, within, dropout_p, seed or 0
