"""Conversations as JSON lines, one dialogue a line: meetings (MRDA) and the open format.

A line is {"dialogue": name, "split": ..., "utterances": [{"speaker": ..., "text": ..., <label
field>: ..., "start": seconds, "end": seconds}, ...]}; other keys are ignored. `start` and `end` may
be null or absent, a label null or absent means unlabelled. Files ending in .gz are decompressed.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .data import SPLITS, DataError
from .sources import RawCorpus, RawDialogue, Utterance, drop_odd_times

MRDA_LABELS = {
    "da_basic": ("S", "B", "D", "F", "Q"),
    "da_general": ("s", "b", "fh", "qy", "%", "fg", "qw", "h", "qrr", "qh", "qr", "qo"),
}
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev"), SPLITS[1])


def read_mrda(path: Path, label_field: str = "da_basic") -> RawCorpus:
    """Meetings as JSON lines, labelled by `label_field`.

    `da_basic` and `da_general` have MRDA's 5 and 12 labels; any other field has the labels found in
    the file, sorted.

    Raises:
        DataError: the file is damaged, or no utterance has a label in this field.
    """
    path = Path(path)
    labels = MRDA_LABELS.get(label_field)
    dialogues, odd_times = read_dialogues(path, label_field, labels, needs_text=True)
    found = {u.label for dialogue in dialogues for u in dialogue.utterances} - {None}
    if not found:
        raise DataError(f"{path}: no utterance has a label in field {label_field!r}")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return RawCorpus(name, labels or tuple(sorted(found)), tuple(dialogues), odd_times)


def read_dialogues(
    path: Path, label_field: str, labels: Sequence[str] | None, *, needs_text: bool
) -> tuple[list[RawDialogue], int]:
    """Dialogues of a JSON-lines file, and how many utterances lost their times as odd.

    Args:
        path: of the file.
        label_field: key of an utterance's label.
        labels: allowed labels, None for any.
        needs_text: whether an utterance without text is an error.

    Raises:
        DataError: the file cannot be read or has no dialogue; a line is no JSON or lacks a key; a
            dialogue is empty or appears twice; a split, label or time is not allowed.
    """
    dialogues: list[RawDialogue] = []
    names: set[tuple[str, str]] = set()
    odd_times = 0
    for number, text in _numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: {type(record).__name__}, expected an object")
        name = _string(record, "dialogue", where)
        split = SPLIT_NAMES.get(_string(record, "split", where))
        if split is None:
            raise DataError(
                f"{where}: split is {record['split']!r}, expected one of {', '.join(SPLIT_NAMES)}"
            )
        if (split, name) in names:
            raise DataError(f"{where}: dialogue {name!r} of split {split} appears twice")
        names.add((split, name))
        items = record.get("utterances")
        if not isinstance(items, list) or not items:
            raise DataError(f"{where}: dialogue {name!r} has no list of utterances")
        utterances = []
        for index, item in enumerate(items):
            utterance, odd = _utterance(
                item, f"{where}, utterance {index}", label_field, labels, needs_text
            )
            utterances.append(utterance)
            odd_times += odd
        dialogues.append(RawDialogue(name, split, tuple(utterances)))
    if not dialogues:
        raise DataError(f"{path}: no dialogues, expected one a line")
    return dialogues, odd_times


def _utterance(
    item: Any, where: str, label_field: str, labels: Sequence[str] | None, needs_text: bool
) -> tuple[Utterance, bool]:
    if not isinstance(item, dict):
        raise DataError(f"{where}: {type(item).__name__}, expected an object")
    speaker = _string(item, "speaker", where)
    text = item.get("text")
    if not isinstance(text, str) and (needs_text or text is not None):
        raise DataError(f"{where}: text is {text!r}, expected a string")
    label = item.get(label_field)
    if label is not None and (
        not isinstance(label, str) or (labels is not None and label not in labels)
    ):
        expected = "a string" if labels is None else f"one of {', '.join(labels)}"
        raise DataError(f"{where}: {label_field} is {label!r}, expected {expected}")
    times = [item.get(key) for key in ("start", "end")]
    for key, value in zip(("start", "end"), times, strict=True):
        if value is not None and not _is_time(value):
            raise DataError(f"{where}: {key} is {value!r}, expected seconds from 0 on, or null")
    start, end, odd = drop_odd_times(*times)
    return Utterance(speaker, text or "", label, start, end), odd


def _is_time(value: Any) -> bool:
    """Whether this is a number of seconds; whole numbers may be larger than any float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= sys.float_info.max


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {value!r}, expected a string that is not empty")
    return value


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8: {error.reason}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
