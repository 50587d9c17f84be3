"""From the mask conventions of torch.nn.MultiheadAttention to those of the operations (private)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.masks import band_mask

HIDDEN = float("-inf")


class Masks(NamedTuple):
    """Masks as `rdfkern.diff_attention` takes them."""

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool
    window: tuple[int, int] | None


def translate_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
    q: Tensor,
    lk: int,
    extra: int,
) -> Masks:
    """Masks for Lk keys and `extra` ones behind them, which every query sees.

    Args:
        attn_mask: (Lq, Lk) or (B H, Lq, Lk); bool True is masked out, float is added.
        key_padding_mask: (B, Lk); bool True is padding, float is added.
        is_causal, window: as in `rdfkern.diff_attention`, over the Lk keys.
        q: (B, H, Lq, d), projected queries.
        lk: keys that the masks speak of.
        extra: keys appended by the module.

    Raises:
        TypeError: a mask is neither bool nor floating point.
        ValueError: a mask has another shape.
    """
    batch, heads, lq, _ = q.shape
    mask = None  # [B or 1, H or 1, Lq or 1, Lk]: bool True takes part, or added to the scores
    if attn_mask is not None:
        _check_dtype("attn_mask", attn_mask)
        shapes = [(lq, lk), (batch * heads, lq, lk)]
        if tuple(attn_mask.shape) not in shapes:
            raise ValueError(
                f"attn_mask must have shape (L, S) = {shapes[0]} or (B*H, L, S) = {shapes[1]}, "
                f"got {tuple(attn_mask.shape)}"
            )
        three_dims = attn_mask.dim() == 3
        mask = attn_mask.view(batch, heads, lq, lk) if three_dims else attn_mask[None, None]
        mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if key_padding_mask is not None:
        _check_dtype("key_padding_mask", key_padding_mask)
        if tuple(key_padding_mask.shape) != (batch, lk):
            raise ValueError(
                f"key_padding_mask must have shape (B, S) = {(batch, lk)}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.dtype != torch.bool:
            bias = key_padding_mask[:, None, None, :].to(q.dtype)
            mask, key_padding_mask = bias if mask is None else _combine(mask, bias), None
    if extra:
        band = band_mask(lq, lk, is_causal=is_causal, window=window, device=q.device)
        if band is not None:
            mask = band[None, None] if mask is None else _combine(mask, band)
        is_causal, window = False, None
        if mask is not None:
            mask = F.pad(mask, (0, extra), value=True if mask.dtype == torch.bool else 0.0)
        if key_padding_mask is not None:
            key_padding_mask = F.pad(key_padding_mask, (0, extra), value=False)
    return Masks(mask, key_padding_mask, is_causal, window)


def _combine(first: Tensor, second: Tensor) -> Tensor:
    """Both masks at once; each is bool (True takes part) or additive."""
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        return torch.where(first, second, HIDDEN)
    return torch.where(second, first, HIDDEN) if second.dtype == torch.bool else first + second


def _check_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True is masked out) or floating, got {mask.dtype}")
