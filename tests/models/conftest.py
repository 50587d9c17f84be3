"""A run that takes a second: a few short generated dialogues and a narrow network."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdfkern.models.config import NetworkConfig, TrainConfig
from rdfkern.models.synthetic import SyntheticConfig

TINY_DATA = SyntheticConfig(
    dialogues=(7, 3, 4), utterances=(3, 12), cast=8, text_dim=8, audio_dim=6, visual_dim=5
)


@pytest.fixture
def tiny_run(tmp_path):
    """Settings of a tiny run in tmp_path/run, with changes."""

    def make(out: str | Path = "run", network: dict | None = None, **changes) -> TrainConfig:
        settings = {
            "out": tmp_path / out,
            "built_in": TINY_DATA,
            "network": NetworkConfig(**{"width": 16, "heads": 2, "past": 3, **(network or {})}),
            "epochs": 3,
            "batch_utterances": 16,
            "min_speaker_utterances": 3,
            "device": "cpu",
            "threads": 1,
        }
        return TrainConfig(**settings | changes)

    return make


@pytest.fixture
def tiny_arguments():
    """The same settings as a command line for `train`, without --out."""
    text = (
        "--built-in.dialogues 7 3 4 --built-in.utterances 3 12 --built-in.cast 8 "
        "--built-in.text-dim 8 --built-in.audio-dim 6 --built-in.visual-dim 5 --network.width 16 "
        "--network.heads 2 --network.past 3 --batch-utterances 16 --min-speaker-utterances 3 "
        "--device cpu --threads 1"
    )
    return text.split()
