"""Relation tables (K, K, 3) of the ready-made conversation graphs.

`table[key of target, key of source, direction]`, see `RelationSpec`, whose class methods document
every numbering.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

EARLIER, SAME_POSITION, LATER = 0, 1, 2


def window_side(name: str, distance: int | None) -> int | None:
    """A distance in positions, or None for unlimited; raises TypeError or ValueError."""
    if distance is None:
        return None
    if isinstance(distance, bool) or not hasattr(distance, "__index__"):
        raise TypeError(f"{name} must be an integer or None (unlimited), got {distance!r}")
    distance = operator.index(distance)
    if distance < 0:
        raise ValueError(f"{name} must be at least 0, or None for unlimited, got {distance}")
    return distance


def redifu_self(num_speakers: int) -> Tensor:
    return _same_or_other(num_speakers, same=(1, 0, 2), other=(-1, -1))


def redifu_cross(num_speakers: int) -> Tensor:
    return _same_or_other(num_speakers, same=(-1, 0, -1), other=(4, 3))


def redifu_combined(num_speakers: int) -> Tensor:
    return _same_or_other(num_speakers, same=(2, 0, 1), other=(4, 3))


def speaker_direction(num_speakers: int) -> Tensor:
    return _same_or_other(num_speakers, same=(0, 1, 2), other=(3, 4))


def cross_modal(num_speakers: int, num_modalities: int) -> Tensor:
    _check_count("num_modalities", num_modalities, 2)
    kind = speaker_direction(num_speakers)  # [S, S, 3]
    target = torch.arange(num_modalities)[:, None]
    source = torch.arange(num_modalities)[None, :]
    pair = target * (num_modalities - 1) + source - (source > target).long()  # [M, M]
    connected = (kind >= 0)[:, None, :, None, :] & (target != source)[None, :, None, :, None]
    relation = 5 * pair[None, :, None, :, None] + kind[:, None, :, None, :]  # [S, M, S, M, 3]
    keys = num_speakers * num_modalities
    return torch.where(connected, relation, -1).reshape(keys, keys, 3)


def dialoguegcn(num_speakers: int) -> Tensor:
    _check_count("num_speakers", num_speakers, 1)
    speaker = torch.arange(num_speakers)
    pair = speaker[None, :] * num_speakers + speaker[:, None]  # [target, source]
    not_earlier = torch.tensor([0, 1, 1])
    return 2 * pair[:, :, None] + not_earlier


def corect(num_modalities: int, *, hears_itself: bool) -> Tensor:
    """`hears_itself=False` leaves out the edges of a modality to its own present and past."""
    _check_count("num_modalities", num_modalities, 1)
    target = torch.arange(num_modalities)[:, None]
    source = torch.arange(num_modalities)[None, :]
    table = torch.full((num_modalities, num_modalities, 3), -1)
    table[:, :, SAME_POSITION] = (
        3 * num_modalities + source * (num_modalities - 1) + target - (target > source).long()
    )
    own = torch.arange(num_modalities)
    table[own, own, EARLIER] = own if hears_itself else -1
    table[own, own, SAME_POSITION] = 2 * num_modalities + own if hears_itself else -1
    table[own, own, LATER] = num_modalities + own
    return table


def _same_or_other(
    num_speakers: int, *, same: tuple[int, int, int], other: tuple[int, int]
) -> Tensor:
    """`same` by direction; `other` for earlier and later, never at the same position."""
    _check_count("num_speakers", num_speakers, 1)
    is_same = torch.eye(num_speakers, dtype=torch.bool)[:, :, None]
    earlier, later = other
    return torch.where(is_same, torch.tensor(same), torch.tensor((earlier, -1, later)))


def _check_count(name: str, count: int, lowest: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {count!r}")
    if count < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {count}")
