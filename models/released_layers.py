"""Layers of the publicly released ReDiFu network, which `released` puts together.

Written from the network's formulas (arXiv 2603.25752 and its public source, commit 9d014886). What
looks odd here is what the released weights were trained with; `rdfkern.models.network` is the
network to train anew. Shapes: B dialogues padded to N utterances, width D.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.sdpa import masked_sdpa

NUM_RELATIONS = 6
RELATION_DIM = 10
RELATION_DROPOUT = 0.2
RELATION_SLOPE = 0.2
RELATION_HEADS = 2
ENCODER_EPS = 1e-6


def relation_codes(speaker: Tensor, mask: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Relation of every pair of utterances, between and within speakers.

    Args:
        speaker: (B, N) integer, the speaker of each utterance.
        mask: (B, N) bool, True where there is an utterance.
        window: utterances before and after the target that have a relation with it.

    Returns:
        across, within: (B, N, N) int64, first index the target. 0 is no relation and 1 the
        utterance itself; `across` has 4 for a later and 5 for an earlier utterance of another
        speaker; `within` has 2 for an earlier and 3 for a later one of the same speaker.
    """
    position = torch.arange(speaker.shape[1], device=speaker.device)
    later = position[None, :] - position[:, None]  # [N, N]
    near = (later.abs() <= window) & mask[:, :, None] & mask[:, None, :]  # [B, N, N]
    same = speaker[:, :, None] == speaker[:, None, :]
    across = torch.where(later > 0, 4, 5).masked_fill(same, 0).masked_fill(later == 0, 1)
    within = torch.where(later > 0, 3, 2).masked_fill(~same, 0).masked_fill(later == 0, 1)
    return across.masked_fill(~near, 0), within.masked_fill(~near, 0)


def add_sinusoid(x: Tensor) -> Tensor:
    """x (B, N, D) plus the sinusoid of Vaswani et al. 2017, of any length."""
    angle = _angles(x)
    return x + torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(x.dtype)


def rotate(x: Tensor) -> Tensor:
    """The features x (B, N, D) themselves turned by their position, in interleaved pairs."""
    angle = _angles(x)
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, D/2] each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _angles(x: Tensor) -> Tensor:
    width = x.shape[-1]
    exact = torch.promote_types(x.dtype, torch.float32)
    pair = torch.arange(0, width, 2, device=x.device, dtype=exact)
    position = torch.arange(x.shape[-2], device=x.device, dtype=exact)
    return position[:, None] * torch.exp(pair * (-math.log(10000.0) / width))  # [N, D/2]


class NeighbourDelta(nn.Module):
    """x + α · σ(W x + b) ⊙ LN(a depthwise convolution of x over three steps)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        change = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.alpha * self.gate(x).sigmoid() * change


class ScalarMix(nn.Module):
    """g · δ + (1 - g) · p with one scalar g = σ(wᵀ tanh(W LN([p; δ]))) for each step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.hidden = nn.Linear(2 * width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, p: Tensor, delta: Tensor) -> Tensor:
        hidden = self.hidden(self.norm(torch.cat((p, delta), dim=-1))).tanh()
        return torch.lerp(p, delta, self.score(hidden).sigmoid())


class ShiftedKeyAttention(nn.Module):
    """λ · dropout(A1 - A2) V, where A2 attends with the keys of one step earlier.

    The scale is D^-1/2, not that of a head. The shifted keys wrap around the padded length and
    their mask does not shift with them, so the padding changes the result.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.lam = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        shifted = k.roll(1, dims=-2)
        visible = mask[:, None, None, :]  # [B, 1, 1, N]
        if self.training and self.dropout.p > 0.0:
            difference = self._map(q, k, visible) - self._map(q, shifted, visible)
            mixed = self.dropout(difference) @ v
        else:
            now = masked_sdpa(q, k, v, visible=visible, scale=self.scale)
            mixed = now - masked_sdpa(q, shifted, v, visible=visible, scale=self.scale)
        return self.out((self.lam * mixed).transpose(1, 2).flatten(-2))

    def _map(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        scores = q @ k.mT * self.scale
        return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)


class TwiceResidualFeedForward(nn.Module):
    """y + W2 gelu(W1 LN(y)); the caller adds y once more.

    The GELU is the tanh form with a prefactor that only one variant has at its usual 0.5.
    """

    def __init__(self, width: int, gelu_factor: float, dropout: float) -> None:
        super().__init__()
        self.gelu_factor = gelu_factor
        self.norm = nn.LayerNorm(width, eps=ENCODER_EPS)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, y: Tensor) -> Tensor:
        hidden = 2.0 * self.gelu_factor * F.gelu(self.expand(self.norm(y)), approximate="tanh")
        return y + self.dropout(self.contract(self.dropout(hidden)))


class Denoiser(nn.Module):
    """The "differential Transformer" of one modality other than text, with one layer.

    Args:
        rotary: positions turn the features; otherwise a sinusoid is added to them.
        residual: factor of the layer's output beside the features with position and speaker.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rotary: bool,
        gelu_factor: float,
        residual: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.position = rotate if rotary else add_sinusoid
        self.residual = residual
        self.dropout = nn.Dropout(dropout)
        self.delta = NeighbourDelta(width)
        self.mix = ScalarMix(width)
        self.norm = nn.LayerNorm(width, eps=ENCODER_EPS)
        self.attention = ShiftedKeyAttention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=ENCODER_EPS)
        self.feed_forward = TwiceResidualFeedForward(width, gelu_factor, dropout)
        self.feed_forward_norm = nn.LayerNorm(width, eps=ENCODER_EPS)

    def forward(self, x: Tensor, speaker: Tensor, mask: Tensor) -> Tensor:
        """x, speaker (the embedded speakers): (B, N, D); mask (B, N), True is an utterance."""
        p = self.dropout(self.position(x) + speaker)
        h = self.norm(self.mix(p, self.delta(x)) + p)
        h = self.attention_norm(h + self.attention(h, mask))
        h = self.feed_forward_norm(h + self.feed_forward(h))
        return p + self.residual * h


