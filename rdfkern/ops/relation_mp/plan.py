"""What a relation convolution derives from a graph once: relations in use, groups, incidences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .graph import RelationGraph
from .incidence import Incidence

# A dense product over every (node, relation) beats products per relation up to this much padding.
_DENSE_PADDING = 2.0


@dataclass(frozen=True)
class Grouped:
    """Incidence whose groups are the distinct (relation, node) pairs, ordered by relation.

    node: (G,) int64, the node of each group. sizes: number of groups of each relation in use.
    """

    incidence: Incidence
    node: Tensor
    sizes: list[int]


class ConvPlan:
    """Derived index tensors; `relations` are the (R',) ids that have edges, None if all have."""

    def __init__(self, graph: RelationGraph) -> None:
        (self.source, self.target), edge_type = graph.to_edges()
        self.num_src, self.num_dst = graph.num_src, graph.num_dst
        used = torch.bincount(edge_type, minlength=graph.num_relations) > 0  # [R]
        self.num_used = int(used.sum())
        self.relations = None if self.num_used == graph.num_relations else used.nonzero()[:, 0]
        self.relation = edge_type if self.relations is None else (used.cumsum(0) - 1)[edge_type]

    @cached_property
    def pairs(self) -> Tensor:
        """(E,) int64, a number for the (relation, target) of every edge."""
        return self.relation * self.num_dst + self.target

    @cached_property
    def group_sizes(self) -> Tensor:
        """(E,) int64, how many edges share the relation and target of each edge."""
        slots = self.num_used * self.num_dst
        if slots <= 8 * len(self.pairs) + 2**20:
            return torch.bincount(self.pairs, minlength=slots)[self.pairs]
        _, group, counts = torch.unique(self.pairs, return_inverse=True, return_counts=True)
        return counts[group]

    @cached_property
    def num_target_groups(self) -> int:
        return _count_distinct(self.pairs, self.num_used * self.num_dst)

    @cached_property
    def num_source_groups(self) -> int:
        pairs = self.relation * self.num_src + self.source
        return _count_distinct(pairs, self.num_used * self.num_src)

    @property
    def targets_are_dense(self) -> bool:
        return self.num_used * self.num_dst <= _DENSE_PADDING * self.num_target_groups

    @property
    def sources_are_dense(self) -> bool:
        return self.num_used * self.num_src <= _DENSE_PADDING * self.num_source_groups

    def sums_first(self, width_in: int, width_out: int, products: int) -> bool:
        """Whether summing before transforming takes fewer operations.

        Args: the widths of the features, and the multiplications that transform one row.
        """
        edges = len(self.relation)
        groups_dst, groups_src = self.num_target_groups, self.num_source_groups
        if self.targets_are_dense:
            groups_dst = self.num_used * self.num_dst
        if self.sources_are_dense:
            groups_src = self.num_used * self.num_src
        sums_first = edges * width_in + groups_dst * products
        return sums_first <= edges * width_out + groups_src * products

    @cached_property
    def dense_targets(self) -> Incidence:
        """Sums sources into num_dst * R' rows, target by target."""
        row = self.target * self.num_used + self.relation
        return Incidence.of(self.num_dst * self.num_used, self.num_src, row, self.source)

    @cached_property
    def dense_sources(self) -> Incidence:
        """Sums num_src * R' transformed rows, source by source, into targets."""
        col = self.source * self.num_used + self.relation
        return Incidence.of(self.num_dst, self.num_src * self.num_used, self.target, col)

    @cached_property
    def grouped_targets(self) -> Grouped:
        """Sums sources into one row per (relation, target) that has edges."""
        groups, group = torch.unique(self.pairs, return_inverse=True)
        incidence = Incidence.of(len(groups), self.num_src, group, self.source)
        return Grouped(incidence, groups % max(self.num_dst, 1), self._sizes(groups, self.num_dst))

    @cached_property
    def grouped_sources(self) -> Grouped:
        """Sums one transformed row per (relation, source) that has edges into targets."""
        pairs = self.relation * self.num_src + self.source
        groups, group = torch.unique(pairs, return_inverse=True)
        incidence = Incidence.of(self.num_dst, len(groups), self.target, group)
        return Grouped(incidence, groups % max(self.num_src, 1), self._sizes(groups, self.num_src))

    def _sizes(self, groups: Tensor, nodes: int) -> list[int]:
        return torch.bincount(groups // max(nodes, 1), minlength=self.num_used).tolist()


def conv_plan(graph: RelationGraph) -> ConvPlan:
    return graph.derive("conv", ConvPlan)


def target_incidence(graph: RelationGraph) -> Incidence:
    """Sums sources into targets over all relations."""
    return graph.derive("targets", _target_incidence)


def _target_incidence(graph: RelationGraph) -> Incidence:
    (source, target), _ = graph.to_edges()
    return Incidence.of(graph.num_dst, graph.num_src, target, source)


def _count_distinct(values: Tensor, upper: int) -> int:
    if upper > 8 * len(values) + 2**20:
        return torch.unique(values).numel()
    seen = torch.zeros(upper, dtype=torch.bool, device=values.device)
    seen[values] = True
    return int(seen.sum())
