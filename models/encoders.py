"""From feature vectors to denoised streams: input projection, positions, Transformer layers."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .. import diffusion_attention, temporal_diff_attention
from ..nn import DiffTransformerEncoderLayer

Denoise = Literal["differential", "temporal", "plain", "none"]
FEEDFORWARD = 2  # width of the feed-forward layers, in units of the network's width


class InputEncoder(nn.Module):
    """One modality's features, standardised, projected to the network's width and normalised.

    The statistics are buffers, the identity until `set_statistics`; they travel with the weights.

    Args:
        dim: feature width of the modality.
        width: D.
        dropout: probability.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.project = nn.Linear(dim, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the training split's (dim,) mean and standard deviation; a zero one counts as 1."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """(T, dim), any floating dtype, to (T, D)."""
        features = features.to(self.mean.dtype)
        return self.dropout(self.norm(self.project((features - self.mean) / self.std)))


def sinusoidal_positions(position: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of (T,) positions (Vaswani et al. 2017, section 3.5); no length limit.

    Returns:
        (T, width): sines in the first half of the columns, cosines in the second.
    """
    half = (width + 1) // 2
    index = torch.arange(half, device=position.device, dtype=torch.float64)
    # The angle of a far position needs more digits than float32 has.
    frequency = torch.exp(index * (-math.log(10000.0) / half))
    angle = position.to(torch.float64)[:, None] * frequency  # [T, half]
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width].to(dtype)


class SelfAttention(nn.Module):
    """Packed self-attention with one softmax map, or with ReDiFu's temporal difference of it.

    Args:
        width: D.
        heads: must divide D.
        temporal: subtract from each map the one made with the keys of one step earlier,
            `lam * (A(k_t) - A(k_{t-1}))` (released ReDiFu); else plain attention.
    """

    def __init__(self, width: int, heads: int, *, temporal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.lam = nn.Parameter(torch.tensor(0.5)) if temporal else None

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, D) to (T, D), each dialogue for itself."""
        rows, width = x.shape
        q, k, v = (
            self.in_proj(x).view(rows, 3, self.heads, width // self.heads).unbind(1)
        )  # [T, H, D / H]
        if self.lam is not None:
            mixed = temporal_diff_attention(
                q, k, v, self.lam, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
        else:
            # One step of diffusion without a restart.
            mixed = diffusion_attention(
                q, k, v, steps=1, restart=0.0, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
        return self.out_proj(mixed.reshape(rows, width))


class SelfAttentionLayer(nn.Module):
    """Post-norm Transformer layer around `SelfAttention`, of `DiffTransformerEncoderLayer`'s shape.

    Args: as `SelfAttention`; `dropout` acts on both branches and inside the feed-forward net.
    """

    def __init__(self, width: int, heads: int, *, temporal: bool, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, temporal=temporal)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feedforward = nn.Sequential(
            nn.Linear(width, FEEDFORWARD * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(FEEDFORWARD * width, width),
        )

    def forward(self, x: Tensor, *, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, D) to (T, D)."""
        x = self.norm1(x + self.dropout(self.attention(x, cu_seqlens, max_seqlen)))
        return self.norm2(x + self.dropout(self.feedforward(x)))


class EnhancedFilter(nn.Module):
    """x ⊙ sigmoid(W x + b): a gate that damps single features (ReDiFu, released code)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x * torch.sigmoid(self.gate(x))


class Denoiser(nn.Module):
    """Transformer layers over one modality, and a filter of what they make of it.

    Attention maps are not dropped out, unlike in the released network: on a CPU, attention with
    dropout keeps every map in memory, which takes gigabytes for a dialogue of 3,000 utterances.

    Args:
        width: D.
        heads: attention heads.
        layers: how many.
        denoise: attention of the layers (`NetworkConfig.denoise`), not `none`.
        dropout: probability.
    """

    def __init__(
        self, width: int, heads: int, layers: int, denoise: Denoise, dropout: float
    ) -> None:
        super().__init__()

        def layer(depth: int) -> nn.Module:
            if denoise != "differential":
                temporal = denoise == "temporal"
                return SelfAttentionLayer(width, heads, temporal=temporal, dropout=dropout)
            # As in ReDiFu without a norm per head, which would take the size of a difference away.
            made = DiffTransformerEncoderLayer(
                width,
                heads,
                FEEDFORWARD * width,
                dropout,
                activation="gelu",
                depth=depth,
                norm=False,
            )
            made.self_attn.dropout = 0.0
            return made

        self.layers = nn.ModuleList(layer(depth) for depth in range(layers))
        self.filter = EnhancedFilter(width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, D) to (T, D), each dialogue for itself."""
        denoised = x
        for layer in self.layers:
            denoised = layer(denoised, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return self.filter(denoised)
