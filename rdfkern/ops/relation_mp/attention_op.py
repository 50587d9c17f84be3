"""Relation attention as registered operators, one per direction, and their autograd function.

`rdfkern::relation_attn_fwd` and `rdfkern::relation_attn_bwd` are what torch.compile and
torch.export see. They choose the kernel inside, by name. A kernel module holds `forward` and
`backward` with the arguments below, and never sees an empty problem: N_src, N_dst, H, C and R are
at least 1 (there may still be no edges).

    forward(value, dst, src, rel, graph, *, seed, scale, negative_slope, within, dropout_p)
        -> (out, softmax)

    value: (N_src, H, C).
    dst, src: (N_dst, H) and (N_src, H), the additive form: the logit of edge e = (j -> i) is
        LeakyReLU(dst_i + src_j + rel_r) with `negative_slope`, and `scale` is 1. Or (N_dst, H, D)
        and (N_src, H, D), the dot form: scale * dst_i . src_j + rel_r, and `negative_slope` is 1.
        A module whose `takes_vectors(graph)` is true gets the vectors of the operators'
        `of_values` too, (H, C) each, and `of_values=True`: the logits are then value_i . dst and
        value_j . src, and N_src == N_dst.
    rel: (R, H).
        All of one dtype (float16, bfloat16, float32; float64 if the kernel's predicate lets it
        in), any strides.
    graph: `Windows` of an implicit graph, where N_src == N_dst (windows.py), or `EdgeLists` of an
        explicit one (bands.py). Both stand in rows and edges of their own order; all other tensors
        here in that of the nodes.
    within: softmax over the edges of one relation into a target, not over all edges into it.
    seed: None without dropout, else a number. Each weight is zeroed with probability dropout_p,
        else scaled by 1 / (1 - dropout_p), as a function of (seed, head, target and source, or
        number of the edge) alone, so that backward can draw it again.
    out: (N_dst, H, C) contiguous, of value's dtype; softmax and sums are float32 (float64) inside.
        A softmax without edges, or of -inf only, gives 0.
    softmax: (2, N_dst, H) float32 (float64), what makes weights of a target's logits again: what
        is subtracted from them, and a factor. (0,) where backward makes it anew: under `within`, on
        lists of edges, and in a module that is not in KEEPS_SOFTMAX.

    backward(grad_out, value, dst, src, rel, out, softmax, graph, *, <the same>)
        -> (dvalue, ddst, dsrc, drel)

    grad_out: (N_dst, H, C) of value's dtype, any strides. The gradients are contiguous and have
        shape and dtype of what they belong to. The LeakyReLU's slope at 0 is `negative_slope`.
        Bitwise reproducible without exception: no atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..._backends.autograd import is_recorded, record
from ..._backends.dispatch import kernel_module
from . import attention_gat, bands
from .bands import EdgeLists
from .graph import RelationGraph
from .windows import Windows, windows

KERNELS = {
    "triton": ".attention_triton",
    "cpu": ".attention_native",
    "cuda": ".attention_cuda",
}
KEEPS_SOFTMAX = ("triton", "cpu")

_INPUTS = "Tensor value, Tensor dst, Tensor src, Tensor rel"
_OPTIONS = (
    "Tensor[] graph, Tensor? seed, float scale, float negative_slope, bool within, "
    "bool of_values, float dropout_p, str impl"
)
torch.library.define(
    "rdfkern::relation_attn_fwd", f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor softmax)"
)
torch.library.define(
    "rdfkern::relation_attn_bwd",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor softmax, {_OPTIONS}) -> "
    "(Tensor dvalue, Tensor ddst, Tensor dsrc, Tensor drel)",
)


def relation_attention(
    value: Tensor,
    logit_dst: Tensor,
    logit_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    negative_slope: float,
    softmax: str,
    dropout_p: float,
    *,
    impl: str,
) -> Tensor:
    """The canonical arguments of `relation_attention`, computed by the kernel named `impl`."""
    options = (1.0, negative_slope, softmax == "within", False, dropout_p, impl)
    return _attend(value, logit_dst, logit_src, logit_rel, graph, options)


def relation_gat(
    value: Tensor,
    att_dst: Tensor,
    att_src: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    negative_slope: float,
    softmax: str,
    dropout_p: float,
    *,
    impl: str,
) -> Tensor:
    """The canonical arguments of `relation_gat`, computed by the kernel named `impl`."""
    options = (1.0, negative_slope, softmax == "within", True, dropout_p, impl)
    return _attend(value, att_dst, att_src, logit_rel, graph, options)


def relation_dot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit_rel: Tensor,
    graph: RelationGraph,
    scale: float,
    softmax: str,
    dropout_p: float,
    *,
    impl: str,
) -> Tensor:
    """The canonical arguments of `relation_dot_attention`, computed by the kernel named `impl`."""
    options = (scale, 1.0, softmax == "within", False, dropout_p, impl)
    return _attend(value, query, key, logit_rel, graph, options)


def _attend(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: RelationGraph,
    options: tuple[float, float, bool, bool, float, str],
) -> Tensor:
    *_, dropout_p, _ = options
    # A tensor, so that compiled code draws a new one in every call; on the CPU, where reading it
    # does not wait for an accelerator.
    seed = torch.randint(2**62, (), device="cpu") if dropout_p > 0.0 else None
    tensors = windows(graph) if graph.is_implicit else bands.layout(graph).tensors
    if not is_recorded(value, dst, src, rel):
        operator = torch.ops.rdfkern.relation_attn_fwd.default
        return operator(value, dst, src, rel, list(tensors), seed, *options)[0]
    return record(_RelationAttention, value, dst, src, rel, seed, options, *tensors)


class _RelationAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        value: Tensor,
        dst: Tensor,
        src: Tensor,
        rel: Tensor,
        seed: Tensor | None,
        options: tuple[Any, ...],
        *graph: Tensor,
    ) -> Tensor:
        out, softmax = torch.ops.rdfkern.relation_attn_fwd.default(
            value, dst, src, rel, list(graph), seed, *options
        )
        ctx.save_for_backward(value, dst, src, rel, out, softmax, seed, *graph)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        *tensors, seed = saved[:7]
        graph = list(saved[7:])
        gradients = torch.ops.rdfkern.relation_attn_bwd.default(
            grad_out, *tensors, graph, seed, *ctx.options
        )
        return *gradients, None, None, *(None,) * len(graph)


@torch.library.impl("rdfkern::relation_attn_fwd", ("cpu", "cuda"))
def _forward(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: Sequence[Tensor],
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    if not (value.numel() and dst.numel() and rel.numel()):
        out, softmax = _fake_forward(value, dst, src, rel, graph, seed, *options)
        return out.zero_(), softmax.zero_()
    layout = _layout(graph)
    kernels, named, of_values = _chosen(layout, seed, *options)
    if of_values:
        dst, src = attention_gat.logits(value, dst, src)
    return kernels.forward(value, dst, src, rel, layout, **named)


@torch.library.impl("rdfkern::relation_attn_bwd", ("cpu", "cuda"))
def _backward(
    grad_out: Tensor,
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    out: Tensor,
    softmax: Tensor,
    graph: Sequence[Tensor],
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    if not (value.numel() and dst.numel() and rel.numel()):
        return tuple(x.new_zeros(x.shape) for x in (value, dst, src, rel))
    layout = _layout(graph)
    kernels, named, of_values = _chosen(layout, seed, *options)
    if not of_values:
        return kernels.backward(grad_out, value, dst, src, rel, out, softmax, layout, **named)
    logits = attention_gat.logits(value, dst, src)
    gradients = kernels.backward(grad_out, value, *logits, rel, out, softmax, layout, **named)
    *of_inputs, drel = gradients
    return *attention_gat.gradients(value, dst, src, *of_inputs), drel


@torch.library.register_fake("rdfkern::relation_attn_fwd")
def _fake_forward(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: Sequence[Tensor],
    seed: Tensor | None,
    scale: float,
    negative_slope: float,
    within: bool,
    of_values: bool,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    kept = keeps_softmax(impl, len(graph), within)
    return empty_outputs(value, value if of_values else dst, kept)


@torch.library.register_fake("rdfkern::relation_attn_bwd")
def _fake_backward(
    grad_out: Tensor, value: Tensor, dst: Tensor, src: Tensor, rel: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, dst, src, rel))


def keeps_softmax(impl: str, tensors: int, within: bool) -> bool:
    """Whether the forward of a module keeps it, on a graph of so many tensors."""
    return impl in KEEPS_SOFTMAX and tensors == len(Windows._fields) and not within


def empty_outputs(value: Tensor, dst: Tensor, kept: bool) -> tuple[Tensor, Tensor]:
    """Memory for (out, softmax); the first dims of `dst` are targets and heads."""
    rows, heads = dst.shape[:2]
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    out = value.new_empty((rows, *value.shape[1:]))
    return out, value.new_empty((2, rows, heads) if kept else (0,), dtype=wide)


def _layout(graph: Sequence[Tensor]) -> Windows | EdgeLists:
    return Windows(*graph) if len(graph) == len(Windows._fields) else EdgeLists(*graph)


def _chosen(
    graph: Windows | EdgeLists,
    seed: Tensor | None,
    scale: float,
    negative_slope: float,
    within: bool,
    of_values: bool,
    dropout_p: float,
    impl: str,
) -> tuple[Any, dict[str, Any], bool]:
    """(kernel module, its options, whether logits of values must be made for it)."""
    kernels = kernel_module(KERNELS[impl], __package__)
    options = {
        "seed": None if seed is None else int(seed),
        "scale": scale,
        "negative_slope": negative_slope,
        "within": within,
        "dropout_p": dropout_p,
    }
    if of_values and hasattr(kernels, "takes_vectors") and kernels.takes_vectors(graph):
        return kernels, options | {"of_values": True}, False
    return kernels, options, of_values
