"""Predicted classes of whole dialogues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from .data import Dialogue, collate
from .sampling import fill_batches


def mixed_precision(device: torch.device, autocast: str) -> torch.autocast:
    """Context of a forward pass: autocast to bfloat16, or nothing for `none`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast == "bfloat16")


@torch.no_grad()
def predict(
    network: nn.Module,
    dialogues: Sequence[Dialogue],
    dims: Mapping[str, int],
    vocabulary: Mapping[str, int],
    *,
    device: torch.device,
    batch_utterances: int,
    autocast: str = "none",
) -> list[np.ndarray]:
    """Argmax of the fused head, in evaluation mode (the mode is restored).

    Returns:
        One (T,) int64 array of classes per dialogue.
    """
    training = network.training
    network.eval()
    lengths = [len(dialogue) for dialogue in dialogues]
    classes: list[np.ndarray] = []
    for batch in fill_batches(range(len(dialogues)), lengths, batch_utterances):
        packed = collate([dialogues[index] for index in batch], dims, vocabulary).to(device)
        with mixed_precision(device, autocast):
            fused = network(packed).fused
        ends = np.cumsum([lengths[index] for index in batch])
        classes += np.split(fused.argmax(1).cpu().numpy(), ends[:-1])
    network.train(training)
    return classes
