"""The meaning of attention diffusion: Z_{t+1} = (1 - r) P Z_t + r Z_0."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import masked_softmax
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
    """Materialise P, then multiply by it `steps` times; half types are computed in float32."""
    dtype = z0.dtype
    compute = torch.promote_types(dtype, torch.float32)
    q, k, z0, visible, restore = dense_layout(
        q.to(compute),
        k.to(compute),
        z0.to(compute),
        key_padding_mask,
        cu_seqlens,
        max_seqlen,
        window,
    )
    transition = masked_softmax(q @ k.mT * scale, visible)  # [B, H, L, L]
    z = z0
    for _ in range(steps):
        z = (1.0 - restart) * (transition @ z) + restart * z0
    return restore(z).to(dtype)
