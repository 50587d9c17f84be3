"""Text-guided fusion of the modalities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import TextGuidedDiffusion


class TextGuidedFusion(nn.Module):
    """The other modalities, diffused along the text's self-attention, enter the text stream.

    z_0 = W_v [others], z = z_0 + diffusion(text, z_0) with queries and keys from text,
    g = sigmoid(W_g [text ; z]), and the fused stream is LN(text + MLP(g ⊙ text + (1 - g) ⊙ z)). The
    concatenated modalities are projected to D before they are diffused, which costs less than
    after and spans the same maps.

    Args:
        width: D.
        heads: attention heads of the text; must divide D.
        others: modalities besides text, at least 1.
        steps: diffusion steps K; None leaves the diffusion out: z = z_0.
        restart: restart probability of the diffusion.
        dropout: probability.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        others: int,
        *,
        steps: int | None,
        restart: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(others * width, width)
        self.diffusion = (
            None if steps is None else TextGuidedDiffusion(width, width, heads, steps, restart)
        )
        self.gate = nn.Linear(2 * width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.Dropout(dropout),
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, text: Tensor, others: list[Tensor], cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Text (T, D) and the other streams, (T, D) each, to the fused stream (T, D)."""
        z = self.project(torch.cat(others, dim=1))
        if self.diffusion is not None:
            z = z + self.diffusion(text, z, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        gate = torch.sigmoid(self.gate(torch.cat([text, z.to(text.dtype)], dim=1)))
        mixed = z + gate * (text - z)
        return self.norm(text + self.mlp(mixed))
