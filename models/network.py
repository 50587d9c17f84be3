"""ReDiFu: emotions of the utterances of a conversation, from text and any other modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from ..ops.packing import Packing
from .config import NetworkConfig
from .data import TEXT, Batch
from .encoders import Denoiser, InputEncoder, sinusoidal_positions
from .fusion import TextGuidedFusion
from .graph import CrossModalRelations, ModalRelations, speaker_graph
from .outputs import Outputs


class ReDiFu(nn.Module):
    """The network of ReDiFu's abstract (arXiv 2603.25752), on packed dialogues.

    1. Every modality is standardised, projected to width D and normalised. Sinusoidal positions
       and the embedding of known speakers are added, by default to all but text.
    2. Differential Transformer layers denoise every modality but text.
    3. Relation subgraphs by speaker and direction: R-GAT inside each modality, then R-GCN across.
    4. The other modalities, diffused along the text's self-attention, enter the text stream.
    5. A linear head for each modality and for the fused stream. The fused logits add those of the
       modalities with learned weights, at first 1 for text and 0 for the others (the released
       network adds the three with fixed weights).

    With text alone only 1, 3 and text's head are left, and its logits are the fused ones: nothing
    is created that is not used. An utterance's scores depend on its own dialogue only.

    Modules per modality stand in the order of `modalities`: text, then the others by name.

    Args:
        config: shape of the network, with the preset `default`.
        dims: modality to feature width; must contain text.
        num_classes: C.
        num_speakers: speakers of the training vocabulary (`Batch.speaker_id` is 0 for unknown, up
            to this number); 0 creates no speaker embedding.

    Raises:
        ValueError: text is missing or a number is too small; the message names it.
    """

    def __init__(
        self, config: NetworkConfig, dims: Mapping[str, int], num_classes: int, num_speakers: int
    ) -> None:
        super().__init__()
        _check_arguments(dims, num_classes, num_speakers)
        self.config = config
        self.modalities = (TEXT, *sorted(name for name in dims if name != TEXT))
        self.dims = {name: dims[name] for name in self.modalities}
        count, others = len(self.modalities), len(self.modalities) - 1
        width, heads, dropout = config.width, config.heads, config.dropout
        self.inputs = nn.ModuleList(InputEncoder(dim, width, dropout) for dim in self.dims.values())
        self.num_placed = count if config.context == "all" else others
        embeds = num_speakers > 0 and self.num_placed > 0
        self.speaker = nn.Embedding(num_speakers + 1, width) if embeds else None
        if self.speaker is not None:
            nn.init.normal_(self.speaker.weight, std=0.1)
        denoises = config.denoise != "none"
        self.denoisers = nn.ModuleList(
            Denoiser(width, heads, config.layers, config.denoise, dropout)
            for _ in range(others if denoises else 0)
        )
        related = config.relations == "on"
        self.modal_relations = ModalRelations(count, width, heads, dropout) if related else None
        self.cross_relations = (
            CrossModalRelations(count, width, dropout) if related and others else None
        )
        self.dropout = nn.Dropout(dropout)
        self.modality_heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(count))
        self.fusion = self.fused_head = self.head_weight = None
        if others:
            steps = config.steps if config.fusion == "diffusion" else None
            self.fusion = TextGuidedFusion(
                width, heads, others, steps=steps, restart=config.restart, dropout=dropout
            )
            self.fused_head = nn.Linear(width, num_classes)
            self.head_weight = nn.Parameter(torch.eye(count)[0])

    def set_input_statistics(self, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> None:
        """Standardise the inputs by these from now on; they are saved with the weights.

        Args:
            mean: modality to (dim,) mean of its features, over the training split.
            std: modality to (dim,) standard deviation; where it is 0 the feature is only centred.

        Raises:
            ValueError: other modalities or widths than the network's, or values that are not
                finite or negative.
        """
        for what, statistics in (("mean", mean), ("std", std)):
            _check_modalities(what, statistics, self.modalities)
            for name, value in statistics.items():
                if tuple(value.shape) != (self.dims[name],):
                    raise ValueError(
                        f"{what}[{name!r}] must have shape ({self.dims[name]},), "
                        f"got {tuple(value.shape)}"
                    )
                if not value.isfinite().all() or (what == "std" and (value < 0).any()):
                    allowed = "finite and at least 0" if what == "std" else "finite"
                    raise ValueError(f"{what}[{name!r}] must be {allowed}")
        for name, encoder in zip(self.modalities, self.inputs, strict=True):
            encoder.set_statistics(mean[name], std[name])

    def forward(self, batch: Batch) -> Outputs:
        """Logits of T utterances, float32 also under autocast (float64 for a float64 network).

        Args:
            batch: with exactly the network's modalities and widths.

        Raises:
            ValueError: the batch has other modalities or widths; the message names them.
        """
        self._check_batch(batch)
        cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
        streams = self._denoised(self._encoded(batch), cu_seqlens, max_seqlen)
        if self.modal_relations is not None:
            graph = speaker_graph(batch, self.config.past, self.config.future)
            streams = self.modal_relations(streams, graph)
            if self.cross_relations is not None:
                streams = self.cross_relations(streams, graph)
        logits = [
            _at_least_float32(head(self.dropout(stream)))
            for head, stream in zip(self.modality_heads, streams, strict=True)
        ]
        per_modality = dict(zip(self.modalities, logits, strict=True))
        if self.fusion is None:
            return Outputs(logits[0], per_modality)
        text, *others = streams
        fused = self.fusion(text, others, cu_seqlens, max_seqlen)
        scores = _at_least_float32(self.fused_head(self.dropout(fused)))
        for weight, part in zip(self.head_weight, logits, strict=True):
            scores = scores + weight * part
        return Outputs(scores, per_modality)

    def _encoded(self, batch: Batch) -> list[Tensor]:
        streams = [
            encode(batch.features[name])
            for name, encode in zip(self.modalities, self.inputs, strict=True)
        ]
        if self.num_placed == 0:
            return streams
        rows = batch.speaker.shape[0]
        packing = Packing.from_cu_seqlens(batch.cu_seqlens, rows, batch.max_seqlen)
        place = sinusoidal_positions(packing.position, self.config.width, streams[0].dtype)
        if self.speaker is not None:
            place = place + self.speaker(batch.speaker_id)
        unplaced = len(streams) - self.num_placed
        return streams[:unplaced] + [stream + place for stream in streams[unplaced:]]

    def _denoised(self, streams: list[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
        if not self.denoisers:
            return streams
        text, *others = streams
        return [
            text,
            *(
                denoise(stream, cu_seqlens, max_seqlen)
                for denoise, stream in zip(self.denoisers, others, strict=True)
            ),
        ]

    def _check_batch(self, batch: Batch) -> None:
        _check_modalities("batch.features", batch.features, self.modalities)
        for name, dim in self.dims.items():
            shape = tuple(batch.features[name].shape)
            expected = (batch.speaker.shape[0], dim)
            if shape != expected:
                raise ValueError(
                    f"batch.features[{name!r}] must have shape (T, dim) = {expected}, got {shape}"
                )


def build_network(
    config: NetworkConfig, dims: Mapping[str, int], num_classes: int, num_speakers: int
) -> nn.Module:
    """The network of a configuration: `ReDiFu`, or the released one for a `released-*` preset.

    Args: as `ReDiFu`. The released network numbers speakers inside a dialogue, up to the count it
        was released with, so `num_speakers` has no effect on it.

    Raises:
        ValueError: a released preset with other settings than the defaults, or as `ReDiFu`.
    """
    if config.preset == "default":
        return ReDiFu(config, dims, num_classes, num_speakers)
    changed = [
        field.name
        for field in fields(config)
        if field.name != "preset" and getattr(config, field.name) != field.default
    ]
    if changed:
        raise ValueError(
            f"preset {config.preset!r} fixes the whole network, so {', '.join(changed)} must keep "
            "the default"
        )
    from .released import ReleasedReDiFu

    variant = config.preset.removeprefix("released-")
    return ReleasedReDiFu(variant, dims, num_classes)


def _check_arguments(dims: Mapping[str, int], num_classes: int, num_speakers: int) -> None:
    if TEXT not in dims:
        raise ValueError(f"dims must contain {TEXT!r}, got {list(dims)}")
    for name, dim in dims.items():
        if dim < 1:
            raise ValueError(f"dims[{name!r}] must be at least 1, got {dim}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if num_speakers < 0:
        raise ValueError(f"num_speakers must be at least 0, got {num_speakers}")


def _check_modalities(what: str, given: Mapping[str, Tensor], expected: tuple[str, ...]) -> None:
    if given.keys() != set(expected):
        raise ValueError(f"{what} must have the modalities {list(expected)}, got {list(given)}")


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
