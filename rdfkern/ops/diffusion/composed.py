"""Attention diffusion as one SDPA call per step: P is never in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sdpa import masked_sdpa
from .layout import dense_layout


def diffusion_attention(
    q: Tensor,
    k: Tensor,
    z0: Tensor,
    *,
    steps: int,
    restart: float,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    window: tuple[int, int] | None,
    scale: float,
) -> Tensor:
    """Recompute P inside each step; Z is rounded to its dtype by each SDPA and by each mix."""
    q, k, z0, visible, restore = dense_layout(
        q, k, z0, key_padding_mask, cu_seqlens, max_seqlen, window
    )
    z = z0
    for _ in range(steps):
        z = torch.lerp(masked_sdpa(q, k, z, visible=visible, scale=scale), z0, restart)
    return restore(z)
