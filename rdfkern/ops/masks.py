"""Which keys a query may see: the one definition of causal and window masks."""

from __future__ import annotations

import torch
from torch import Tensor


def band_mask(
    lq: int,
    lk: int,
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Boolean mask of the keys that causal and window masking leave, or None if they leave all.

    Query i stands at key i + Lk - Lq (bottom-right alignment: the last query sees the last key).
    With `window=(left, right)` it sees `left` keys before that one and `right` after it,
    inclusively, -1 meaning no limit; `is_causal` sets `right` to 0.

    Returns:
        (Lq, Lk) bool, True where the key takes part.
    """
    left, right = (-1, -1) if window is None else window
    if is_causal:
        right = 0
    if left < 0 and right < 0:
        return None
    offset = torch.arange(lk, device=device)[None, :] - (
        torch.arange(lq, device=device)[:, None] + (lk - lq)
    )  # [Lq, Lk]
    mask = torch.ones((lq, lk), dtype=torch.bool, device=device)
    if left >= 0:
        mask &= offset >= -left
    if right >= 0:
        mask &= offset <= right
    return mask


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last dimension among visible entries; a row with none is all zeros.

    Args:
        scores: (..., Lq, Lk), may hold -inf, which counts as not visible.
        visible: bool, broadcastable to `scores`, or None for all.
    """
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if scores.shape[-1] == 0:
        return scores
    alive = (scores > float("-inf")).any(dim=-1, keepdim=True)  # [..., Lq, 1]
    # A dead row gets finite scores first: softmax of a row of -inf has a NaN gradient.
    return torch.softmax(scores.masked_fill(~alive, 0.0), dim=-1) * alive
