"""Scaled dot-product attention of torch with masks that may leave a row without keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .masks import band_mask


def masked_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float,
) -> Tensor:
    """softmax(q kᵀ · scale + bias, among visible keys) v; a row without a visible key is 0.

    Such a row has zero gradients too. Head dims are zero-padded to be equal, which the memory-lean
    implementations of SDPA ask for. Empty inputs keep their place in the autograd graph.

    Args:
        q: (B, H, Lq, D), D >= 1.
        k: (B, H, Lk, D).
        v: (B, H, Lk, Dv).
        visible: bool with four dimensions that broadcast to (B, H, Lq, Lk), True where the key
            takes part, or None for all.
        is_causal: a query sees no later key, aligned to the bottom right (see `masks.band_mask`).
        bias: of q's dtype, four dimensions that broadcast to (B, H, Lq, Lk), added to the scores;
            -inf hides a key.
        dropout_p: probability of dropping an entry of the softmax, applied whenever it is above 0.
        scale: factor of the dot products.

    Returns:
        (B, H, Lq, Dv), of q's dtype.
    """
    lq, lk, value_dim = q.shape[-2], k.shape[-2], v.shape[-1]
    if q.numel() == 0 or v.numel() == 0:
        scores = q @ k.mT if bias is None else q @ k.mT + bias
        return scores @ v
    if is_causal and (visible is not None or bias is not None or lq != lk):
        band = band_mask(lq, lk, is_causal=True, window=None, device=q.device)
        visible = band[None, None] if visible is None else visible & band
        is_causal = False
    mask, alive = _keep_rows_alive(visible, bias)
    head_dim = max(q.shape[-1], value_dim)
    out = F.scaled_dot_product_attention(
        _widen(q, head_dim),
        _widen(k, head_dim),
        _widen(v, head_dim),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
    )[..., :value_dim]
    return out if alive is None else out.masked_fill(~alive, 0.0)


def _keep_rows_alive(
    visible: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The mask for SDPA with every dead row opened, and (..., Lq or 1, 1) bool: the other rows.

    A row of -inf would be NaN in SDPA or its backward; the caller zeroes what opened rows give.
    """
    if bias is not None:
        mask = bias if visible is None else bias.masked_fill(~visible, float("-inf"))
        alive = (mask > float("-inf")).any(dim=-1, keepdim=True)
        return mask.masked_fill(~alive, 0.0), alive
    if visible is None:
        return None, None
    alive = visible.any(dim=-1, keepdim=True)
    return visible | ~alive, alive


def _widen(tensor: Tensor, head_dim: int) -> Tensor:
    missing = head_dim - tensor.shape[-1]
    return tensor if missing == 0 else F.pad(tensor, (0, missing))
