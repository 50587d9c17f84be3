"""The rule of a conversation graph: who hears whom, how far, and as which relation."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tables
from .graph import RelationGraph, check_integer_dtype, may_be_kept

_INT32_MAX = 2**31 - 1  # kernels read the table as int32


@dataclass(frozen=True, eq=False)
class RelationSpec:
    """Typed edges between the nodes of a dialogue, given as a rule instead of a list.

    Every node has a key (a speaker, or a speaker and a modality) and a position in its dialogue.
    There is an edge from source j to target i exactly when both are in the same dialogue, the
    distance of their positions is within `past` (source earlier) or `future` (source later), and
    `table[key of i, key of j, direction]` is not -1; that entry is the relation of the edge.

    Args:
        past: how many positions back a target hears, inclusive; None is unlimited, 0 nothing.
        future: how many positions ahead a target hears, inclusive; None is unlimited, 0 nothing.
        table: integer (K, K, 3), `table[key of target, key of source, direction]`, direction 0:
            the source is earlier, 1: same position (always within the window), 2: later; -1 for
            no edge.
        num_relations: R, default the largest entry of the table + 1. More leaves relations
            without edges, so that several rules can share one set of weights.

    Raises:
        TypeError: `past`, `future`, `num_relations` are no integers, or the table is no integer
            tensor.
        ValueError: a negative window, a table of another shape, entries outside [-1, R), or an R
            that does not fit into int32.
    """

    past: int | None
    future: int | None
    table: Tensor
    num_relations: int | None = None

    def __post_init__(self) -> None:
        for name in ("past", "future"):
            object.__setattr__(self, name, tables.window_side(name, getattr(self, name)))
        table = self.table
        check_integer_dtype("table", table)
        shape = tuple(table.shape)
        if table.dim() != 3 or shape[0] != shape[1] or shape[0] < 1 or shape[2] != 3:
            raise ValueError(f"table must have shape (K, K, 3) with K >= 1, got {shape}")
        table = table.detach().to("cpu", torch.int64)
        lowest, highest = int(table.min()), int(table.max())
        if lowest < -1:
            at = tuple((table < -1).nonzero()[0].tolist())
            raise ValueError(f"table must hold relations or -1, got {int(table[at])} at {at}")
        relations = highest + 1 if self.num_relations is None else _index(self.num_relations)
        if highest >= relations:
            at = tuple((table >= relations).nonzero()[0].tolist())
            raise ValueError(
                f"table must hold relations below num_relations={relations}, "
                f"got {int(table[at])} at {at}"
            )
        if relations > _INT32_MAX:
            raise ValueError(f"num_relations must fit into int32, got {relations}")
        object.__setattr__(self, "num_relations", relations)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_tables", {})

    @property
    def num_keys(self) -> int:
        """K, the number of keys of the table."""
        return self.table.shape[0]

    def table_on(self, device: torch.device) -> Tensor:
        """The table as int32 on a device; kept, since a copy to an accelerator makes it wait."""
        if device in self._tables:
            return self._tables[device]
        table = self.table.to(device, torch.int32)
        if may_be_kept():
            self._tables[device] = table
        return table

    def bind(
        self, keys: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None
    ) -> RelationGraph:
        """Apply the rule to packed dialogues.

        Args:
            keys: (N,) integer in [0, K), the key of every node; dialogues one after another.
            cu_seqlens: (B+1,) int32 or int64, where each dialogue starts, and N.
            positions: (N,) integer, the time step of every node; default the running index in
                its dialogue. Nodes may share a step, and steps need be neither sorted nor dense.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        return RelationGraph(self, keys, cu_seqlens, positions)

    @classmethod
    def speaker_direction(
        cls, num_speakers: int, past: int | None, future: int | None
    ) -> RelationSpec:
        """Same or other speaker, times direction; key = speaker, 5 relations.

        Same speaker: 0 earlier, 1 the node itself, 2 later. Other speaker: 3 earlier, 4 later.
        One node per position: two speakers at the same position are not connected.
        """
        return cls(past, future, tables.speaker_direction(num_speakers), 5)

    @classmethod
    def cross_modal(
        cls, num_speakers: int, num_modalities: int, past: int | None, future: int | None
    ) -> RelationSpec:
        """Edges between different modalities only; key = speaker * M + modality.

        relation = 5 * pair + kind. pair = t * (M - 1) + s - (s > t) for target modality t and
        source modality s; kind is the relation of `speaker_direction` (1 is the same utterance).
        5 * M * (M - 1) relations. The modalities of an utterance share its position.
        """
        table = tables.cross_modal(num_speakers, num_modalities)
        return cls(past, future, table, 5 * num_modalities * (num_modalities - 1))

    @classmethod
    def redifu_self(cls, num_speakers: int, window: int | None) -> RelationSpec:
        """ReDiFu's intra-speaker graph (liuying2023912/ReDiFu, dataloader.py); key = speaker.

        relation = released code - 1: 0 the node itself, 1 same speaker earlier, 2 same speaker
        later; 3 and 4 stay empty, so that one 5-row embedding serves this and `redifu_cross`.
        The window is symmetric. Released code 0 (no edge, padding) has no counterpart.
        """
        window = tables.window_side("window", window)
        return cls(window, window, tables.redifu_self(num_speakers), 5)

    @classmethod
    def redifu_cross(cls, num_speakers: int, window: int | None) -> RelationSpec:
        """ReDiFu's inter-speaker graph (liuying2023912/ReDiFu, dataloader.py); key = speaker.

        relation = released code - 1: 0 the node itself, 3 other speaker later, 4 other speaker
        earlier (against the order of `redifu_self`, where earlier comes first).
        """
        window = tables.window_side("window", window)
        return cls(window, window, tables.redifu_cross(num_speakers), 5)

    @classmethod
    def meld_complete(cls, num_speakers: int) -> RelationSpec:
        """ReDiFu's combined graph, unlimited as on MELD; key = speaker, 5 relations.

        relation = released code - 1: 0 the node itself, 1 same speaker *later*, 2 same speaker
        *earlier* (swapped against `redifu_self`), 3 other speaker later, 4 other speaker earlier.
        The released network builds this matrix and never uses it.
        """
        return cls(None, None, tables.redifu_combined(num_speakers), 5)

    @classmethod
    def dialoguegcn(cls, num_speakers: int, past: int | None, future: int | None) -> RelationSpec:
        """The graph of DialogueGCN (Ghosal et al. 2019) and COGMEN (Joshi et al. 2022).

        relation = 2 * (speaker of source * S + speaker of target) + (0 if the source is earlier
        else 1); the node itself counts as not earlier. Key = speaker, 2 S² relations.

        Args:
            num_speakers: S.
            past, future: the *original* settings wp and wf (there -1, here None, is unlimited).
                The originals measure them around the source, so that a target hears wf positions
                back and wp ahead: the spec's own `past` is wf and its `future` is wp.
        """
        past = tables.window_side("past", past)
        future = tables.window_side("future", future)
        return cls(future, past, tables.dialoguegcn(num_speakers), 2 * num_speakers**2)

    cogmen = dialoguegcn

    @classmethod
    def corect(cls, num_modalities: int, past: int | None, future: int | None) -> RelationSpec:
        """CORECT's multimodal graph (leson502/CORECT_EMNLP2023, GraphModel.py, edges temp_multi).

        Key = modality; the M modalities of an utterance share its position. Inside modality m:
        relation m if the source is earlier, M + m if later, 2 M + m at the same position. Between
        modalities only at the same position: 3 M + s * (M - 1) + t - (t > s) for source modality
        s and target modality t. 3 M + M (M - 1) relations.

        Args:
            num_modalities: M.
            past, future: the *original* settings wp and wf (there -1, here None, is unlimited).
                The original measures them around the source and leaves out the last future step,
                so that a target hears wf - 1 positions back and wp ahead; with wf = 0 it hears
                neither itself nor its own modality's past.
        """
        past = tables.window_side("past", past)
        future = tables.window_side("future", future)
        table = tables.corect(num_modalities, hears_itself=future != 0)
        heard_back = None if future is None else max(future - 1, 0)
        return cls(heard_back, past, table, num_modalities * (num_modalities + 2))


def _index(num_relations: int) -> int:
    try:
        return operator.index(num_relations)
    except TypeError:
        raise TypeError(f"num_relations must be an integer, got {num_relations!r}") from None
