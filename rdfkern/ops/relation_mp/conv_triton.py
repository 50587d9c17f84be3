"""Relation convolution in Triton: what `conv_op` looks for by name.

Implicit graphs take one launch forward. Back, they take one for dx, one before it for the shares of
a mean, one for dweight and a sum where its rows were split. Nothing is read on the host. Unlimited
windows are summed like others, band by band: quadratic in the length of a dialogue, without memory
that is.

A maximum has no use for tensor cores until it meets its weight. dx and dedge_weight take two
launches for as many relations at a time as `conv_config.MAX_KEPT_BYTES` lets them keep: two numbers
for each relation, target and feature.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._backends.triton_utils import unit_stride
from . import conv_op
from .bands import Bands, EdgeLists
from .conv_triton_launch import (
    BandRule,
    as_blocks,
    bands_launch,
    bands_weight_launch,
    by_source,
    by_target,
    edges_factor_launch,
    edges_launch,
    edges_weight_launch,
    new_parts,
    new_shares,
    shares_launch,
)
from .conv_triton_max_launch import (
    bands_max_launches,
    edges_max_launches,
    new_kept,
    new_products,
)

relation_conv = partial(conv_op.relation_conv, impl="triton")


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
    x, weight = unit_stride(x), as_blocks(weight)
    out = x.new_empty((num_dst, conv_op.width_out(weight)))
    if isinstance(graph, Bands):
        rule = BandRule(graph, past, future, aggr)
        launch = bands_launch(rule, x, weight, addend, None, out, transposed=False)
    else:
        launch = edges_launch(by_target(graph, edge_weight, aggr), x, weight, addend, out)
    launch.run(x.device)
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
    """See conv_op."""
    x, grad_out, blocks = unit_stride(x), unit_stride(grad_out), as_blocks(weight)
    swapped = blocks.transpose(2, 3)
    device = x.device
    needs_x, needs_weight, needs_factor = needs
    dx = parts = dfactor = None
    if isinstance(graph, Bands):
        rule = BandRule(graph, past, future, aggr)
        if needs_x and aggr == "max":
            dx, kept = x.new_empty(x.shape, dtype=torch.float32), new_kept(blocks, x, x.shape[0])
            for launch in bands_max_launches(rule, x, blocks, grad_out, kept, dx):
                launch.run(device)
        elif needs_x:
            dx = x.new_empty(x.shape)
            shares = new_shares(rule, weight.shape[0]) if aggr == "mean" else None
            if shares is not None:
                shares_launch(rule, shares, weight.shape[0]).run(device)
            bands_launch(rule, grad_out, swapped, None, shares, dx, transposed=True).run(device)
        if needs_weight:
            parts = new_parts("bands_weight", blocks, x, rule.rows, rule.rows_per_group)
            bands_weight_launch(rule, x, grad_out, parts).run(device)
    else:
        targets = by_target(graph, edge_weight, aggr)
        sources = by_source(graph, edge_weight, aggr)
        products = None
        if aggr == "max" and (needs_x or needs_factor):
            dx = x.new_empty(x.shape, dtype=torch.float32) if needs_x else None
            products = new_products(blocks, x, sources) if needs_factor else None
            kept = new_kept(blocks, x, targets.rows)
            inputs = (x, blocks, grad_out, kept)
            for launch in edges_max_launches(targets, sources, *inputs, dx, products):
                launch.run(device)
        elif needs_x:
            dx = x.new_empty(x.shape)
            edges_launch(sources, grad_out, swapped, None, dx).run(device)
        if needs_weight:
            parts = new_parts("edges_weight", blocks, x, targets.rows, targets.rows)
            edges_weight_launch(targets, x, grad_out, parts).run(device)
        if needs_factor and aggr != "max":
            launch, products = edges_factor_launch(sources, x, blocks, grad_out)
            launch.run(device)
        if products is not None:
            dfactor = products.sum(dim=0).to(edge_weight.dtype)
    dx = None if dx is None else dx.to(x.dtype)
    return dx, None if parts is None else _sum_of_parts(parts, weight), dfactor


def _sum_of_parts(parts: Tensor, weight: Tensor) -> Tensor:
    total = parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)
    return total.to(weight.dtype).view(weight.shape)
