"""Launches of the gradients of relation_conv's maximum in Triton, some relations at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..._backends.triton_utils import Launch, dot_precision
from . import conv_config
from .conv_triton_bands_max import relation_bands_collect_kernel, relation_bands_max_kernel
from .conv_triton_edges_max import relation_edges_collect_kernel, relation_edges_max_kernel
from .conv_triton_launch import BandRule, Edges, tiles_for, without_others


def new_kept(weight: Tensor, x: Tensor, targets: int) -> Tensor:
    """Memory for maxima and shares, (2, relations, targets, width); not of all relations at once.

    weight: (R, NB, in/NB, out/NB).
    """
    of_one = targets * x.shape[1]
    relations = max(1, min(weight.shape[0], conv_config.MAX_KEPT_BYTES // (8 * of_one)))
    return x.new_empty((2, relations, targets, x.shape[1]), dtype=torch.float32)


def bands_max_launches(
    rule: BandRule, x: Tensor, weight: Tensor, grad: Tensor, kept: Tensor, dx: Tensor
) -> Iterator[Launch]:
    """Fill dx, float32: launches in order, which all use `kept`."""
    _, blocks, width_in, width_out = weight.shape
    width = x.shape[1]
    fill = tiles_for("bands_max", x, width_in, width_out, rule.rows_per_group)
    collect = tiles_for("bands_max", x, width, width_out, rule.rows_per_group).launch_options()
    del collect["BLOCK_E"]
    for relations in _parts(weight, kept):
        given = {
            **rule.arguments(),
            "features_ptr": x,
            "kept_ptr": kept,
            "order_ptr": rule.graph.order,
            "feature_strides": x.stride(),
            "kept_size": kept.stride(0),
            "width": width,
            "groups": rule.groups,
            **relations,
        }
        yield Launch(
            relation_bands_max_kernel,
            lambda meta: (
                rule.rows // meta["BLOCK_M"] + rule.groups,
                blocks * triton.cdiv(width_in, meta["BLOCK_C"]),
            ),
            {**given, **_product(x, weight, grad), **fill.launch_options()},
        )
        yield Launch(
            relation_bands_collect_kernel,
            lambda meta: (
                rule.rows // meta["BLOCK_M"] + rule.groups,
                triton.cdiv(width, meta["BLOCK_C"]),
            ),
            {**given, "dx_ptr": dx, **collect},
        )


def new_products(weight: Tensor, x: Tensor, edges: Edges) -> Tensor:
    """Memory for the parts of df, (parts of the columns, E)."""
    tiles = tiles_for("edges_max", x, x.shape[1], weight.shape[3], edges.rows)
    parts = triton.cdiv(x.shape[1], tiles.block_c)
    return x.new_empty((parts, edges.other.shape[0]), dtype=torch.float32)


def edges_max_launches(
    targets: Edges,
    sources: Edges,
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    kept: Tensor,
    dx: Tensor | None,
    products: Tensor | None,
) -> Iterator[Launch]:
    """Fill dx and products, float32: launches in order, which all use `kept`."""
    _, blocks, width_in, width_out = weight.shape
    width = x.shape[1]
    fill = tiles_for("edges_max", x, width_in, width_out, targets.rows)
    collect = without_others(tiles_for("edges_max", x, width, width_out, sources.rows))
    del collect["BLOCK_E"]
    for relations in _parts(weight, kept):
        given = {
            "features_ptr": x,
            "kept_ptr": kept,
            "factor_ptr": targets.factor,
            "feature_strides": x.stride(),
            "kept_size": kept.stride(0),
            "width": width,
            **relations,
        }
        yield Launch(
            relation_edges_max_kernel,
            lambda meta: (
                triton.cdiv(targets.rows, meta["BLOCK_M"]),
                blocks * triton.cdiv(width_in, meta["BLOCK_C"]),
            ),
            {
                **targets.arguments(),
                **given,
                **_product(x, weight, grad),
                **without_others(fill),
            },
        )
        yield Launch(
            relation_edges_collect_kernel,
            lambda meta: (
                triton.cdiv(sources.rows, meta["BLOCK_M"]),
                triton.cdiv(width, meta["BLOCK_C"]),
            ),
            {
                **sources.arguments(),
                **given,
                "dx_ptr": dx,
                "products_ptr": products,
                "targets": targets.rows,
                "edges": sources.other.shape[0],
                **collect,
            },
        )


def _parts(weight: Tensor, kept: Tensor) -> Iterator[dict[str, int]]:
    """The first and the last of the relations that go together."""
    relations, together = weight.shape[0], kept.shape[1]
    for first in range(0, relations, together):
        yield {"first": first, "last": min(first + together, relations) - 1}


def _product(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Any]:
    return {
        "grad_ptr": grad,
        "weight_ptr": weight,
        "grad_strides": grad.stride(),
        "weight_strides": weight.stride(),
        "C": weight.shape[2],
        "E": weight.shape[3],
        "zero": 0.0,
        "PRECISION": dot_precision(x.dtype),
    }
