"""Attention diffusion on the kernels of differential attention, with one map per step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends.dispatch import Arguments
from ..diff_attention import op


def kernel_arguments(arguments: Arguments) -> Arguments:
    """What the predicates of kernels ask about."""
    return {"q1": arguments["q"], "v": arguments["z0"], "attn_mask": None}


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
    impl: str,
) -> Tensor:
    """Recompute P inside each step, in the layout of the inputs and without a mask in memory.

    Z is rounded to its dtype by each step and by each mix.
    """
    z = z0
    for _ in range(steps):
        walked = op.attention(
            q,
            k,
            z,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            key_padding_mask=key_padding_mask,
            window=window,
            scale=scale,
            impl=impl,
        )
        z = torch.lerp(walked, z0, restart)
    return z
