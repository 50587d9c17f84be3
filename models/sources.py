"""Published conversations as they come: the CSV files of MELD and EmoryNLP.

Files are UTF-8; lines that are not are read as Windows-1252, and text that was decoded with the
wrong one of the two is repaired. A damaged structure raises `DataError` with the file and the line.
The published files also hold utterances whose end is not after their start: these count as
utterances without times, and `RawCorpus.odd_times` says how many there are.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .data import DataError

MELD_LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
EMORYNLP_LABELS = ("Joyful", "Mad", "Neutral", "Peaceful", "Powerful", "Sad", "Scared")
MELD_FILES = {
    "train": "train_sent_emo.csv",
    "validation": "dev_sent_emo.csv",
    "test": "test_sent_emo.csv",
}
EMORYNLP_FILES = {
    "train": "emorynlp_train_final.csv",
    "validation": "emorynlp_dev_final.csv",
    "test": "emorynlp_test_final.csv",
}


@dataclass(frozen=True)
class Utterance:
    """One turn of a speaker.

    Attributes:
        speaker: name, never empty.
        text: words, may be empty.
        label: its name, None where there is none.
        start: seconds on the recording's clock, None if unknown.
        end: seconds, after `start`; None exactly when `start` is None.
    """

    speaker: str
    text: str
    label: str | None
    start: float | None
    end: float | None


@dataclass(frozen=True)
class RawDialogue:
    """One conversation before any features; `split` is one of `SPLITS`."""

    name: str
    split: str
    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class RawCorpus:
    """Conversations before any features.

    Attributes:
        name: of the corpus, for reports.
        labels: label names in the corpus's order.
        dialogues: in the order of their files, training first for CSV corpora.
        odd_times: utterances whose times were dropped because the end is not after the start.
    """

    name: str
    labels: tuple[str, ...]
    dialogues: tuple[RawDialogue, ...]
    odd_times: int = 0


def read_meld(folder: Path) -> RawCorpus:
    """MELD's three CSV files; one dialogue per Dialogue_ID, in the order of Utterance_ID.

    Raises:
        DataError: a file is missing or damaged.
    """

    def dialogue(row: Row) -> str:
        return f"dia{row.integer('Dialogue_ID')}"

    return _read_csv_corpus(
        RawCorpus("MELD", MELD_LABELS, ()),
        Path(folder),
        MELD_FILES,
        dialogue,
        keys=("Dialogue_ID",),
        order=("Utterance_ID",),
        times=("StartTime", "EndTime"),
    )


def read_emorynlp(folder: Path, join_episodes: bool = False) -> RawCorpus:
    """EmoryNLP's three CSV files; one dialogue per scene, or per episode.

    No episode crosses the splits, so joining leaks nothing. Utterances spoken by several people at
    once get one speaker of their own, the names joined by " & ".

    Raises:
        DataError: a file is missing or damaged.
    """

    def dialogue(row: Row) -> str:
        episode = f"s{row.integer('Season'):02d}e{row.integer('Episode'):02d}"
        return episode if join_episodes else f"{episode}c{row.integer('Scene_ID'):02d}"

    return _read_csv_corpus(
        RawCorpus("EmoryNLP", EMORYNLP_LABELS, ()),
        Path(folder),
        EMORYNLP_FILES,
        dialogue,
        keys=("Season", "Episode"),
        order=("Scene_ID", "Utterance_ID"),
        times=("Start_Time", "End_Time"),
    )


def drop_odd_times(
    start: float | None, end: float | None
) -> tuple[float | None, float | None, bool]:
    """Times that can be used, or two times None; and whether a pair was dropped as odd."""
    if start is None or end is None:
        return None, None, False
    if end <= start:
        return None, None, True
    return start, end, False


@dataclass(frozen=True)
class Row:
    """One line of a CSV file, which its error messages name."""

    path: Path
    line: int
    values: Mapping[str, str]

    def error(self, column: str, expected: str) -> DataError:
        """What is wrong with a column, to be raised."""
        return DataError(
            f"{self.path}, line {self.line}: {column} is {self.values[column]!r}, "
            f"expected {expected}"
        )

    def integer(self, column: str) -> int:
        """A whole number, not negative."""
        value = self.values[column].strip()
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise self.error(column, "a whole number")
        return int(value)

    def seconds(self, column: str) -> float:
        """A time as HH:MM:SS,mmm or HH:MM:SS.mmm; the mark is decimal, so ",8" is 0.8 s."""
        match = re.fullmatch(
            r"([0-9]{1,2}):([0-5][0-9]):([0-5][0-9])(?:[,.]([0-9]{1,6}))?",
            self.values[column].strip(),
        )
        if match is None:
            raise self.error(column, "a time HH:MM:SS,mmm")
        hours, minutes, seconds, fraction = match.groups(default="0")
        return int(hours) * 3600 + int(minutes) * 60 + float(f"{seconds}.{fraction}")

    def speaker(self) -> str:
        """A name, or a list of names written as in Python, joined by " & "."""
        value = repair_text(self.values["Speaker"]).strip()
        names = [value]
        if value.startswith("["):
            try:
                names = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                names = []
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise self.error("Speaker", "a name or a list of names")
        return " & ".join(name.strip() for name in names)

    def label(self, labels: Sequence[str]) -> str:
        """One of the corpus's labels."""
        value = self.values["Emotion"].strip()
        if value not in labels:
            raise self.error("Emotion", f"one of {', '.join(labels)}")
        return value


