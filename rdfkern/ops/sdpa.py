"""Scaled dot-product attention of torch with masks that may leave a row without keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .heads import heads_of_groups, repeat_heads, rows_of_groups
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
    implementations of SDPA ask for; not for a single query, whose scores are smaller than copies of
    keys. Keys and values of several query heads are repeated only where a mask differs from query
    to query. Empty inputs keep their place in the autograd graph.

    Args:
        q: (B, H, Lq, D), D >= 1.
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, Dv).
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
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.numel() == 0 or v.numel() == 0:
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
        scores = q @ k.mT if bias is None else q @ k.mT + bias
        return scores @ v
    is_causal = is_causal and lq > 1  # the last query sees every key
    if is_causal and (visible is not None or bias is not None or lq != lk):
        band = band_mask(lq, lk, is_causal=True, window=None, device=q.device)
        visible = band[None, None] if visible is None else visible & band
        is_causal = False
    mask, alive = _keep_rows_alive(visible, bias)
    grouped = heads != kv_heads and not is_causal and _fits_groups(mask, lq)
    if grouped:
        q = rows_of_groups(q, kv_heads)
        mask = mask if mask is None or mask.shape[1] == 1 else rows_of_groups(mask, kv_heads)
    else:
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    head_dim = max(q.shape[-1], value_dim)
    if lq > 1:
        q, k, v = (_widen(x, head_dim) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )[..., :value_dim]
    out = heads_of_groups(out, lq) if grouped else out
    return out if alive is None else out.masked_fill(~alive, 0.0)


def _fits_groups(mask: Tensor | None, lq: int) -> bool:
    """Whether a mask, (B, 1 or H, 1 or Lq, Lk), has one row for all queries of a group."""
    return mask is None or (mask.shape[2] == 1 and (mask.shape[1] == 1 or lq == 1))


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
