"""The open format of this package: a folder that any tool can write.

corpus.json            {"format": "rdfkern-corpus", "version": 1, "name": ..., "labels": [...],
                        "provenance": {modality: one sentence on its origin}}
dialogues.jsonl        one dialogue a line, see `jsonlines`; the label field is "label"
<modality>.safetensors one float tensor "features" (utterances of all dialogues in the order of
                        dialogues.jsonl, dim); text.safetensors must be there
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .data import SPLITS, TEXT, UNLABELLED, Corpus, DataError, Dialogue
from .jsonlines import read_dialogues
from .sources import RawDialogue, Utterance

FORMAT = "rdfkern-corpus"
VERSION = 1
HEADER = "corpus.json"
DIALOGUES = "dialogues.jsonl"
TENSOR = "features"
SUFFIX = ".safetensors"


def read_corpus(path: Path) -> Corpus:
    """Read a corpus folder.

    Modalities come in this order: text, those named in `provenance`, the others by name.

    Raises:
        DataError: a file is missing or damaged, arrays and dialogues do not fit together, a label
            is unknown, or a feature is not finite; names the file and the row.
    """
    path = Path(path)
    header = _header(path / HEADER)
    labels = tuple(header["labels"])
    dialogues, _ = read_dialogues(path / DIALOGUES, "label", labels, needs_text=False)
    owners = [
        (dialogue, index) for dialogue in dialogues for index in range(len(dialogue.utterances))
    ]
    provenance = header["provenance"]
    found = sorted(file.name.removesuffix(SUFFIX) for file in path.glob(f"*{SUFFIX}"))
    order = dict.fromkeys([TEXT, *provenance, *found])
    arrays = {name: _features(path / f"{name}{SUFFIX}", owners) for name in order}
    index_of = {label: index for index, label in enumerate(labels)}
    splits: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    first = 0
    for dialogue in dialogues:
        last = first + len(dialogue.utterances)
        splits[dialogue.split].append(
            Dialogue(
                dialogue.name,
                tuple(utterance.speaker for utterance in dialogue.utterances),
                np.array(
                    [index_of.get(u.label, UNLABELLED) for u in dialogue.utterances], np.int64
                ),
                {name: array[first:last] for name, array in arrays.items()},
            )
        )
        first = last
    return Corpus(
        header["name"],
        labels,
        {split: tuple(members) for split, members in splits.items()},
        {name: provenance.get(name, "not stated") for name in arrays},
    )


def write_corpus(
    path: Path,
    corpus: Corpus,
    *,
    raw: Iterable[RawDialogue] = (),
    overwrite: bool = False,
) -> None:
    """Write a corpus folder, whole or not at all.

    Args:
        path: of the folder; its parents are made.
        corpus: to write.
        raw: dialogues whose text and times are stored too, found by split and name.
        overwrite: replace a corpus that is there; it stays whole if anything fails.

    Raises:
        DataError: `path` exists and is no corpus or `overwrite` is not set, a modality's name
            cannot be a file name, or text is missing.
        OSError: writing failed, for instance on a full disk; nothing half written remains.
    """
    path = Path(path).absolute()
    _check_target(path, overwrite)
    if TEXT not in corpus.dims:
        raise DataError(f"corpus {corpus.name} has no modality {TEXT!r}, found {list(corpus.dims)}")
    for name in corpus.dims:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise DataError(f"modality {name!r}: expected letters, digits, _ and -")
    staging = _sibling(path)
    try:
        staging.mkdir(parents=True)
        _write_files(staging, corpus, {(item.split, item.name): item for item in raw})
        _swap(staging, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"corpus not written, nothing half written remains: {error.strerror or error}",
            str(path),
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise DataError(f"{path}: exists and is no folder")
    if not any(path.iterdir()):
        return
    if not (path / HEADER).is_file():
        raise DataError(f"{path}: exists and is no corpus ({HEADER} is missing), not replaced")
    if not overwrite:
        raise DataError(f"{path}: a corpus is there already, overwriting was not asked for")


def _sibling(path: Path) -> Path:
    """A hidden name beside the folder that nothing else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def _write_files(folder: Path, corpus: Corpus, raw: Mapping[tuple[str, str], RawDialogue]) -> None:
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": corpus.name,
        "labels": list(corpus.labels),
        "provenance": {name: corpus.provenance.get(name, "not stated") for name in corpus.dims},
    }
    (folder / HEADER).write_text(
        json.dumps(header, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    dialogues = [(split, dialogue) for split in SPLITS for dialogue in corpus.splits[split]]
    with (folder / DIALOGUES).open("w", encoding="utf-8") as file:
        for split, dialogue in dialogues:
            record = _record(split, dialogue, corpus.labels, raw.get((split, dialogue.name)))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for name in corpus.dims:
        rows = np.concatenate([dialogue.features[name] for _, dialogue in dialogues])
        tensor = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
        # Not save_file: its errors are no OSError, so a full disk could not be told apart.
        (folder / f"{name}{SUFFIX}").write_bytes(save({TENSOR: tensor}))


def _record(
    split: str, dialogue: Dialogue, labels: tuple[str, ...], raw: RawDialogue | None
) -> dict[str, Any]:
    texts: tuple[Utterance | None, ...] = raw.utterances if raw else (None,) * len(dialogue)
    utterances = []
    for speaker, label, source in zip(dialogue.speakers, dialogue.labels, texts, strict=True):
        item = {"speaker": speaker, "label": None if label == UNLABELLED else labels[label]}
        if source is not None:
            kept = asdict(source)
            item |= {key: kept[key] for key in ("text", "start", "end") if kept[key] is not None}
        utterances.append(item)
    return {"dialogue": dialogue.name, "split": split, "utterances": utterances}


def _swap(staging: Path, path: Path) -> None:
    """Put the finished folder in place; the one that was there comes back if that fails."""
    if not path.exists():
        os.rename(staging, path)
        return
    previous = _sibling(path)
    os.rename(path, previous)
    try:
        os.rename(staging, path)
    except OSError:
        os.rename(previous, path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing, a corpus folder needs {HEADER}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f'{path}: expected an object with "format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise DataError(f"{path}: version is {header.get('version')!r}, expected {VERSION}")
    if not isinstance(header.get("name"), str) or not header["name"]:
        raise DataError(f"{path}: name is {header.get('name')!r}, expected a string")
    labels = header.get("labels")
    if (
        not isinstance(labels, list)
        or not labels
        or not all(isinstance(label, str) and label for label in labels)
        or len(set(labels)) != len(labels)
    ):
        raise DataError(f"{path}: labels are {labels!r}, expected a list of different strings")
    provenance = header.setdefault("provenance", {})
    if not isinstance(provenance, dict) or not all(
        isinstance(sentence, str) for sentence in provenance.values()
    ):
        raise DataError(f"{path}: provenance is {provenance!r}, expected one sentence a modality")
    return header


def _features(path: Path, owners: list[tuple[RawDialogue, int]]) -> np.ndarray:
    """(utterances, dim) float32, checked."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, expected features of {len(owners)} utterances") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: damaged safetensors file: {error}") from None
    if list(tensors) != [TENSOR]:
        raise DataError(f"{path}: tensors {sorted(tensors)}, expected one named {TENSOR!r}")
    tensor = tensors[TENSOR]
    if not tensor.is_floating_point():
        raise DataError(f"{path}: element type {tensor.dtype}, expected a floating point type")
    if tensor.ndim != 2 or tensor.shape[0] != len(owners) or not tensor.shape[1]:
        raise DataError(
            f"{path}: shape {tuple(tensor.shape)}, expected ({len(owners)}, dim): one row for each "
            f"utterance of {DIALOGUES}"
        )
    tensor = tensor.to(torch.float32)
    finite = tensor.isfinite()
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        dialogue, index = owners[row]
        raise DataError(
            f"{path}, row {row} (dialogue {dialogue.name!r}, utterance {index}): "
            f"{float(tensor[row, column])} in column {column}, expected finite numbers"
        )
    return tensor.numpy()
