"""Relation graphs: implicit (a rule and the nodes it applies to) or explicit (a list of edges)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._backends.checks import check_cu_seqlens, check_device, check_integers_in, check_shape

if TYPE_CHECKING:
    from .spec import RelationSpec

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_LARGEST_SORT_KEY = 2**62
_INT64_MAX = 2**63 - 1


class RelationGraph:
    """Typed edges from source nodes to target nodes.

    Made by `RelationSpec.bind` (implicit: no edge in memory until `to_edges` is called) or by
    `RelationGraph.from_edges` (explicit). Immutable; what is derived from it is kept, so a graph
    that several layers share is prepared once.

    Attributes:
        num_src, num_dst: numbers of source and target nodes, equal unless bipartite.
        num_relations: R.
        is_implicit: whether it came from a rule.
        spec, keys, cu_seqlens, positions: the rule and its nodes; None if explicit, `positions`
            also if they are the running index.
        device: where the graph is.
    """

    spec: RelationSpec | None
    keys: Tensor | None
    cu_seqlens: Tensor | None
    positions: Tensor | None

    def __init__(
        self,
        spec: RelationSpec,
        keys: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor | None = None,
    ) -> None:
        """The arguments and errors of `RelationSpec.bind`."""
        check_integer_dtype("keys", keys)
        check_shape("keys", keys, (None,), "(N,)")
        check_integers_in("keys", keys, spec.num_keys, "number of keys in the table")
        check_cu_seqlens("cu_seqlens", cu_seqlens, keys.shape[0])
        check_device("cu_seqlens", cu_seqlens, "keys", keys)
        if positions is not None:
            check_integer_dtype("positions", positions)
            check_shape("positions", positions, (keys.shape[0],), "(N,)")
            check_device("positions", positions, "keys", keys)
        self.spec, self.keys, self.cu_seqlens, self.positions = spec, keys, cu_seqlens, positions
        self.num_src = self.num_dst = keys.shape[0]
        self.num_relations: int = spec.num_relations
        self.device = keys.device
        self._derived: dict[Any, Any] = {}

    @classmethod
    def from_edges(
        cls,
        edge_index: Tensor,
        edge_type: Tensor,
        num_nodes: int | tuple[int, int],
        num_relations: int,
    ) -> RelationGraph:
        """A graph from its edges; duplicates are separate edges, and the order is kept.

        Args:
            edge_index: (2, E) integer, row 0 the source and row 1 the target of every edge.
            edge_type: (E,) integer in [0, num_relations).
            num_nodes: N, or (number of sources, number of targets) of a bipartite graph.
            num_relations: R.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it and the first
                bad value.
        """
        num_src, num_dst = _node_counts(num_nodes)
        num_relations = _count("num_relations", num_relations)
        check_integer_dtype("edge_index", edge_index)
        check_shape("edge_index", edge_index, (2, None), "(2, E)")
        check_integer_dtype("edge_type", edge_type)
        check_shape("edge_type", edge_type, (edge_index.shape[1],), "(E,)")
        check_device("edge_type", edge_type, "edge_index", edge_index)
        check_integers_in("edge_index[0]", edge_index[0], num_src, "number of source nodes")
        check_integers_in("edge_index[1]", edge_index[1], num_dst, "number of target nodes")
        check_integers_in("edge_type", edge_type, num_relations, "number of relations")
        graph = cls.__new__(cls)
        graph.spec = graph.keys = graph.cu_seqlens = graph.positions = None
        graph.num_src, graph.num_dst, graph.num_relations = num_src, num_dst, num_relations
        graph.device = edge_index.device
        graph._derived = {"edges": (edge_index.to(torch.int64), edge_type.to(torch.int64))}
        return graph

    @property
    def is_implicit(self) -> bool:
        return self.spec is not None

    def to(self, device: torch.device | str) -> RelationGraph:
        """The graph on another device; itself if it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        if self.is_implicit:
            positions = None if self.positions is None else self.positions.to(device)
            return RelationGraph(
                self.spec, self.keys.to(device), self.cu_seqlens.to(device), positions
            )
        edge_index, edge_type = (tensor.to(device) for tensor in self.to_edges())
        return RelationGraph.from_edges(
            edge_index, edge_type, (self.num_src, self.num_dst), self.num_relations
        )

    def to_edges(self) -> tuple[Tensor, Tensor]:
        """The edges in PyG's order: row 0 source, row 1 target. Do not write into them.

        Returns:
            edge_index (2, E) int64 and edge_type (E,) int64; ordered by (target, source) for an
            implicit graph, as given for an explicit one.
        """
        return self.derive("edges", _edges_of_rule)

    def derive(self, key: Any, build: Callable[[RelationGraph], Any]) -> Any:
        """`build(self)`, called once per key and kept: for what implementations prepare."""
        if key in self._derived:
            return self._derived[key]
        with torch.inference_mode(False):  # what is made there cannot be saved for a backward pass
            derived = build(self)
        if may_be_kept():
            self._derived[key] = derived
        return derived

    def __repr__(self) -> str:
        kind = "implicit" if self.is_implicit else "explicit"
        return (
            f"RelationGraph({kind}, num_src={self.num_src}, num_dst={self.num_dst}, "
            f"num_relations={self.num_relations}, device={self.device})"
        )


