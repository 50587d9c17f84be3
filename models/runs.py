"""The folder of a run: who may write there, its data, its checkpoint and its trained network."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_json,
    save_checkpoint,
    write_json,
)
from .config import BUILT_IN, TrainConfig, from_json
from .data import Corpus
from .network import build_network
from .prepare import load_corpus
from .synthetic import generate

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
REPORT = "report.json"
LOGS = "tensorboard"


def load_data(config: TrainConfig) -> Corpus:
    """The corpus of a run, with all its modalities.

    What has to be prepared first is kept in the user's cache folder, where that can be written.

    Raises:
        DataError: the data are damaged.
    """
    if config.data == BUILT_IN:
        return generate(config.built_in)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return load_corpus(Path(config.data), cache_dir=cache / "rdfkern")
    except OSError:
        return load_corpus(Path(config.data))  # a home that cannot be written only costs time


def narrow(corpus: Corpus, config: TrainConfig) -> Corpus:
    """The corpus with the modalities that the run uses.

    Raises:
        DataError: it lacks one of them, or text is not among them.
    """
    return corpus.select(config.modalities if config.modalities is not None else [*corpus.dims])


def fingerprint(corpus: Corpus) -> int:
    """Checksum of everything that training and evaluation read from a corpus."""
    value = zlib.crc32(repr((corpus.labels, corpus.dims)).encode())
    for split, dialogues in corpus.splits.items():
        for dialogue in dialogues:
            value = zlib.crc32(repr((split, dialogue.name, dialogue.speakers)).encode(), value)
            for array in (dialogue.labels, *dialogue.features.values()):
                value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, value)
    return value


def open_run(config: TrainConfig) -> None:
    """Make the run's folder, or check that the run in it is this one.

    Raises:
        ValueError: the folder holds something else, or a run with other settings.
        CheckpointError: the folder cannot be written, or its config.json is damaged.
    """
    folder = config.folder
    identity = config.identity()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out {folder} is a file, not a folder")
    found = [path for path in folder.iterdir() if path.name[0] != "."] if folder.exists() else []
    if not found:
        write_json(folder / CONFIG, identity)
        return
    if not (folder / CONFIG).exists():
        raise ValueError(f"out {folder} is not empty and holds no run; name another folder")
    if not config.resume:
        _discard(folder)
        write_json(folder / CONFIG, identity)
        return
    differing = _differences(read_json(folder / CONFIG), identity)
    if differing:
        raise ValueError(
            f"out {folder} holds a run with other settings ({'; '.join(differing)}); name "
            "another folder, or throw that run away with --no-resume"
        )


@dataclass(frozen=True)
class TrainedModel:
    """A trained network with what it needs to predict.

    Attributes:
        network: in evaluation mode, on the CPU.
        config: of the run.
        dims: feature width of each modality.
        labels: names of the classes.
        vocabulary: speakers with an identity of their own.
        training: figures of the training run.
    """

    network: nn.Module
    config: TrainConfig
    dims: dict[str, int]
    labels: tuple[str, ...]
    vocabulary: dict[str, int]
    training: dict[str, Any]

    def check(self, corpus: Corpus) -> Corpus:
        """The corpus narrowed to the network's modalities.

        Raises:
            ValueError: its labels or feature widths are not those of the training data.
        """
        corpus = corpus.select(list(self.dims))
        if corpus.dims != self.dims:
            raise ValueError(
                f"the network takes feature widths {self.dims}, corpus {corpus.name} has "
                f"{corpus.dims}"
            )
        if tuple(corpus.labels) != self.labels:
            raise ValueError(
                f"the network knows labels {list(self.labels)}, corpus {corpus.name} has "
                f"{list(corpus.labels)}"
            )
        return corpus


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: TrainConfig,
    corpus: Corpus,
    vocabulary: Mapping[str, int],
    training: Mapping[str, Any],
) -> None:
    """Write model.safetensors: the weights under their own names, the rest in the header.

    Raises:
        CheckpointError: it could not be written.
    """
    state = {
        "config": config.identity(),
        "dims": corpus.dims,
        "labels": list(corpus.labels),
        "vocabulary": dict(vocabulary),
        "training": dict(training),
    }
    save_checkpoint(folder / MODEL, weights, state)


def load_model(folder: Path) -> TrainedModel:
    """Read the trained network of a run.

    Raises:
        ValueError: there is no run, or it is not finished.
        CheckpointError: its files are damaged.
    """
    path = folder / MODEL
    if not path.exists():
        if (folder / CONFIG).exists():
            raise ValueError(
                f"the run in {folder} is not finished; the command that started it continues it"
            )
        raise ValueError(f"{folder} holds no run of rdfkern.models.train")
    weights, state = load_checkpoint(path)
    try:
        config = from_json(state["config"])
        dims, labels, vocabulary = state["dims"], tuple(state["labels"]), state["vocabulary"]
        with torch.random.fork_rng(devices=[]):
            network = build_network(config.network, dims, len(labels), len(vocabulary))
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of rdfkern: {error}") from error
    return TrainedModel(network.eval(), config, dims, labels, vocabulary, state["training"])


def _discard(folder: Path) -> None:
    """Delete the files of a run, and nothing else."""
    for name in (CHECKPOINT, MODEL, REPORT, "report.md", "confusion.png", CONFIG):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / LOGS).glob("events.out.tfevents.*"):
        path.unlink()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} is {before!r} there and {after!r} here")
    return found