def _read_csv_corpus(
    empty: RawCorpus,
    folder: Path,
    files: Mapping[str, str],
    dialogue: Callable[[Row], str],
    *,
    keys: tuple[str, ...],
    order: tuple[str, ...],
    times: tuple[str, str],
) -> RawCorpus:
    """Group the rows of three files into dialogues sorted by the columns in `order`."""
    columns = {"Utterance", "Speaker", "Emotion", *keys, *order, *times}
    dialogues: list[RawDialogue] = []
    odd_times = 0
    for split, file_name in files.items():
        grouped: dict[str, dict[tuple[int, ...], Utterance]] = {}
        for row in read_rows(folder / file_name, columns):
            start, end, odd = drop_odd_times(row.seconds(times[0]), row.seconds(times[1]))
            odd_times += odd
            utterance = Utterance(
                row.speaker(),
                repair_text(row.values["Utterance"]).strip(),
                row.label(empty.labels),
                start,
                end,
            )
            group = grouped.setdefault(dialogue(row), {})
            key = tuple(row.integer(column) for column in order)
            if key in group:
                raise row.error(order[-1], f"one that dialogue {dialogue(row)} does not have yet")
            group[key] = utterance
        dialogues += [
            RawDialogue(key, split, tuple(group[position] for position in sorted(group)))
            for key, group in grouped.items()
        ]
    return replace(empty, dialogues=tuple(dialogues), odd_times=odd_times)


def read_rows(path: Path, columns: set[str]) -> Iterator[Row]:
    """Rows of a CSV file that has at least these columns; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, is empty, lacks a column, or a line has the wrong number
            of fields.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    reader = csv.reader(_lines(raw), strict=True)
    header: list[str] | None = None
    found = 0
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                missing = sorted(columns - set(header))
                if missing:
                    raise DataError(
                        f"{path}, line {reader.line_num}: columns {', '.join(missing)} are "
                        f"missing, found {', '.join(header)[:300]}"
                    )
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, expected "
                    f"{len(header)} ({', '.join(header)})"
                )
            found += 1
            yield Row(path, reader.line_num, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    if not found:
        raise DataError(f"{path}: no rows, expected a header and at least one utterance")


def _lines(raw: bytes) -> Iterator[str]:
    for line in raw.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            yield line.decode("cp1252", errors="replace")


_C1_AS_CP1252 = {
    code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)
}


def repair_text(text: str) -> str:
    """Undo the two decoding mistakes found in copies of MELD.

    Windows-1252 read as Latin-1 leaves control characters ("\\x92" for an apostrophe); UTF-8 read
    as Windows-1252 leaves sequences like "â€™". Other text comes back unchanged.
    """
    if "â€" in text or "Ã" in text:
        try:
            text = text.encode("cp1252").decode("utf-8")
        except UnicodeError:
            return text.translate(_C1_AS_CP1252)
    return text.translate(_C1_AS_CP1252)


def missing_times(corpus: RawCorpus) -> int:
    """Utterances without times, odd ones included."""
    return sum(
        utterance.start is None
        for dialogue in corpus.dialogues
        for utterance in dialogue.utterances
    )
