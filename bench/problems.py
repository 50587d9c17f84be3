"""What belongs to a kind of shape: its problem, its candidates, and rdfkern among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import attention_candidates, attention_problem, relation_peers, relation_problem
from . import one_map_problem as one_map
from .candidates import Candidate
from .shapes import AttentionShape, OneMapShape, RelationShape, Shape


class Kind(NamedTuple):
    """problem(shape, device, folder=None), candidates(shape, device), ours(impl)."""

    problem: Callable[..., Any]
    candidates: Callable[..., list[Candidate]]
    ours: Callable[[str], Candidate]


_KINDS: dict[type, Kind] = {
    AttentionShape: Kind(
        attention_problem.AttentionProblem, attention_candidates.candidates, attention_problem.ours
    ),
    OneMapShape: Kind(one_map.OneMapProblem, one_map.candidates, one_map.ours),
    RelationShape: Kind(
        relation_problem.RelationProblem, relation_peers.candidates, relation_problem.ours
    ),
}


def kind_of(shape: Shape) -> Kind:
    return _KINDS[type(shape)]
