"""Relation attention whose logits are products with the values, around the operators of the rest.

One autograd function for both: half of a small layer's time would otherwise be the bookkeeping of
the products and of their sums of gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..._backends.autocast import without_autocast
from .attention_op import graph_tensors, new_seed
from .graph import RelationGraph


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
    options = (1.0, negative_slope, softmax == "within", dropout_p, impl)
    return _RelationGat.apply(
        value, att_dst, att_src, logit_rel, new_seed(dropout_p), options, *graph_tensors(graph)
    )


class _RelationGat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        value: Tensor,
        att_dst: Tensor,
        att_src: Tensor,
        rel: Tensor,
        seed: Tensor | None,
        options: tuple[Any, ...],
        *graph: Tensor,
    ) -> Tensor:
        att = torch.stack((att_dst, att_src), dim=1)  # [H, 2, C]
        logits = torch.bmm(att, value.permute(1, 2, 0))  # [H, 2, N]
        dst, src = logits.permute(1, 2, 0).unbind(0)  # [N, H]
        out, lse = torch.ops.rdfkern.relation_attn_fwd(
            value, dst, src, rel, list(graph), seed, *options
        )
        ctx.save_for_backward(value, dst, src, rel, out, lse, att, seed, *graph)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, dst, src, rel, out, lse, att, seed, *graph = ctx.saved_tensors
        dvalue, ddst, dsrc, drel = torch.ops.rdfkern.relation_attn_bwd(
            grad_out, value, dst, src, rel, out, lse, graph, seed, *ctx.options
        )
        with without_autocast(value.device.type):
            to_logits = torch.stack((ddst.t(), dsrc.t()), dim=1)  # [H, 2, N]
            datt = torch.bmm(to_logits, value.transpose(0, 1))  # [H, 2, C]
            if torch.compiler.is_compiling():  # which loses the strides of an update in place
                dvalue = dvalue + torch.bmm(to_logits.transpose(1, 2), att).transpose(0, 1)
            else:
                dvalue.transpose(0, 1).baddbmm_(to_logits.transpose(1, 2), att)
        return dvalue, *datt.unbind(1), drel, None, None, *(None,) * len(graph)