class RelationHead(nn.Module):
    """One attention over related utterances: LN(Σ_j α_ij W h_j).

    The score aᵀ[W h_i ‖ W h_j ‖ r_ij] is taken apart into one term for the target, one for the
    source and one for the relation, so that no (N, N, 2D + 10) tensor exists. A row without any
    relation (padding) attends uniformly to all N.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_width, out_width))
        self.score = nn.Parameter(torch.empty(2 * out_width + RELATION_DIM, 1))
        self.norm = nn.LayerNorm(out_width)
        nn.init.xavier_uniform_(self.weight, gain=1.414)
        nn.init.xavier_uniform_(self.score, gain=1.414)

    def forward(self, h: Tensor, codes: Tensor, relation_embedding: Tensor) -> Tensor:
        """h (B, N, in), codes (B, N, N), relation_embedding (6, 10) to (B, N, out)."""
        h = h @ self.weight
        width = h.shape[-1]
        target, source, relation = self.score.split((width, width, RELATION_DIM))
        by_relation = (relation_embedding @ relation).squeeze(-1)  # [6]
        scores = F.leaky_relu(
            h @ target + (h @ source).mT + by_relation[codes], RELATION_SLOPE
        )  # [B, N, N]
        scores = scores.masked_fill(codes == 0, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(dim=-1), RELATION_DROPOUT, self.training)
        return self.norm(weights @ h)


class RelationLayer(nn.Module):
    """Two relation heads, a third over both that joins them, a linear layer and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(RelationHead(width, width) for _ in range(RELATION_HEADS))
        self.join = RelationHead(RELATION_HEADS * width, width)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, codes: Tensor, relation_embedding: Tensor) -> Tensor:
        """x (B, N, D), codes (B, N, N), relation_embedding (6, 10) to (B, N, D)."""
        y = F.dropout(x, RELATION_DROPOUT, self.training)
        y = torch.cat([F.gelu(head(y, codes, relation_embedding)) for head in self.heads], dim=-1)
        y = F.dropout(y, RELATION_DROPOUT, self.training)
        y = F.gelu(self.join(y, codes, relation_embedding))
        return self.norm(self.project(y) + x)


class FusionTarget(nn.Module):
    """One modality that gathers from the two others by attention that padding takes part in.

    Queries, keys and values come from one bias-free projection, whichever modality they are of.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)
        widths = (width, 4 * width, 4 * width, 4 * width, width)
        self.mlp = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.dropout = nn.Dropout(dropout)

    def gather(self, normed: Tensor, other: Tensor) -> Tensor:
        """Attention from this modality to another, both normalised, (B, N, D)."""
        width = normed.shape[-1]
        q = F.linear(normed, self.qkv.weight[:width])
        k, v = F.linear(other, self.qkv.weight[width:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout_p = self.dropout.p if self.training else 0.0
        out = masked_sdpa(q, k, v, visible=None, dropout_p=dropout_p, scale=self.scale)
        return self.dropout(self.out(out.transpose(1, 2).flatten(-2)))

    def forward(self, x: Tensor, gathered: Tensor) -> Tensor:
        """x + MLP(a gated mean of x and what was gathered), all (B, N, D)."""
        gate = self.gate(torch.cat((x, gathered), dim=-1)).sigmoid()
        y = x * gate + gathered * (1.0 - gate)
        for layer in self.mlp[:-1]:
            y = self.dropout(F.gelu(layer(y)))
        return x + self.dropout(self.mlp[-1](y))


class MutualFusion(nn.Module):
    """Every modality gathers from the two others; the same for text as for the rest."""

    def __init__(self, modalities: tuple[str, ...], width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.targets = nn.ModuleDict(
            {name: FusionTarget(width, heads, dropout) for name in modalities}
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Modality to (B, N, D) in, the same out."""
        normed = {name: target.norm(features[name]) for name, target in self.targets.items()}
        fused = {}
        for name, target in self.targets.items():
            gathered = [target.gather(normed[name], normed[o]) for o in normed if o != name]
            fused[name] = target(features[name], sum(gathered[1:], gathered[0]))
        return fused
