"""Relation convolution in C++ on the CPU (csrc/cpu/relation_conv_*.cpp)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._backends import jit
from ..._backends.dispatch import Arguments
from . import conv_op
from .bands import Bands, EdgeLists

relation_conv = partial(conv_op.relation_conv, impl="cpu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_AGGREGATIONS = ("sum", "mean", "max")  # as the C++ numbers them


def can_run(arguments: Arguments | None) -> str | None:
    """Why these kernels cannot run, or None; the first question about real inputs builds them."""
    if arguments is None:
        return jit.unavailable("cpu", build=False)
    x = arguments["x_src"]
    if x.device.type != "cpu":
        return f"inputs are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"computes in float32, inputs are {x.dtype}"
    return jit.unavailable("cpu", build=True)


def forward(
    x: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    edge_weight: Tensor | None,
    graph: Bands | EdgeLists,
    past: int,
    future: int,
    aggr: str,
    num_dst: int,
    *,
    root: Tensor | None = None,
) -> Tensor:
    """See conv_op."""
    out = x.new_empty((num_dst, conv_op.width_out(weight)))
    inputs = (_unit_stride(x), _matrices(weight), _matrices(root), _unit_stride(addend))
    aggregation = _AGGREGATIONS.index(aggr)
    jit.load("cpu")
    if isinstance(graph, Bands):
        torch.ops.rdfkern._relation_conv_bands_fwd_cpu.default(
            *inputs, *_contiguous(graph), past, future, aggregation, out
        )
    else:
        torch.ops.rdfkern._relation_conv_edges_fwd_cpu.default(
            *inputs, edge_weight, *graph, aggregation, out
        )
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    edge_weight: Tensor | None,
    graph: Bands | EdgeLists,
    past: int,
    future: int,
    aggr: str,
    needs: tuple[bool, bool, bool],
    *,
    root: Tensor | None = None,
    needs_root: bool = False,
    needs_bias: bool = False,
) -> tuple[Tensor | None, ...]:
    """See conv_op."""
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = weight.new_empty(weight.shape) if needs[1] else None
    droot = root.new_empty(root.shape) if needs_root else None
    dbias = torch.empty(grad_out.shape[1:]) if needs_bias else None
    wide_dedge = torch.empty(edge_weight.shape) if needs[2] else None
    inputs = (_unit_stride(grad_out), _unit_stride(x), _matrices(weight), _matrices(root))
    filled = (dx, dweight, droot, dbias)
    aggregation = _AGGREGATIONS.index(aggr)
    jit.load("cpu")
    if isinstance(graph, Bands):
        torch.ops.rdfkern._relation_conv_bands_bwd_cpu.default(
            *inputs, *_contiguous(graph), past, future, aggregation, *filled
        )
    else:
        torch.ops.rdfkern._relation_conv_edges_bwd_cpu.default(
            *inputs, edge_weight, *graph, aggregation, *filled, wide_dedge
        )
    return dx, dweight, None if wide_dedge is None else wide_dedge.to(x.dtype), droot, dbias


def _contiguous(graph: Bands) -> tuple[Tensor, ...]:
    tensors = (graph.order, graph.position, graph.start, graph.table)
    return tuple(tensor.contiguous() for tensor in tensors)


def _matrices(weight: Tensor | None) -> Tensor | None:
    """In float32, with rows of unit strides."""
    if weight is not None and weight.dtype != torch.float32:
        weight = weight.float()
    return _unit_stride(weight)


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
