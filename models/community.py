"""The feature pickles that the field passes around for IEMOCAP and MELD (SDT, DEDNet, ReDiFu).

One tuple `(ids, speakers, labels, text, text2, text3, text4, audio, visual, sentences, train ids,
test ids[, extra])`: 12 elements for IEMOCAP, 13 for MELD. Each of the middle ones maps a dialogue's
id to one entry per utterance. The feature extractors and the order of the labels are those of the
published files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data import Corpus, DataError, Dialogue
from .safe_pickle import StoredArray, load_restricted

IEMOCAP_LABELS = ("hap", "sad", "neu", "ang", "exc", "fru")
MELD_LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
VALIDATION_SEED = 0
VALIDATION_FRACTION = 0.1


def read_community(path: Path) -> Corpus:
    """Read a community pickle.

    The files have no validation list: `VALIDATION_FRACTION` of the training dialogues, drawn with
    `VALIDATION_SEED`, becomes the validation split (12 of IEMOCAP's 120).

    Raises:
        DataError: the file is damaged, names anything but containers and arrays, or its entries
            do not fit together; names the file, the dialogue and the utterance.
    """
    path = Path(path)
    content = load_restricted(path)
    if not isinstance(content, tuple | list) or len(content) not in (12, 13):
        size = f" of {len(content)}" if isinstance(content, tuple | list) else ""
        raise DataError(
            f"{path}: holds a {type(content).__name__}{size}, expected a tuple of 12 (IEMOCAP) or "
            "13 (MELD) elements"
        )
    name, labels = ("IEMOCAP", IEMOCAP_LABELS) if len(content) == 12 else ("MELD", MELD_LABELS)
    fields = {"speakers": 1, "labels": 2, "text": 3, "audio": 7, "visual": 8}
    tables = {}
    for field, position in fields.items():
        tables[field] = content[position]
        if not isinstance(content[position], dict):
            raise DataError(
                f"{path}: element {position} ({field}) is a {type(content[position]).__name__}, "
                "expected a dictionary by dialogue"
            )
    train, test = (_ids(path, content, position) for position in (10, 11))
    both = sorted(set(train) & set(test), key=str)
    if both:
        raise DataError(f"{path}: dialogues {both[:5]} are in both training and test")
    if len(train) < 2:
        raise DataError(f"{path}: one training dialogue, expected some for training and validation")
    train, validation = _carve(train)
    dims: dict[str, int] = {}
    splits = {
        split: tuple(_dialogue(path, key, tables, labels, dims) for key in keys)
        for split, keys in (("train", train), ("validation", validation), ("test", test))
    }
    provenance = {
        modality: f"{modality} features of the community pickle {path.name}"
        for modality in ("text", "audio", "visual")
    }
    return Corpus(name, labels, splits, provenance)


def _ids(path: Path, content: Sequence[Any], position: int) -> list[Any]:
    value = content[position]
    if not isinstance(value, list | tuple | set | frozenset | range | dict) or not len(value):
        raise DataError(
            f"{path}: element {position} is {str(value)[:60]}, expected the ids of a split"
        )
    if len(value) > len(content[2]):
        raise DataError(
            f"{path}: element {position} has {len(value)} ids, but only {len(content[2])} "
            "dialogues have labels"
        )
    ids = list(value)
    if not all(isinstance(item, str | int) for item in ids) or len(set(map(str, ids))) != len(ids):
        raise DataError(f"{path}: element {position} must hold different strings or integers")
    return ids


def _carve(train: list[Any]) -> tuple[list[Any], list[Any]]:
    """Training ids without the validation ids, and these; both in a fixed order."""
    ordered = sorted(train, key=str)
    count = max(1, round(VALIDATION_FRACTION * len(ordered)))
    drawn = set(np.random.default_rng(VALIDATION_SEED).permutation(len(ordered))[:count].tolist())
    validation = [item for index, item in enumerate(ordered) if index in drawn]
    return [item for index, item in enumerate(ordered) if index not in drawn], validation


def _dialogue(
    path: Path,
    key: Any,
    tables: dict[str, dict[Any, Any]],
    names: tuple[str, ...],
    dims: dict[str, int],
) -> Dialogue:
    where = f"{path}, dialogue {key!r}"
    for field, table in tables.items():
        if key not in table:
            raise DataError(f"{where}: has no {field}")
    labels = _array(tables["labels"][key], f"{where}, labels")
    if labels.ndim != 1 or not len(labels):
        raise DataError(f"{where}: labels have shape {labels.shape}, expected one per utterance")
    for index, value in enumerate(labels):
        if value != int(value) or not 0 <= value < len(names):
            raise DataError(
                f"{where}, utterance {index}: label {value:g}, expected 0 to {len(names) - 1} "
                f"({', '.join(names)})"
            )
    speakers = _speakers(tables["speakers"][key], len(labels), where)
    features = {}
    for modality in ("text", "audio", "visual"):
        array = _array(tables[modality][key], f"{where}, {modality}")
        dim = dims.setdefault(modality, array.shape[1] if array.ndim == 2 else 0)
        if array.shape != (len(labels), dim) or not dim:
            raise DataError(
                f"{where}: {modality} has shape {array.shape}, expected ({len(labels)}, "
                f"{dim or 'dim'}): one row for each label, the width of the first dialogue"
            )
        features[modality] = array.astype(np.float32)
    return Dialogue(str(key), speakers, labels.astype(np.int64), features)


def _speakers(entries: Any, length: int, where: str) -> tuple[str, ...]:
    """Names as they are, or `speaker<i>` for one-hot rows."""
    if isinstance(entries, list | tuple) and all(isinstance(entry, str) for entry in entries):
        if len(entries) != length:
            raise DataError(f"{where}: {len(entries)} speakers for {length} labels")
        for index, entry in enumerate(entries):
            if not entry.strip():
                raise DataError(f"{where}, utterance {index}: speaker is empty, expected a name")
        return tuple(entries)
    rows = _array(entries, f"{where}, speakers")
    if rows.ndim != 2 or len(rows) != length:
        raise DataError(
            f"{where}: speakers have shape {rows.shape}, expected {length} names or one-hot rows"
        )
    for index, row in enumerate(rows):
        if (row == 1).sum() != 1 or np.count_nonzero(row) != 1:
            raise DataError(f"{where}, utterance {index}: speaker {row}, expected a one-hot row")
    return tuple(f"speaker{index}" for index in rows.argmax(axis=1))


def _array(value: Any, where: str) -> np.ndarray:
    """A numeric array from an array, a number, or nested lists of them; all values finite."""
    array = _numbers(value, where, depth=0)
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(array.astype(np.float32))
    if bad.any():
        first = tuple(np.argwhere(bad)[0].tolist())
        raise DataError(
            f"{where}, utterance {first[0] if first else 0}: {array[first]} at {list(first)}, "
            "expected finite float32 numbers"
        )
    return array


def _numbers(value: Any, where: str, depth: int) -> np.ndarray:
    if isinstance(value, StoredArray):
        return value.rebuild(where)
    if isinstance(value, bool | int | float):
        try:
            return np.asarray(float(value))
        except OverflowError:
            raise DataError(f"{where}: a number beyond the range of a float") from None
    if isinstance(value, list | tuple) and value and depth < 2:
        rows = [_numbers(item, where, depth + 1) for item in value]
        for index, row in enumerate(rows):
            if row.shape != rows[0].shape:
                raise DataError(
                    f"{where}, utterance {index}: shape {row.shape}, but utterance 0 has "
                    f"{rows[0].shape}"
                )
        return np.stack(rows)
    raise DataError(f"{where}: found a {type(value).__name__}, expected numbers")
