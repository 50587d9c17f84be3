"""The feature pickles that the field passes around for IEMOCAP and MELD (SDT, DEDNet, ReDiFu).

One tuple `(ids, speakers, labels, text, text2, text3, text4, audio, visual, sentences, train ids,
test ids[, extra])`: 12 elements for IEMOCAP, 13 for MELD. Each of the middle ones maps a dialogue's
id to one entry per utterance. The feature extractors and the order of the labels are those of the
published files.

A pickle is a program, so it is read here by an unpickler that knows only containers and the plain
description of arrays: nothing that a file names is imported or called, arrays are rebuilt from
their bytes by this module.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .data import Corpus, DataError, Dialogue

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
    if isinstance(value, _Array):
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


class _Dtype:
    """What a pickle says about an array's element type, as data."""

    __slots__ = ("name", "order")

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def resolve(self, where: str) -> np.dtype:
        """The type, if it is a plain number."""
        name = self.name if isinstance(self.name, str) else ""
        match = re.fullmatch(r"[<>=|]?([iu][1248]|f[248]|b1)", name)
        if match is None or self.order not in ("<", ">", "=", "|"):
            raise DataError(f"{where}: element type {self.name!r}, expected a plain number")
        return np.dtype(match[1]).newbyteorder(self.order)


class _Array:
    """What a pickle says about an array, as data."""

    __slots__ = ("dtype", "fortran", "raw", "shape")

    def __init__(
        self, dtype: Any = None, raw: Any = b"", shape: Any = (), fortran: Any = False
    ) -> None:
        self.dtype, self.raw, self.shape, self.fortran = dtype, raw, shape, fortran

    def __setstate__(self, state: Any) -> None:
        self.shape, self.dtype, self.fortran, self.raw = state[-4:]

    def rebuild(self, where: str) -> np.ndarray:
        """The array in float64.

        Raises:
            DataError: not numeric, or its bytes do not fit its shape.
        """
        if not isinstance(self.dtype, _Dtype):
            raise DataError(f"{where}: an array without an element type")
        dtype = self.dtype.resolve(where)
        raw = self.raw.encode("latin1", "replace") if isinstance(self.raw, str) else self.raw
        shape = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if not all(isinstance(size, int) and 0 <= size < 2**40 for size in shape) or len(shape) > 8:
            raise DataError(f"{where}: an array of shape {self.shape!r}")
        count = 1
        for size in shape:
            count *= size
        if not isinstance(raw, bytes | bytearray) or len(raw) != count * dtype.itemsize:
            raise DataError(
                f"{where}: an array of shape {shape} and type {dtype} needs "
                f"{count * dtype.itemsize} bytes, the file has "
                f"{len(raw) if isinstance(raw, bytes | bytearray) else 'none'}"
            )
        flat = np.frombuffer(raw, dtype)
        fortran = self.fortran is True or self.fortran == 1 or self.fortran == "F"
        return flat.reshape(shape, order="F" if fortran else "C").astype(np.float64)


class _Allowed:
    """Stands for a permitted name; the pickle can call it and nothing else."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a permitted name cannot be changed")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


def _mapping(*args: Any) -> dict[Any, Any]:
    """An OrderedDict of pairs or a defaultdict of a factory, both empty or filled later."""
    return dict(args[0]) if args and isinstance(args[0], list | tuple) else {}


def _collection(kind: Callable[..., Any]) -> Callable[..., Any]:
    """A collection of what is already there: a range is refused, it may have any size."""

    def make(items: list[Any] | tuple[Any, ...] = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise pickle.UnpicklingError(f"a collection made of a {type(items).__name__}")
        return kind(items)

    return make


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > 2**31:
        raise pickle.UnpicklingError(f"{made} is too long")
    return made


_PERMITTED: dict[str, Callable[..., Any]] = {
    "numpy:ndarray": _Array,
    "numpy:dtype": lambda name, *flags: _Dtype(name),
    "numpy.multiarray:_reconstruct": lambda kind, shape, code: _Array(),
    "numpy.multiarray:scalar": lambda dtype, raw=b"": _Array(dtype, raw),
    "numpy.numeric:_frombuffer": lambda raw, dtype, shape, order: _Array(dtype, raw, shape, order),
    "codecs:encode": _latin1,
    "collections:OrderedDict": _mapping,
    "collections:defaultdict": _mapping,
    "builtins:range": _range,
    "builtins:xrange": _range,
    **{f"builtins:{kind.__name__}": _collection(kind) for kind in (dict, frozenset, list, set)},
}
_ALIASES = {"__builtin__": "builtins", "_codecs": "codecs"}


class _Restricted(pickle.Unpickler):
    """Hands out only `_PERMITTED` names, each as a stand-in."""

    def find_class(self, module: str, name: str) -> _Allowed:
        short = re.sub(r"^numpy\._?core\.", "numpy.", _ALIASES.get(module, module))
        function = _PERMITTED.get(f"{short}:{name}")
        if function is None:
            raise _Forbidden(f"{module}.{name}")
        return _Allowed(function)


class _Forbidden(Exception):
    """A pickle asked for a name that is not permitted."""


def _check_memo(file: BinaryIO) -> None:
    """Refuse memo numbers that no writer gives: the unpickler allocates a table up to them."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"memo number {argument} after {count} operations")


def load_restricted(path: Path) -> Any:
    """Unpickle containers, numbers, strings and arrays; arrays come as descriptions.

    Raises:
        DataError: the file cannot be read, is damaged, or names anything else.
    """
    try:
        with path.open("rb") as file:
            _check_memo(file)
            file.seek(0)
            return _Restricted(file, encoding="latin1").load()
    except _Forbidden as error:
        raise DataError(
            f"{path}: the pickle refers to {error}, expected only containers and numeric arrays; "
            "nothing of it was run"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    # Garbage makes an unpickler raise almost anything.
    except Exception as error:
        raise DataError(
            f"{path}: damaged pickle: {type(error).__name__}: {str(error)[:200]}"
        ) from None
