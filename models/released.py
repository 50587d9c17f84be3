"""The publicly released ReDiFu network with its exact arithmetic, to compare results and speed.

Same weights give the same logits as the public source (arXiv 2603.25752, its repository at commit
9d014886), in both of its configurations. That includes what one would not do again: results depend
on how far a dialogue is padded, and so on its batch mates. Differences that change no value:
sinusoids are computed for any length (the public table ends at 512 utterances), the relation scores
are never expanded to (N, N, 2D + 10), relation codes take no loops, and the six self-attentions
that the public source computes and throws away are left out. Attention dropout in the fusion draws
other random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._backends.checks import check_integers_in, check_shape
from ..ops.packing import Packing
from .data import UNLABELLED, Batch
from .loss import Objective, combine_released
from .outputs import Outputs
from .released_layers import (
    NUM_RELATIONS,
    RELATION_DIM,
    Denoiser,
    MutualFusion,
    RelationLayer,
    relation_codes,
)
from .released_names import RELEASED_NAMES, from_released

MODALITIES = ("text", "audio", "visual")


@dataclass(frozen=True)
class ReleasedVariant:
    """What the two released configurations differ in.

    Attributes:
        width: hidden width D.
        heads: heads of the shifted-key attention.
        fusion_heads: heads of the fusion attention.
        window: utterances on each side that a relation reaches.
        dropout: everywhere but in the relation layers, which have 0.2.
        rotary: positions turn the audio and visual features; otherwise a sinusoid is added.
        gelu_factor: prefactor of the tanh GELU; 0.5 is the usual one.
        residual: factor of the denoising layer's output.
        head_residual: the heads see the fused features plus those before the fusion.
        head_slope: slope below zero of the activation in the heads.
        modality_weights: factors of the text, audio and visual logits in the final ones.
        num_speakers: speakers that a dialogue can have.
    """

    width: int
    heads: int
    fusion_heads: int
    window: int
    dropout: float
    rotary: bool
    gelu_factor: float
    residual: float
    head_residual: bool
    head_slope: float
    modality_weights: tuple[float, float, float]
    num_speakers: int


VARIANTS = {
    "iemocap": ReleasedVariant(
        width=512,
        heads=64,
        fusion_heads=32,
        window=20,
        dropout=0.5,
        rotary=True,
        gelu_factor=0.5,
        residual=0.5,
        head_residual=True,
        head_slope=0.01,
        modality_weights=(1.0, 1.0, 0.4),
        num_speakers=2,
    ),
    "meld": ReleasedVariant(
        width=256,
        heads=16,
        fusion_heads=16,
        window=25,
        dropout=0.6,
        rotary=False,
        gelu_factor=0.66,
        residual=1.0,
        head_residual=False,
        head_slope=0.0,
        modality_weights=(3.0, 1.0, 0.3),
        num_speakers=9,
    ),
}


class ReleasedReDiFu(nn.Module):
    """The released network.

    Args:
        variant: `iemocap` or `meld`.
        dims: width of the `text`, `audio` and `visual` features; all three and no others.
        num_classes: emotions C.
        num_speakers: speakers S that a dialogue can have. The embedding has one more row, S, for
            padding.
        dropout, width, heads, fusion_heads, window: as `ReleasedVariant`. Each of these and
            `num_speakers` is None for the released value.

    Raises:
        ValueError: an argument is not as above, or heads do not divide the width.
    """

    def __init__(
        self,
        variant: str,
        dims: Mapping[str, int],
        num_classes: int,
        num_speakers: int | None = None,
        dropout: float | None = None,
        *,
        width: int | None = None,
        heads: int | None = None,
        fusion_heads: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if set(dims) != set(MODALITIES):
            raise ValueError(f"dims must name exactly {MODALITIES}, got {tuple(dims)}")
        given = {
            "num_speakers": num_speakers,
            "dropout": dropout,
            "width": width,
            "heads": heads,
            "fusion_heads": fusion_heads,
            "window": window,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        self.variant = _checked(replace(VARIANTS[variant], **changes))
        num_speakers = self.variant.num_speakers
        counts = {"num_classes": num_classes, "num_speakers": num_speakers}
        for name, count in (counts | {f"dims[{m!r}]": dims[m] for m in MODALITIES}).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.dims = {name: dims[name] for name in MODALITIES}
        self.num_speakers = num_speakers
        width, dropout = self.variant.width, self.variant.dropout
        self.speaker_embedding = nn.Embedding(num_speakers + 1, width, padding_idx=num_speakers)
        self.relation_embedding = nn.Embedding(NUM_RELATIONS, RELATION_DIM)
        self.inputs = nn.ModuleDict({m: nn.Linear(dims[m], width) for m in MODALITIES})
        self.across_speakers = RelationLayer(width)
        self.within_speaker = RelationLayer(width)
        self.denoisers = nn.ModuleDict(
            {
                name: Denoiser(
                    width,
                    self.variant.heads,
                    rotary=self.variant.rotary,
                    gelu_factor=self.variant.gelu_factor,
                    residual=self.variant.residual,
                    dropout=dropout,
                )
                for name in MODALITIES[1:]
            }
        )
        self.filters = nn.ModuleDict({m: nn.Linear(width, width) for m in MODALITIES[1:]})
        self.fusion = MutualFusion(MODALITIES, width, self.variant.fusion_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict({m: nn.Linear(width, num_classes) for m in MODALITIES})

    def forward(self, batch: Batch) -> Outputs:
        """Logits of T packed utterances; dialogues are padded to the longest one inside.

        Speakers are `batch.speaker`, numbered by first appearance. The released IEMOCAP weights
        number them by gender (male 0, female 1): call `forward_padded` with such numbers for them.

        Raises:
            ValueError: a modality is missing, or a dialogue has more than `num_speakers` speakers.
        """
        missing = [name for name in MODALITIES if name not in batch.features]
        if missing:
            raise ValueError(
                f"the released network needs {MODALITIES}, "
                f"but the batch has no {', '.join(missing)} features"
            )
        if batch.num_speakers > self.num_speakers:
            raise ValueError(
                f"a dialogue of the batch has {batch.num_speakers} speakers, "
                f"but the network was made with num_speakers={self.num_speakers}"
            )
        total = batch.speaker.shape[0]
        # The convolution wants a step, even where every dialogue is empty.
        packing = Packing.from_cu_seqlens(batch.cu_seqlens, total, max(batch.max_seqlen, 1))
        padded = self.forward_padded(
            *(packing.pad(batch.features[name]) for name in MODALITIES),
            packing.pad(batch.speaker),
            packing.valid,
        )
        fused, *per_modality = map(packing.unpad, padded)
        return Outputs(fused, dict(zip(MODALITIES, per_modality, strict=True)))

    def forward_padded(
        self, text: Tensor, audio: Tensor, visual: Tensor, speaker: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of B dialogues padded to N >= 1 utterances.

        Args:
            text, audio, visual: (B, N, dim), zeros in the padding as released.
            speaker: (B, N) int64 in [0, num_speakers); any such value in the padding.
            mask: (B, N) bool, True for utterances, which come before the padding.

        Returns:
            The weighted final logits, then those of text, audio and visual, each (B, N, C).

        Raises:
            TypeError: `mask` is not bool or `speaker` not integer.
            ValueError: a shape or a speaker is wrong, or a mask has an utterance after padding.
        """
        batch, length = mask.shape
        given = dict(zip(MODALITIES, (text, audio, visual), strict=True))
        for name, value in given.items():
            check_shape(name, value, (batch, length, self.dims[name]), f"(B, N, dims[{name!r}])")
        check_shape("speaker", speaker, (batch, length), "(B, N)")
        check_integers_in("speaker", speaker, self.num_speakers, "num_speakers")
        _check_prefix(mask)

        x = {name: self.inputs[name](given[name]) for name in MODALITIES}
        across, within = relation_codes(speaker, mask, self.variant.window)
        relations = self.relation_embedding.weight
        x["text"] = self.across_speakers(x["text"], across, relations)
        x["text"] = self.within_speaker(x["text"], within, relations)
        voices = self.speaker_embedding(speaker.masked_fill(~mask, self.num_speakers))
        for name, denoiser in self.denoisers.items():
            denoised = denoiser(x[name], voices, mask)
            x[name] = denoised * self.filters[name](denoised).sigmoid()

        fused = self.fusion(x)
        logits = [self._head(name, fused[name], x[name]) for name in MODALITIES]
        weighted = [w * y for w, y in zip(self.variant.modality_weights, logits, strict=True)]
        return sum(weighted[1:], weighted[0]), *logits

    def load_released_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights under the public source's names (`released_names.RELEASED_NAMES`).

        Raises:
            ValueError: a name is unknown or missing, or a shape is wrong; the message names it.
        """
        renamed = from_released(state_dict)
        ours = self.state_dict()
        for released, name in RELEASED_NAMES.items():
            if ours[name].shape != state_dict[released].shape:
                raise ValueError(
                    f"{released} must have shape {tuple(ours[name].shape)} in this network, "
                    f"got {tuple(state_dict[released].shape)}"
                )
        self.load_state_dict(renamed)

    def _head(self, name: str, fused: Tensor, before: Tensor) -> Tensor:
        seen = fused + before if self.variant.head_residual else fused
        return self.heads[name](self.dropout(F.leaky_relu(seen, self.variant.head_slope)))


def released_loss(outputs: Outputs, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """NLL of the final logits + 0.1 · Σ over modalities of the squared NLL of their logits.

    Each NLL is a mean over labelled utterances, weighted by the weight of their class.

    Args:
        outputs: of `ReleasedReDiFu`.
        labels: (T,) int64, `UNLABELLED` where there is none; 0 if no utterance has a label.
        class_weights: (C,), or None for equal weights. As released, IEMOCAP takes the inverse
            frequency of each class and MELD none.
    """
    objective = Objective(0.0, class_weights, combine_released)
    weights = torch.ones_like(outputs.fused[0]) if class_weights is None else class_weights
    count = (weights[labels.clamp_min(0)] * (labels != UNLABELLED)).sum()
    return objective.loss(objective.sums(outputs, labels) / count.masked_fill(count == 0, 1.0))


def _checked(variant: ReleasedVariant) -> ReleasedVariant:
    if variant.width < 2 or variant.width % 2:
        raise ValueError(f"width must be even and at least 2, got {variant.width}")
    for name in ("heads", "fusion_heads"):
        heads = getattr(variant, name)
        if heads < 1 or variant.width % heads:
            raise ValueError(f"{name} must divide the width {variant.width}, got {heads}")
    if variant.window < 0:
        raise ValueError(f"window must be at least 0, got {variant.window}")
    if not 0.0 <= variant.dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {variant.dropout}")
    return variant


def _check_prefix(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    restarts = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if restarts.any():
        raise ValueError(
            f"mask must have utterances first and padding after them, which dialogue "
            f"{int(restarts.nonzero()[0, 0])} has not"
        )
