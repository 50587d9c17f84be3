"""Relation convolution in plain CUDA C++ (csrc/cuda/relation_*), where Triton cannot run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._backends import jit
from ..._backends.dispatch import Arguments
from . import conv_op
from .bands import Bands, EdgeLists

relation_conv = partial(conv_op.relation_conv, impl="cuda")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_AGGREGATIONS = ("sum", "mean", "max")  # as the C++ numbers them
_TILE_ROWS = 32  # rows and widths that one block of threads has in relation_conv.cuh
_SIDE = 64
# Enough blocks for any device. It does not depend on the one at hand, nor does any result.
_BLOCKS = 1024
# What gradients keep of the maxima of some relations at a time; of one relation it may be more.
_KEPT_ELEMENTS = 2**24


def can_run(arguments: Arguments | None) -> str | None:
    """Why these kernels cannot run, or None; the first question about real inputs builds them."""
    if arguments is None:
        return jit.unavailable("cuda", build=False)
    x = arguments["x_src"]
    if x.device.type != "cuda":
        return f"inputs are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"computes in float32, inputs are {x.dtype}"
    return jit.unavailable("cuda", build=True)


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
) -> Tensor:
    """See conv_op."""
    out = x.new_empty((num_dst, conv_op.width_out(weight)))
    addend = None if addend is None else _unit_stride(addend)
    inputs = (_unit_stride(x), _unit_stride(_as_blocks(weight)), addend)
    aggregated = (_AGGREGATIONS.index(aggr), out)
    jit.load("cuda")
    if isinstance(graph, Bands):
        view = (*_sorted_bands(graph, transposed=False), past, future)
        torch.ops.rdfkern._relation_conv_bands_cuda(*inputs, *view, None, *aggregated)
    else:
        view = (*_by_target(graph), edge_weight, False)
        torch.ops.rdfkern._relation_conv_edges_cuda(*inputs, *view, *aggregated)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See conv_op. The same bits every time.

    Beside the gradients, a mean over an implicit graph takes N * 3 K floats for dx, K keys. A
    maximum takes two floats for each target, feature and one of as many relations as _KEPT_ELEMENTS
    allows, at least one.
    """
    grad_out, x, blocks = _unit_stride(grad_out), _unit_stride(x), _as_blocks(weight)
    transposed = None
    if needs[0] or needs[2]:
        transposed = blocks.transpose(2, 3).contiguous()  # [R, NB, out/NB, in/NB]
    jit.load("cuda")
    if isinstance(graph, Bands):
        targets = (*_sorted_bands(graph, transposed=False), past, future)
    else:
        targets = _by_target(graph)
    dx = dweight = dedge = None
    if aggr == "max" and transposed is not None:
        dx, dedge = _through_maxima(
            grad_out, x, transposed, edge_weight, graph, past, future, needs
        )
    else:
        if needs[0]:
            dx = _through_sums(grad_out, transposed, edge_weight, graph, targets, aggr == "mean")
        if needs[2]:
            dedge = x.new_empty(edge_weight.shape, dtype=torch.float32)
            arguments = (x, grad_out, transposed, *targets, aggr == "mean", dedge)
            torch.ops.rdfkern._relation_conv_dedge_cuda(*arguments)
    if needs[1]:
        chunks = _chunks(blocks, grad_out.shape[0])
        partials = x.new_empty((chunks, *blocks.shape), dtype=torch.float32)
        arguments = (_AGGREGATIONS.index(aggr), partials)
        kernels = torch.ops.rdfkern
        if isinstance(graph, Bands):
            kernels._relation_conv_bands_dweight_cuda(x, grad_out, *targets, *arguments)
        else:
            arguments = (edge_weight, *arguments)
            kernels._relation_conv_edges_dweight_cuda(x, grad_out, *targets, *arguments)
        dweight = partials.sum(0).to(weight.dtype).view(weight.shape)
    dx, dedge = (None if g is None else g.to(x.dtype) for g in (dx, dedge))
    return dx, dweight, dedge