def may_be_kept() -> bool:
    """Whether tensors that are made now mean anything later.

    torch.export makes them without values, and transforms of torch.func wrap them.
    """
    transformed = torch._C._are_functorch_transforms_active()
    return not (torch.compiler.is_exporting() or transformed)


def _edges_of_rule(graph: RelationGraph) -> tuple[Tensor, Tensor]:
    spec, device, total = graph.spec, graph.device, graph.num_src
    if total == 0:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return empty.new_empty((2, 0)), empty
    cu_seqlens = graph.cu_seqlens.to(torch.int64)
    node = torch.arange(total, device=device)
    dialogue = torch.searchsorted(cu_seqlens[1:], node, right=True)  # [N]
    if graph.positions is None:
        position = node - cu_seqlens[dialogue]
    else:
        position = graph.positions.to(torch.int64)
        # Python integers, since the difference of two int64 positions may not fit into int64.
        lowest, highest = int(position.min()), int(position.max())
        if (len(cu_seqlens) - 1) * (highest - lowest + 1) >= _LARGEST_SORT_KEY:
            raise ValueError(
                f"positions must span less than 2**62 over all dialogues together, "
                f"got {lowest} to {highest} in {len(cu_seqlens) - 1} dialogues"
            )
        position = position - lowest
    span = int(position.max()) + 1
    start = dialogue * span
    place = start + position  # one axis on which dialogues don't overlap
    is_sorted = graph.positions is None or bool((place.diff() >= 0).all())
    ordered, order = (place, node) if is_sorted else torch.sort(place, stable=True)
    past = span if spec.past is None else min(spec.past, span)
    future = span if spec.future is None else min(spec.future, span)
    first = torch.searchsorted(ordered, torch.maximum(place - past, start))  # [N]
    last = torch.searchsorted(ordered, torch.minimum(place + future, start + span - 1), right=True)
    reach = last - first
    target = node.repeat_interleave(reach)  # [candidates]
    skipped = (first - (reach.cumsum(0) - reach)).repeat_interleave(reach)
    source = order[torch.arange(len(target), device=device) + skipped]
    direction = (position[source] - position[target]).sign() + 1
    keys = graph.keys.to(torch.int64)
    relation = spec.table.to(device)[keys[target], keys[source], direction]
    connected = relation >= 0
    target, source, relation = target[connected], source[connected], relation[connected]
    if not is_sorted:
        by_source = torch.argsort(target * total + source)
        target, source, relation = target[by_source], source[by_source], relation[by_source]
    return torch.stack([source, target]), relation


def check_integer_dtype(name: str, values: Tensor) -> None:
    """`values` is an integer tensor; raises TypeError otherwise."""
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS:
        got = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name} must be an integer tensor, got {got}")


def _node_counts(num_nodes: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(num_nodes, tuple | list):
        if len(num_nodes) != 2:
            raise ValueError(
                f"num_nodes must be an integer or (sources, targets), got {num_nodes!r}"
            )
        return _count("num_nodes[0]", num_nodes[0]), _count("num_nodes[1]", num_nodes[1])
    return (_count("num_nodes", num_nodes),) * 2


def _count(name: str, count: int) -> int:
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"{name} must be an integer, got {count!r}")
    if operator.index(count) < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")
    if operator.index(count) > _INT64_MAX:
        raise ValueError(f"{name} must fit into int64, got {count}")
    return operator.index(count)
