"""Launches of relation_conv's Triton kernels, made from what `conv_op` hands over.

Grids follow from shapes alone, never from values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..._backends.triton_device import architecture, processors
from ..._backends.triton_utils import Launch, dot_precision
from . import conv_config
from .bands import UNLIMITED, Bands, EdgeLists
from .conv_config import Tiles
from .conv_triton_bands import relation_bands_kernel, relation_shares_kernel
from .conv_triton_bands_weight import relation_bands_weight_kernel
from .conv_triton_edges import relation_edges_kernel
from .conv_triton_edges_weight import relation_edges_factor_kernel, relation_edges_weight_kernel


@dataclass(frozen=True)
class BandRule:
    """An implicit graph and how to aggregate over it."""

    graph: Bands
    past: int
    future: int
    aggr: str

    @property
    def rows(self) -> int:
        return self.graph.order.shape[0]

    @property
    def keys(self) -> int:
        return self.graph.table.shape[0]

    @property
    def groups(self) -> int:
        return self.graph.start.shape[0] - 1

    @property
    def rows_per_group(self) -> float:
        return self.rows / self.groups

    def by_relation(self, relations: int) -> bool:
        """Whether shares are numbered by relation: there are fewer than what a key may hear."""
        return relations <= 3 * self.keys

    def arguments(self) -> dict[str, Any]:
        """The arguments that all kernels on bands have in common, by name."""
        # Differences of positions stay below this; positions of 32 bits are compared in 32 bits.
        limit = 2**31 - 2 if self.graph.position.dtype == torch.int32 else 2**62 - 1
        past, future = (
            limit if side == UNLIMITED else min(side, limit) for side in (self.past, self.future)
        )
        return {
            "position_ptr": self.graph.position,
            "start_ptr": self.graph.start,
            "table_ptr": self.graph.table.contiguous(),
            "total": self.rows,
            "past": past,
            "future": future,
            "KEYS": self.keys,
            "PAIRS": triton.next_power_of_2(3 * self.keys),
        }


@dataclass(frozen=True)
class Edges:
    """Lists of edges by one of their ends, the row, ordered by relation; see `EdgeLists`."""

    start: Tensor
    other: Tensor
    relation: Tensor
    edge: Tensor
    count: Tensor
    factor: Tensor | None
    aggr: str

    @property
    def rows(self) -> int:
        return self.start.shape[0] - 1

    def arguments(self) -> dict[str, Any]:
        """The arguments that all kernels on lists of edges have in common, by name."""
        return {
            "start_ptr": self.start,
            "other_ptr": self.other,
            "relation_ptr": self.relation,
            "edge_ptr": self.edge,
            "count_ptr": self.count,
            "total": self.rows,
            "MEAN": self.aggr == "mean",
        }


def by_target(graph: EdgeLists, factor: Tensor | None, aggr: str) -> Edges:
    """Edges by their targets, as the output adds them up."""
    lists = (graph.dst_start, graph.dst_source, graph.dst_relation, graph.dst_edge, graph.dst_count)
    return Edges(*lists, _dense(factor), aggr)


def by_source(graph: EdgeLists, factor: Tensor | None, aggr: str) -> Edges:
    """Edges by their sources, as the gradient of x adds them up."""
    lists = (graph.src_start, graph.src_target, graph.src_relation, graph.src_edge, graph.src_count)
    return Edges(*lists, _dense(factor), aggr)


def as_blocks(weight: Tensor) -> Tensor:
    """Weight as (R, NB, in/NB, out/NB)."""
    return weight if weight.dim() == 4 else weight[:, None]


def new_shares(rule: BandRule, relations: int) -> Tensor:
    """Memory for 1 / |N_r(i)|: min(R, 3 K) numbers for each row."""
    slots = min(relations, 3 * rule.keys)
    return torch.empty(slots, rule.rows, dtype=torch.float32, device=rule.graph.order.device)


def new_parts(kernel: str, weight: Tensor, x: Tensor, rows: int, rows_per_group: float) -> Tensor:
    """Memory for the parts of dweight: float32 of every split of the rows, or dweight itself."""
    relations, blocks, width_in, width_out = weight.shape
    tiles = tiles_for(kernel, x, width_in, width_out, rows_per_group)
    programs = relations * blocks * _columns(tiles, width_in, width_out)
    row_tiles = triton.cdiv(rows, tiles.block_m)
    splits = conv_config.splits(programs, row_tiles, weight.numel(), processors(x.device))
    dtype = weight.dtype if splits == 1 else torch.float32
    return weight.new_empty((splits, *weight.shape), dtype=dtype)


def bands_launch(
    rule: BandRule,
    features: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    shares: Tensor | None,
    out: Tensor,
    *,
    transposed: bool,
    tiles: Tiles | None = None,
) -> Launch:
    """Fill `out`, of the rows' nodes, from the features of what the rows hear.

    weight: (R, NB, columns of the features, columns of out) of each block, any strides.
    transposed: rows are sources. shares: for a mean then, as `shares_launch` fills them.
    """
    relations, blocks, width_in, width_out = weight.shape
    if tiles is None:
        kernel = "bands_largest" if rule.aggr == "max" else "bands"
        tiles = tiles_for(kernel, features, width_in, width_out, rule.rows_per_group)
    return Launch(
        relation_bands_kernel,
        lambda meta: (
            rule.rows // meta["BLOCK_M"] + rule.groups,
            blocks * triton.cdiv(width_out, meta["BLOCK_E"]),
        ),
        {
            **rule.arguments(),
            "features_ptr": features,
            "weight_ptr": weight,
            "addend_ptr": addend,
            "share_ptr": shares,
            "out_ptr": out,
            "order_ptr": rule.graph.order,
            "feature_strides": features.stride(),
            "weight_strides": weight.stride(),
            "addend_strides": (0, 0) if addend is None else addend.stride(),
            "out_stride": out.stride(0),
            "groups": rule.groups,
            "C": width_in,
            "E": width_out,
            "MEAN": rule.aggr == "mean",
            "MAX": rule.aggr == "max",
            "TRANSPOSED": transposed,
            "BY_RELATION": rule.by_relation(relations),
            "zero": 0.0,
            "PRECISION": dot_precision(features.dtype),
            **tiles.launch_options(),
        },
    )


def shares_launch(rule: BandRule, shares: Tensor, relations: int) -> Launch:
    """Fill the shares 1 / |N_r(i)| of what every row hears."""
    together = min(64, conv_config.power_of_two(round(rule.rows_per_group)))
    return Launch(
        relation_shares_kernel,
        lambda meta: (rule.rows // meta["BLOCK_M"] + rule.groups,),
        {
            **rule.arguments(),
            "share_ptr": shares,
            "groups": rule.groups,
            "BY_RELATION": rule.by_relation(relations),
            "BLOCK_M": together,
            "BLOCK_N": together,
            "num_warps": 4,
        },
    )


def bands_weight_launch(
    rule: BandRule, x: Tensor, grad: Tensor, parts: Tensor, tiles: Tiles | None = None
) -> Launch:
    """Fill the parts of dweight, one for each split of the rows."""
    splits, relations, blocks, width_in, width_out = parts.shape
    if tiles is None:
        tiles = tiles_for("bands_weight", x, width_in, width_out, rule.rows_per_group)
    return Launch(
        relation_bands_weight_kernel,
        lambda meta: (relations, blocks * _columns(tiles, width_in, width_out), splits),
        {
            **rule.arguments(),
            "features_ptr": x,
            "grad_ptr": grad,
            "out_ptr": parts,
            "order_ptr": rule.graph.order,
            "group_ptr": rule.graph.group,
            "feature_strides": x.stride(),
            "grad_strides": grad.stride(),
            "split_stride": parts.stride(0),
            "relation_stride": parts.stride(1),
            "split_rows": triton.cdiv(rule.rows, splits),
            "C": width_in,
            "E": width_out,
            "MEAN": rule.aggr == "mean",
            "MAX": rule.aggr == "max",
            "zero": 0.0,
            "PRECISION": dot_precision(x.dtype),
            **tiles.launch_options(),
        },
    )


def edges_launch(
    edges: Edges, features: Tensor, weight: Tensor, addend: Tensor | None, out: Tensor
) -> Launch:
    """Fill `out`, of the rows, from the features of the other ends of their edges."""
    _, blocks, width_in, width_out = weight.shape
    tiles = tiles_for("edges", features, width_in, width_out, edges.rows)
    return Launch(
        relation_edges_kernel,
        lambda meta: (
            triton.cdiv(edges.rows, meta["BLOCK_M"]),
            blocks * triton.cdiv(width_out, meta["BLOCK_E"]),
        ),
        {
            **edges.arguments(),
            "features_ptr": features,
            "weight_ptr": weight,
            "addend_ptr": addend,
            "factor_ptr": edges.factor,
            "out_ptr": out,
            "feature_strides": features.stride(),
            "weight_strides": weight.stride(),
            "addend_strides": (0, 0) if addend is None else addend.stride(),
            "out_stride": out.stride(0),
            "C": width_in,
            "E": width_out,
            "MAX": edges.aggr == "max",
            "zero": 0.0,
            "PRECISION": dot_precision(features.dtype),
            **without_others(tiles),
        },
    )


def edges_weight_launch(edges: Edges, x: Tensor, grad: Tensor, parts: Tensor) -> Launch:
    """Fill the parts of dweight, one for each split of the targets."""
    splits, relations, blocks, width_in, width_out = parts.shape
    tiles = tiles_for("edges_weight", x, width_in, width_out, edges.rows)
    return Launch(
        relation_edges_weight_kernel,
        lambda meta: (relations, blocks * _columns(tiles, width_in, width_out), splits),
        {
            **edges.arguments(),
            "features_ptr": x,
            "grad_ptr": grad,
            "factor_ptr": edges.factor,
            "out_ptr": parts,
            "feature_strides": x.stride(),
            "grad_strides": grad.stride(),
            "split_stride": parts.stride(0),
            "relation_stride": parts.stride(1),
            "split_rows": triton.cdiv(edges.rows, splits),
            "C": width_in,
            "E": width_out,
            "MAX": edges.aggr == "max",
            "zero": 0.0,
            "PRECISION": dot_precision(x.dtype),
            **without_others(tiles),
        },
    )


def edges_factor_launch(
    edges: Edges, x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Launch, Tensor]:
    """The launch that fills products (parts of the columns, E); their sum is that of df."""
    _, blocks, width_in, width_out = weight.shape
    tiles = tiles_for("edges_factor", x, width_in, width_out, edges.rows)
    parts = blocks * triton.cdiv(width_out, tiles.block_e)
    number = edges.other.shape[0]
    products = torch.empty(parts, number, dtype=torch.float32, device=x.device)
    launch = Launch(
        relation_edges_factor_kernel,
        lambda meta: (triton.cdiv(edges.rows, meta["BLOCK_M"]), parts),
        {
            **edges.arguments(),
            "features_ptr": x,
            "weight_ptr": weight,
            "grad_ptr": grad,
            "out_ptr": products,
            "feature_strides": x.stride(),
            "weight_strides": weight.stride(),
            "grad_strides": grad.stride(),
            "edges": number,
            "C": width_in,
            "E": width_out,
            "zero": 0.0,
            "PRECISION": dot_precision(x.dtype),
            **without_others(tiles),
        },
    )
    return launch, products


def tiles_for(
    kernel: str, features: Tensor, width_in: int, width_out: int, rows_per_group: float
) -> Tiles:
    where = (features.dtype, architecture(features.device))
    return conv_config.tiles(kernel, width_in, width_out, rows_per_group, *where)


def _columns(tiles: Tiles, width_in: int, width_out: int) -> int:
    """How many tiles a matrix of a weight's block has."""
    return triton.cdiv(width_in, tiles.block_c) * triton.cdiv(width_out, tiles.block_e)


def without_others(tiles: Tiles) -> dict[str, int]:
    options = tiles.launch_options()
    del options["BLOCK_N"]
    return options


def _dense(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.contiguous()
