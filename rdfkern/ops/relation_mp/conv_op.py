"""Relation convolution as registered operators, one per direction, and their autograd function.

`rdfkern::relation_conv_fwd` and `rdfkern::relation_conv_bwd` are what torch.compile and
torch.export see. They choose the kernel inside, by name. A kernel module holds `forward` and
`backward` with the arguments below, and never sees an empty problem: N_src, N_dst, in, out and R
are at least 1 (there may still be no edges).

    forward(x, weight, addend, edge_weight, graph, past, future, aggr, num_dst) -> out
        out_i = addend_i + sum over relations r of AGG_{e = (j -> i) of r} (w_e x_j) · W_r

    x: (N_src, in) float16, bfloat16, float32 (float64 if the kernel's predicate lets it in), any
        strides.
    weight: (R, in, out), or (R, NB, in/NB, out/NB) with NB diagonal blocks; x's dtype or float32,
        any strides (0 included). Basis weights arrive combined: R · B · in · out operations, few
        beside those of the nodes; their gradients are torch's.
    addend: None, or (N_dst, out) in x's dtype or float32, any strides: x_dst · root + bias, which
        torch multiplies, or only the bias where there is no root or the kernel multiplies by it.
        It joins the sum before the one rounding to x's dtype. The operators take a bias as it is,
        (out,).
    edge_weight: None, or (E,) in x's dtype in the edges' own numbering; explicit graphs only.
    graph: `Bands` or `EdgeLists` (see bands.py).
    past, future: of implicit graphs, `UNLIMITED` without bound.
    aggr: `sum`, `mean` (over the edges of r at i) or `max` (elementwise over them, 0 without any).
    out: (N_dst, out) contiguous, of x's dtype; sums are float32 (float64) inside.

    backward(grad_out, x, weight, edge_weight, graph, past, future, aggr, needs) ->
        (dx, dweight, dedge_weight), each None where needs (three booleans) does not ask for it.

    grad_out: (N_dst, out) of x's dtype, any strides. dx and dedge_weight have the dtype of x and
        dweight that of weight; all contiguous. Under `max`, the edges that tie for an element
        share its gradient evenly. Relations without edges get zeros.
        Bitwise reproducible without exception: no atomic additions.

Kernels of `WITH_ROOT` also take `root=`, None or float32 (in, out) of any strides, in both
directions: out_i gets x_i · root, which saves passes over rows and memory. Their backward takes
`needs_root=` and `needs_bias=` and returns, float32 or None, droot and the sum of the rows of
grad_out as a fourth and a fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..._backends.autograd import is_recorded, record
from ..._backends.dispatch import kernel_module
from . import bands
from .bands import EXPLICIT, Bands, EdgeLists
from .graph import RelationGraph

KERNELS = {
    "cpu": ".conv_native",
    "triton": ".conv_triton",
    "cuda": ".conv_cuda",
}

# They get a root with weights in one block, sums or means, and targets that are the sources.
WITH_ROOT = ("cpu",)

_GRAPH = "Tensor[] graph, int past, int future, str aggr"
torch.library.define(
    "rdfkern::relation_conv_fwd",
    "(Tensor x, Tensor weight, Tensor? root, Tensor? addend, Tensor? edge_weight, "
    f"{_GRAPH}, SymInt num_dst, str impl) -> Tensor",
)
torch.library.define(
    "rdfkern::relation_conv_bwd",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? root, Tensor? edge_weight, "
    f"{_GRAPH}, bool[] needs, str impl) -> "
    "(Tensor dx, Tensor dweight, Tensor droot, Tensor dbias, Tensor dedge_weight)",
)


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
    *,
    impl: str,
) -> Tensor:
    """The canonical arguments of `relation_conv`, computed by the kernel named `impl`."""
    if coefficients is not None:
        bases = _wide(weight).flatten(1)  # [B, in * out]
        weight = (_wide(coefficients) @ bases).unflatten(1, weight.shape[1:])
    addend = None if bias is None else _wide(bias)
    root = None if root_weight is None else _wide(root_weight)
    kernel_has_root = impl in WITH_ROOT and x_dst is x_src and weight.dim() == 3 and aggr != "max"
    if root is not None and not kernel_has_root:
        heard = _wide(x_dst) @ root
        addend, root = heard if addend is None else heard + addend, None
    tensors, *window = bands.layout(graph)
    options = (*window, aggr, graph.num_dst, impl)
    inputs = (x_src, weight, root, addend, edge_weight)
    if not is_recorded(*inputs):
        return torch.ops.rdfkern.relation_conv_fwd.default(*inputs, list(tensors), *options)
    return record(_RelationConv, *inputs, options, *tensors)


class _RelationConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        root: Tensor | None,
        addend: Tensor | None,
        edge_weight: Tensor | None,
        options: tuple[int, int, str, int, str],
        *graph: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, root, edge_weight, *graph)
        ctx.options = options
        ctx.has_bias = addend is not None and addend.dim() == 1
        ctx.addend_dtype = None if addend is None else addend.dtype
        return torch.ops.rdfkern.relation_conv_fwd.default(
            x, weight, root, addend, edge_weight, list(graph), *options
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight, root, edge_weight, *graph = ctx.saved_tensors
        past, future, aggr, _, impl = ctx.options
        needs = list(ctx.needs_input_grad[:5])
        of_addend = needs[3]
        needs[3] = of_addend and ctx.has_bias
        gradients: list[Tensor | None] = [None] * 5
        if any(needs):
            results = torch.ops.rdfkern.relation_conv_bwd.default(
                grad_out, x, weight, root, edge_weight, graph, past, future, aggr, needs, impl
            )
            gradients = [g if need else None for g, need in zip(results, needs, strict=True)]
        if of_addend and not ctx.has_bias:
            gradients[3] = grad_out.to(ctx.addend_dtype)
        return *gradients, *(None,) * (1 + len(graph))


@torch.library.impl("rdfkern::relation_conv_fwd", ("cpu", "cuda"))
def _forward(
    x: Tensor,
    weight: Tensor,
    root: Tensor | None,
    addend: Tensor | None,
    edge_weight: Tensor | None,
    graph: Sequence[Tensor],
    past: int,
    future: int,
    aggr: str,
    num_dst: int,
    impl: str,
) -> Tensor:
    if not (x.numel() and weight.numel() and num_dst):
        out = x.new_zeros((num_dst, width_out(weight)))
        heard = addend if root is None else _wide(x) @ root + (0.0 if addend is None else addend)
        return out if heard is None else out.copy_(heard)
    options = {"root": root} if impl in WITH_ROOT else {}
    graph = _named(graph, past)
    if addend is not None:
        addend = addend.expand(num_dst, -1)
    return _kernels(impl).forward(
        x, weight, addend, edge_weight, graph, past, future, aggr, num_dst, **options
    )


@torch.library.impl("rdfkern::relation_conv_bwd", ("cpu", "cuda"))
def _backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    root: Tensor | None,
    edge_weight: Tensor | None,
    graph: Sequence[Tensor],
    past: int,
    future: int,
    aggr: str,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    for_x, for_weight, for_root, for_bias, for_edges = needs
    if not (x.numel() and weight.numel() and grad_out.numel()):
        arguments = (graph, past, future, aggr, needs, impl)
        empty = _fake_backward(grad_out, x, weight, root, edge_weight, *arguments)
        gradients = tuple(gradient.zero_() for gradient in empty)
        if root is not None and for_x:
            gradients[0].copy_(_wide(grad_out) @ root.mT)
        if for_root:
            gradients[2].copy_(_wide(x).mT @ _wide(grad_out))
        if for_bias:
            gradients[3].copy_(_wide(grad_out).sum(0))
        return gradients
    inputs = (grad_out, x, weight, edge_weight, _named(graph, past), past, future, aggr)
    options = {}
    if impl in WITH_ROOT:
        options = {"root": root, "needs_root": for_root, "needs_bias": for_bias}
    dx, dweight, dedge_weight, *of_rows = _kernels(impl).backward(
        *inputs, (for_x, for_weight, for_edges), **options
    )
    droot, dbias = of_rows or (None, _wide(grad_out).sum(0) if for_bias else None)
    gradients = (dx, dweight, droot, dbias, dedge_weight)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("rdfkern::relation_conv_fwd")
def _fake_forward(
    x: Tensor,
    weight: Tensor,
    root: Tensor | None,
    addend: Tensor | None,
    edge_weight: Tensor | None,
    graph: Sequence[Tensor],
    past: int,
    future: int,
    aggr: str,
    num_dst: int,
    impl: str,
) -> Tensor:
    return x.new_empty((num_dst, width_out(weight)))


@torch.library.register_fake("rdfkern::relation_conv_bwd")
def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    root: Tensor | None,
    edge_weight: Tensor | None,
    graph: Sequence[Tensor],
    past: int,
    future: int,
    aggr: str,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    inputs = (x, weight, root, _wide(grad_out.new_empty(grad_out.shape[1:])), edge_weight)
    return tuple(
        tensor.new_empty(tensor.shape) if need else x.new_empty(0)
        for tensor, need in zip(inputs, needs, strict=True)
    )


def width_out(weight: Tensor) -> int:
    """Output width of weight (R, in, out) or (R, NB, in/NB, out/NB)."""
    return weight.shape[2] if weight.dim() == 3 else weight.shape[1] * weight.shape[3]


def _named(graph: Sequence[Tensor], past: int) -> Bands | EdgeLists:
    return EdgeLists(*graph) if past == EXPLICIT else Bands(*graph)


def _kernels(impl: str) -> Any:
    return kernel_module(KERNELS[impl], __package__)


def _wide(tensor: Tensor) -> Tensor:
    """Half types in float32, so that what the kernel adds up is rounded once."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
