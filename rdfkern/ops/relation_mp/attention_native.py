"""Relation attention in C++ on the CPU (csrc/cpu/relation_attention_*.cpp)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backends import jit
from ..._backends.dispatch import Arguments
from . import attention_op
from .bands import EdgeLists
from .windows import Windows, too_many_rows

relation_attention = partial(attention_op.relation_attention, impl="cpu")
relation_dot_attention = partial(attention_op.relation_dot_attention, impl="cpu")
relation_gat = partial(attention_op.relation_gat, impl="cpu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LANES = 16


def can_run(arguments: Arguments | None) -> str | None:
    """Why these kernels cannot run, or None; the first question about real inputs builds them."""
    if arguments is None:
        return jit.unavailable("cpu", build=False)
    value, graph = arguments["value"], arguments["graph"]
    if value.device.type != "cpu":
        return f"inputs are on {value.device.type}"
    if value.dtype not in DTYPES:
        return f"computes in float32, inputs are {value.dtype}"
    if graph.is_implicit and (reason := too_many_rows(graph)):
        return reason
    return jit.unavailable("cpu", build=True)


def takes_vectors(graph: Windows | EdgeLists) -> bool:
    """Whether logits that are products with the values need not be made beforehand."""
    return isinstance(graph, Windows)


def forward(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: Windows | EdgeLists,
    *,
    of_values: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, softmax), as `attention_op` says."""
    kept = attention_op.keeps_softmax("cpu", len(graph), options["within"])
    out, softmax = attention_op.empty_outputs(value, value if of_values else dst, kept)
    numbers = _numbers(**options)
    jit.load("cpu")
    if isinstance(graph, EdgeLists):
        torch.ops.rdfkern._relation_attention_edges_fwd_cpu(
            *_edge_inputs(value, dst, src, rel, graph), *numbers, out
        )
        return out, softmax
    moved = graph.order.numel() > 0
    if moved:
        value = graph.rows(value)
        if not of_values:
            dst, src = graph.rows(dst), graph.rows(src)
    inputs = [_read(x) for x in (value, dst, src, rel)]
    torch.ops.rdfkern._relation_attention_fwd_cpu.default(
        *inputs, *graph[1:], of_values, *numbers, out, softmax
    )
    if moved:
        return graph.nodes(out), softmax
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
    *,
    of_values: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """(dvalue, ddst, dsrc, drel), as `attention_op` says; always deterministic."""
    numbers = _numbers(**options)
    dtype = value.dtype
    gradients = [
        torch.empty_like(
            x,
            dtype=dtype if x.dim() == 3 else torch.float32,
            memory_format=torch.contiguous_format,
        )
        for x in (value, dst, src, rel)
    ]
    jit.load("cpu")
    if isinstance(graph, EdgeLists):
        per_edge = [
            value.new_empty((graph.dst_edge.shape[0], value.shape[1]), dtype=torch.float32)
            for _ in range(2)
        ]
        torch.ops.rdfkern._relation_attention_edges_bwd_cpu(
            _padded(grad_out),
            *_edge_inputs(value, dst, src, rel, graph),
            *numbers,
            *per_edge,
            *gradients,
        )
        return tuple(_as(dtype, gradient) for gradient in gradients)
    moved = graph.order.numel() > 0
    if moved:
        grad_out, value, out = (graph.rows(x) for x in (grad_out, value, out))
        if not of_values:
            dst, src = graph.rows(dst), graph.rows(src)
    torch.ops.rdfkern._relation_attention_bwd_cpu.default(
        _read(grad_out),
        _read(value),
        _read(dst),
        _read(src),
        _read(rel),
        *graph[1:],
        of_values,
        *numbers,
        out,
        softmax,
        *gradients,
    )
    if dtype != torch.float32:
        gradients = [_as(dtype, gradient) for gradient in gradients]
    if moved:
        dvalue, ddst, dsrc, drel = gradients
        if not of_values:
            ddst, dsrc = graph.nodes(ddst), graph.nodes(dsrc)
        return graph.nodes(dvalue), ddst, dsrc, drel
    return tuple(gradients)


def _read(x: Tensor) -> Tensor:
    """(N, H) logits in float32; (N, H, C) rows whose elements follow each other."""
    if x.dim() == 2:
        return _as(torch.float32, x)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    # A call of `to` that changes nothing takes as long as the kernel does on a few rows.
    return x if x.dtype == dtype else x.to(dtype)


def _padded(x: Tensor) -> Tensor:
    """(N, H) logits in float32; (N, H, C) rows as well, with C rounded up to whole vectors."""
    x = x.to(torch.float32)
    if x.dim() == 2:
        return x
    missing = -x.shape[2] % LANES
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def _edge_inputs(
    value: Tensor, dst: Tensor, src: Tensor, rel: Tensor, graph: EdgeLists
) -> tuple[Any, ...]:
    lists = [
        graph.dst_start,
        graph.dst_source,
        graph.dst_relation,
        graph.dst_edge,
        graph.src_start,
        graph.src_target,
        graph.src_edge,
    ]
    depth = dst.shape[2] if dst.dim() == 3 else 0
    return lists, *(_padded(x) for x in (value, dst, src, rel)), value.shape[2], depth


def _numbers(
    *, seed: int | None, scale: float, negative_slope: float, within: bool, dropout_p: float
) -> tuple[Any, ...]:
    return scale, negative_slope, within, dropout_p, seed or 0
