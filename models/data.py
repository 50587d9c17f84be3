"""Dialogues in memory: one corpus with three splits, and packed batches of whole dialogues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")
UNLABELLED = -1
TEXT = "text"


class DataError(ValueError):
    """Damaged or unusable data; the message names the file and the row."""


@dataclass(frozen=True)
class Dialogue:
    """One conversation of T utterances.

    Attributes:
        name: identifier, unique in its split.
        speakers: T speaker names.
        labels: (T,) int64, index into `Corpus.labels`, `UNLABELLED` where there is none.
        features: modality to (T, dim) float32.
    """

    name: str
    speakers: tuple[str, ...]
    labels: np.ndarray
    features: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.speakers)


@dataclass(frozen=True)
class Corpus:
    """Dialogues by split, with the names of the labels and where each modality comes from.

    Attributes:
        name: of the corpus, for reports.
        labels: label names; a dialogue's labels index them.
        splits: `train`, `validation` and `test`, each a tuple of dialogues.
        provenance: modality to one sentence on its origin. A generated modality says so here, and
            every report repeats it.
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, tuple[Dialogue, ...]]
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def dims(self) -> dict[str, int]:
        """Feature width of each modality, in the corpus's order of modalities."""
        dialogues = [dialogue for split in self.splits.values() for dialogue in split]
        if not dialogues:
            return {}
        return {name: array.shape[1] for name, array in dialogues[0].features.items()}

    def select(self, modalities: Sequence[str]) -> Corpus:
        """The same corpus with only these modalities, in this order.

        Raises:
            DataError: a modality is not in the corpus, or text is not among them.
        """
        missing = [name for name in modalities if name not in self.dims]
        if missing:
            raise DataError(
                f"modalities {missing} are not in corpus {self.name}, which has {list(self.dims)}"
            )
        if TEXT not in modalities:
            raise DataError(f"modalities must contain {TEXT!r}, got {list(modalities)}")

        def narrow(dialogue: Dialogue) -> Dialogue:
            return replace(
                dialogue, features={name: dialogue.features[name] for name in modalities}
            )

        splits = {split: tuple(map(narrow, found)) for split, found in self.splits.items()}
        return replace(self, splits=splits)


@dataclass(frozen=True)
class Batch:
    """Whole dialogues packed one after another, no padding; T utterances in B dialogues.

    Attributes:
        features: modality to (T, dim) float32.
        speaker: (T,) int64, the speaker's index in its dialogue, by first appearance.
        speaker_id: (T,) int64, the speaker's index in the training vocabulary, 0 for unknown.
        labels: (T,) int64, `UNLABELLED` where there is none.
        cu_seqlens: (B+1,) int32, first row of each dialogue, and T.
        max_seqlen: utterances in the longest dialogue.
        num_speakers: most speakers in one dialogue.
    """

    features: dict[str, Tensor]
    speaker: Tensor
    speaker_id: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_speakers: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            features={name: value.to(device) for name, value in self.features.items()},
            speaker=self.speaker.to(device),
            speaker_id=self.speaker_id.to(device),
            labels=self.labels.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
        )


def collate(
    dialogues: Sequence[Dialogue],
    dims: Mapping[str, int],
    vocabulary: Mapping[str, int] | None = None,
) -> Batch:
    """Pack dialogues into one batch.

    Args:
        dialogues: in the order of the batch; may be empty.
        dims: modality to feature width, the modalities that the batch will hold.
        vocabulary: speaker name to id from 1; names it lacks get 0.
    """
    vocabulary = vocabulary or {}
    features = {
        name: torch.from_numpy(
            np.concatenate(
                [np.zeros((0, dim), np.float32)] + [d.features[name] for d in dialogues]
            ).astype(np.float32, copy=False)
        )
        for name, dim in dims.items()
    }
    speaker: list[int] = []
    num_speakers = 0
    for dialogue in dialogues:
        order = {name: index for index, name in enumerate(dict.fromkeys(dialogue.speakers))}
        speaker += [order[name] for name in dialogue.speakers]
        num_speakers = max(num_speakers, len(order))
    lengths = [len(dialogue) for dialogue in dialogues]
    names = [name for dialogue in dialogues for name in dialogue.speakers]
    return Batch(
        features=features,
        speaker=torch.tensor(speaker, dtype=torch.int64),
        speaker_id=torch.tensor([vocabulary.get(name, 0) for name in names], dtype=torch.int64),
        labels=torch.from_numpy(
            np.concatenate([np.zeros(0, np.int64)] + [d.labels for d in dialogues])
        ),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        max_seqlen=max(lengths, default=0),
        num_speakers=num_speakers,
    )


def speaker_vocabulary(dialogues: Sequence[Dialogue], min_utterances: int) -> dict[str, int]:
    """Speakers with at least this many utterances, numbered from 1 by falling frequency."""
    counts: dict[str, int] = {}
    for dialogue in dialogues:
        for name in dialogue.speakers:
            counts[name] = counts.get(name, 0) + 1
    kept = sorted((n for n, count in counts.items() if count >= min_utterances))
    kept.sort(key=lambda name: -counts[name])
    return {name: index for index, name in enumerate(kept, start=1)}
