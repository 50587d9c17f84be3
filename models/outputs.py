"""What every network of this package returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Class scores of T packed utterances.

    Attributes:
        fused: (T, C) logits of the fused head; the prediction is their argmax.
        per_modality: modality to (T, C) logits of its own head, for the auxiliary losses.
    """

    fused: Tensor
    per_modality: dict[str, Tensor]
