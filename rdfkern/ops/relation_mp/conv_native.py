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
    addend = None if addend is None else _unit_stride(addend)
    inputs = (_unit_stride(x), _blocks(weight), _root_block(root), addend)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See conv_op."""
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = weight.new_empty(weight.shape) if needs[1] else None
    droot = root.new_empty(root.shape) if needs_root else None
    wide_dedge = torch.empty(edge_weight.shape) if needs[2] else None
    inputs = (_unit_stride(grad_out), _unit_stride(x), _blocks(weight), _root_block(root))
    filled = (dx, None if dweight is None else _as_blocks(dweight), droot)
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
    return dx, dweight, None if wide_dedge is None else wide_dedge.to(x.dtype), droot


def _contiguous(graph: Bands) -> tuple[Tensor, ...]:
    tensors = (graph.order, graph.position, graph.start, graph.table)
    return tuple(tensor.contiguous() for tensor in tensors)


def _blocks(weight: Tensor) -> Tensor:
    """(R, NB, in/NB, out/NB) float32 whose rows have unit strides."""
    return _unit_stride(_as_blocks(weight).to(torch.float32))


def _root_block(root: Tensor | None) -> Tensor | None:
    return None if root is None else _unit_stride(root)[None, None]


def _as_blocks(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, None]


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
