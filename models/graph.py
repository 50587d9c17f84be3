"""Relation subgraphs: who hears whom inside a modality, and across modalities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from .. import RelationGraph, RelationSpec, relation_attention, relation_conv
from .data import Batch


@lru_cache(maxsize=64)
def _speaker_spec(num_speakers: int, past: int | None, future: int | None) -> RelationSpec:
    return RelationSpec.speaker_direction(num_speakers, past, future)


NUM_RELATIONS = _speaker_spec(1, 0, 0).num_relations


def speaker_graph(batch: Batch, past: int | None, future: int | None) -> RelationGraph:
    """The utterances of a batch, connected inside each dialogue by speaker and direction.

    Args:
        batch: T utterances.
        past: utterances before the target that it hears; None is unlimited.
        future: the same after the target.

    Returns:
        `RelationSpec.speaker_direction` on T nodes.
    """
    # The rule is the same for any larger number of speakers, and few sizes make few tables.
    capacity = 1 << max(batch.num_speakers - 1, 0).bit_length()
    return _speaker_spec(capacity, past, future).bind(batch.speaker, batch.cu_seqlens)


class ModalRelations(nn.Module):
    """R-GAT inside each modality: attention over the relations of `speaker_graph`.

    Each modality has its own weights. All share the edges, so their heads stand side by side in
    one `relation_attention`. After it, as in the released network's RGAT: GELU, dropout, a linear
    layer, the residual and LayerNorm.

    Args:
        modalities: M.
        width: D.
        heads: of each modality; must divide D.
        dropout: probability, of activations and attention weights.
    """

    def __init__(self, modalities: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        # Value, target logit and source logit of every head. A logit is linear in the value's
        # input, which spans the same scores as a vector times the value.
        self.project = nn.ModuleList(
            nn.Linear(width, width + 2 * heads, bias=False) for _ in range(modalities)
        )
        self.relation = nn.Parameter(torch.empty(NUM_RELATIONS, modalities * heads))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(modalities))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(modalities))
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.relation, std=0.1)

    def forward(self, streams: Sequence[Tensor], graph: RelationGraph) -> list[Tensor]:
        """M streams, (T, D) each, to as many of the same shape."""
        rows, width = streams[0].shape
        projected = torch.stack(
            [project(x) for project, x in zip(self.project, streams, strict=True)],
            dim=1,
        )  # [T, M, D + 2 H]
        value, dst, src = projected.split([width, self.heads, self.heads], dim=2)
        heard = relation_attention(
            value.reshape(rows, self.relation.shape[1], width // self.heads),
            dst.flatten(1),
            src.flatten(1),
            self.relation.to(value.dtype),
            graph,
            dropout_p=self.dropout.p if self.training else 0.0,
        )  # [T, M H, D / H]
        heard = self.dropout(self.activation(heard)).view(rows, len(streams), width)
        return [
            norm(x + out(message))
            for x, message, out, norm in zip(
                streams, heard.unbind(1), self.out, self.norm, strict=True
            )
        ]


class CrossModalRelations(nn.Module):
    """R-GCN across modalities: every utterance hears the other modalities of its neighbours.

    The graph is `RelationSpec.cross_modal` on M T nodes, mean per relation: a weight for every
    pair of target and source modality and every speaker-direction relation. All pairs have the
    edges of `speaker_graph`, so one `relation_conv` on T nodes of M D features, whose weight is
    zero between a modality and itself, gives the same sums from a graph M (M - 1) times smaller.

    Args:
        modalities: M, at least 2.
        width: D.
        dropout: probability.

    Attributes:
        weight: (5 M (M - 1), D, D), in the order of the relations of `RelationSpec.cross_modal`.
    """

    pair: Tensor

    def __init__(self, modalities: int, width: int, dropout: float) -> None:
        super().__init__()
        target, source = (~torch.eye(modalities, dtype=torch.bool)).nonzero().unbind(1)
        self.register_buffer("pair", source * modalities + target, persistent=False)
        relations = NUM_RELATIONS * modalities * (modalities - 1)
        self.weight = nn.Parameter(torch.empty(relations, width, width))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(modalities))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(modalities))
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        # A target sums one mean for every relation and other modality.
        bound = math.sqrt(3.0 / (width * NUM_RELATIONS * (modalities - 1)))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, streams: Sequence[Tensor], graph: RelationGraph) -> list[Tensor]:
        """M streams, (T, D) each, to as many of the same shape."""
        stacked = torch.cat(list(streams), dim=1)  # [T, M D]
        heard = relation_conv(stacked, self._joint_weight().to(stacked.dtype), graph, aggr="mean")
        heard = self.dropout(self.activation(heard))
        return [
            norm(x + out(message))
            for x, message, out, norm in zip(
                streams, heard.chunk(len(streams), dim=1), self.out, self.norm, strict=True
            )
        ]

    def _joint_weight(self) -> Tensor:
        """(5, M D, M D), rows by source and columns by target modality."""
        width, modalities = self.weight.shape[1], len(self.norm)
        pairs = self.weight.unflatten(0, (-1, NUM_RELATIONS))  # [M (M - 1), 5, D, D]
        blocks = pairs.new_zeros(modalities**2, *pairs.shape[1:]).index_copy(0, self.pair, pairs)
        blocks = blocks.view(modalities, modalities, NUM_RELATIONS, width, width)
        return blocks.permute(2, 0, 3, 1, 4).reshape(NUM_RELATIONS, modalities * width, -1)