def _through_sums(
    grad_out: Tensor,
    transposed: Tensor,
    edge_weight: Tensor | None,
    graph: Bands | EdgeLists,
    targets: tuple[Any, ...],
    mean: bool,
) -> Tensor:
    """dx of sums and means: a convolution of the gradient, from the targets to the sources."""
    _, blocks, _, width_in = transposed.shape
    inputs, a_sum = (grad_out, transposed, None), _AGGREGATIONS.index("sum")
    if isinstance(graph, Bands):
        dx = grad_out.new_empty((graph.order.shape[0], blocks * width_in))
        inverse = None
        if mean:
            inverse = dx.new_empty((dx.shape[0], 3 * graph.table.shape[0]), dtype=torch.float32)
            torch.ops.rdfkern._relation_conv_inverse_counts_cuda(*targets, inverse)
        *_, past, future = targets
        view = (*_sorted_bands(graph, transposed=True), future, past, inverse)
        torch.ops.rdfkern._relation_conv_bands_cuda(*inputs, *view, a_sum, dx)
        return dx
    dx = grad_out.new_empty((graph.src_start.shape[0] - 1, blocks * width_in))
    view = (*_by_source(graph), edge_weight, mean)
    torch.ops.rdfkern._relation_conv_edges_cuda(*inputs, *view, a_sum, dx)
    return dx


def _through_maxima(
    grad_out: Tensor,
    x: Tensor,
    transposed: Tensor,
    edge_weight: Tensor | None,
    graph: Bands | EdgeLists,
    past: int,
    future: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dedge_weight of maxima, float32; some relations at a time, in their order."""
    relations, targets, width = transposed.shape[0], grad_out.shape[0], x.shape[1]
    together = max(1, min(relations, _KEPT_ELEMENTS // (2 * targets * width)))
    kept = x.new_empty((2, together, targets, width), dtype=torch.float32)
    dx = x.new_empty(x.shape, dtype=torch.float32) if needs[0] else None
    dedge = x.new_empty(edge_weight.shape, dtype=torch.float32) if needs[2] else None
    inputs = (x, grad_out, transposed)
    if isinstance(graph, Bands):
        heard = _sorted_bands(graph, transposed=True)[-2:]
        views = (*_sorted_bands(graph, transposed=False), *heard, past, future)
        for first in range(0, relations, together):
            torch.ops.rdfkern._relation_conv_bands_maxima_cuda(*inputs, *views, first, kept, dx)
    else:
        views = (*_by_target(graph), *_by_source(graph), edge_weight)
        for first in range(0, relations, together):
            arguments = (*views, first, kept, dx, dedge)
            torch.ops.rdfkern._relation_conv_edges_maxima_cuda(*inputs, *arguments)
    return dx, dedge


def _sorted_bands(graph: Bands, *, transposed: bool) -> tuple[Tensor, ...]:
    """order, position, group, start, and every key's bands by relation: relations and entries.

    An entry is (other key) * 3 + direction; relations and entries: (K, 3 K) int32.
    """
    table = graph.table.transpose(0, 1).flip(2) if transposed else graph.table
    relations, entries = torch.sort(table.flatten(1), dim=1, stable=True)
    rows = (graph.order, graph.position, graph.group, graph.start)
    tensors = (*rows, relations, entries.to(torch.int32))
    return tuple(tensor.contiguous() for tensor in tensors)


def _by_target(graph: EdgeLists) -> tuple[Tensor, ...]:
    return (
        graph.dst_start,
        graph.dst_source,
        graph.dst_relation,
        graph.dst_edge,
        graph.dst_count,
    )


def _by_source(graph: EdgeLists) -> tuple[Tensor, ...]:
    return (
        graph.src_start,
        graph.src_target,
        graph.src_relation,
        graph.src_edge,
        graph.src_count,
    )


def _chunks(blocks: Tensor, num_dst: int) -> int:
    """How many partial sums of the weight's gradient are taken; from shapes only."""
    relations, parts, width_in, width_out = blocks.shape
    squares = relations * parts * -(-width_in // _SIDE) * -(-width_out // _SIDE)
    return max(1, min(-(-num_dst // _TILE_ROWS), _BLOCKS // squares))


def _as_blocks(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, None]


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
