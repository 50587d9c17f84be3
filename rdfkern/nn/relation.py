"""R-GCN layers over typed relations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._backends.checks import check_integers_in, check_shape
from ..ops.relation_mp.api import relation_conv
from ..ops.relation_mp.graph import RelationGraph
from .graph_cache import graph_of

_INDICES = (torch.int32, torch.int64)


class RelationConv(nn.Module):
    """R-GCN layer with the constructor, parameters and forward of `torch_geometric.nn.RGCNConv`.

    `state_dict`s are interchangeable: weight (R, in, out), (B, in, out) with comp (R, B), or
    (R, NB, in/NB, out/NB); root (in_dst, out); bias (out,).

    Args:
        in_channels: width of x, or (of the sources, of the targets). The number of source nodes
            where x is None or holds indices.
        out_channels: width of the output.
        num_relations: R.
        num_bases: B, for W_r = sum_b comp[r, b] weight[b].
        num_blocks: NB, for block-diagonal weights; it divides both widths.
        aggr: `sum`, `add`, `mean` (over the edges of one relation at a target) or `max`.
        root_weight: whether a target's own features are transformed and added.
        is_sorted: accepted for compatibility. In PyG it promises edges sorted by type; here any
            order is right and equally fast.
        bias: whether to add a bias.

    Raises:
        ValueError: both `num_bases` and `num_blocks`, or blocks that don't divide the widths.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        num_relations: int,
        num_bases: int | None = None,
        num_blocks: int | None = None,
        aggr: str = "mean",
        root_weight: bool = True,
        is_sorted: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_bases is not None and num_blocks is not None:
            raise ValueError(
                f"num_bases and num_blocks exclude each other, got {num_bases} and {num_blocks}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_relations = num_relations
        self.num_bases = num_bases
        self.num_blocks = num_blocks
        self.aggr = aggr
        self.is_sorted = is_sorted
        width_src, width_dst = (
            (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        )
        self.in_channels_l = width_src
        if num_blocks is not None:
            if num_blocks < 1 or width_src % num_blocks or out_channels % num_blocks:
                raise ValueError(
                    f"num_blocks must divide in_channels={width_src} and "
                    f"out_channels={out_channels}, got {num_blocks}"
                )
            shape = (num_relations, num_blocks, width_src // num_blocks, out_channels // num_blocks)
        elif num_bases is not None:
            shape = (num_bases, width_src, out_channels)
        else:
            shape = (num_relations, width_src, out_channels)
        self.weight = nn.Parameter(torch.empty(shape))
        self.comp = self.root = self.bias = None
        if num_bases is not None:
            self.comp = nn.Parameter(torch.empty(num_relations, num_bases))
        if root_weight:
            self.root = nn.Parameter(torch.empty(width_dst, out_channels))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight, comp and root by Glorot's rule; set the bias to 0."""
        for parameter in (self.weight, self.comp, self.root):
            if parameter is not None:
                glorot(parameter)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor | None | tuple[Tensor | None, Tensor | None],
        edge_index: Tensor | RelationGraph,
        edge_type: Tensor | None = None,
    ) -> Tensor:
        """One round of message passing.

        Args:
            x: (N, in); (N,) int32 or int64 indices of the rows of `weight[r]` and `root`, as for
                nodes without features; None for the indices 0 to in_channels - 1; or a pair of
                these for sources and targets. Not indices with `num_blocks`.
            edge_index: (2, E) integer, row 0 sources and row 1 targets; or a `RelationGraph`.
            edge_type: (E,) integer; None with a `RelationGraph`, which has its own.

        Returns:
            (N_dst, out).

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        x_src, x_dst = x if isinstance(x, tuple | list) else (x, x)
        if x_src is None:
            x_src = torch.arange(self.in_channels_l, device=self.weight.device)
            x_dst = x_src if x is None else x_dst
        graph = graph_of(x_src, x_dst, edge_index, edge_type, self.num_relations)
        weight = self.weight if self.comp is None else (self.comp, self.weight)
        if x_src.dtype in _INDICES:
            x_src, weight, graph = _rows_of_weight(self, x_src, graph)
        looks_up_root = self.root is not None and x_dst is not None and x_dst.dtype in _INDICES
        out = relation_conv(
            (x_src, None if looks_up_root or self.root is None else x_dst),
            weight,
            graph,
            aggr=self.aggr,
            root_weight=None if looks_up_root else self.root,
            bias=self.bias,
        )
        if not looks_up_root:
            return out
        check_shape("x[1]", x_dst, (graph.num_dst,), "(N_dst,)")
        check_integers_in("x[1]", x_dst, self.root.shape[0], "number of rows of root")
        return out + self.root.index_select(0, x_dst).to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, num_relations={self.num_relations}"


def _rows_of_weight(
    layer: nn.Module, index: Tensor, graph: RelationGraph
) -> tuple[Tensor, Tensor, RelationGraph]:
    """The convolution of embeddings: source j of relation r sends row index[j] of W_r as it is.

    Returns:
        Features, weight and graph in which every row of every W_r is a source node.
    """
    if layer.num_blocks is not None:
        raise ValueError(f"x must hold features with num_blocks={layer.num_blocks}, got indices")
    check_shape("x", index, (graph.num_src,), "(N_src,)")
    check_integers_in("x", index, layer.in_channels_l, "number of rows of weight[r]")
    weight = layer.weight
    if layer.comp is not None:
        weight = torch.einsum("rb,bio->rio", layer.comp, layer.weight)
    (source, target), edge_type = graph.to_edges()
    row = edge_type * layer.in_channels_l + index[source]
    rows = weight.flatten(0, 1)  # [R * in, out]
    as_it_is = torch.eye(layer.out_channels, dtype=rows.dtype, device=rows.device)
    looked_up = RelationGraph.from_edges(
        torch.stack([row, target]),
        edge_type,
        (rows.shape[0], graph.num_dst),
        layer.num_relations,
    )
    return rows, as_it_is.expand(layer.num_relations, -1, -1), looked_up


def glorot(parameter: Tensor) -> None:
    """Draw uniformly, in proportion to 1 / sqrt(rows + columns) of the last two dimensions."""
    fans = parameter.shape[-2] + parameter.shape[-1]
    bound = math.sqrt(6.0 / fans) if fans else 0.0
    nn.init.uniform_(parameter, -bound, bound)
