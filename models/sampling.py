"""Order and batches of the training dialogues: pure functions of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fill_batches(
    order: Sequence[int], lengths: Sequence[int], utterances: int, dialogues: int | None = None
) -> list[list[int]]:
    """Cut an order of whole dialogues into batches.

    Args:
        order: indices of dialogues.
        lengths: utterances of each dialogue.
        utterances: most utterances of a batch; a longer dialogue makes a batch of its own.
        dialogues: most dialogues of a batch; None is unlimited.

    Returns:
        Batches of dialogue indices that together keep the order; none is empty.
    """
    batches: list[list[int]] = []
    filled = 0
    for index in order:
        full = dialogues is not None and bool(batches) and len(batches[-1]) >= dialogues
        if not batches or full or filled + lengths[index] > utterances:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += lengths[index]
    return batches


def epoch_batches(
    lengths: Sequence[int], utterances: int, dialogues: int | None, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of one epoch: the dialogues shuffled by (seed, epoch), then `fill_batches`."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    return fill_batches(order.tolist(), lengths, utterances, dialogues)


def shares(batch: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Split a batch over processes: each dialogue, longest first, to the least loaded one.

    Returns:
        One list of dialogue indices per process; empty for some where dialogues are few.
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(batch, key=lambda index: -lengths[index]):
        rank = load.index(min(load))
        parts[rank].append(index)
        load[rank] += lengths[index]
    return parts
