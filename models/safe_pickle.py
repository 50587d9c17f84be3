"""Pickles read as data: containers, numbers, strings and arrays, and nothing that runs.

Unpickling calls what the file names. Here the only names that mean anything are those with which
numpy and Python write arrays and containers, and each stands for a function of this module: nothing
that a file names is imported or called, arrays are rebuilt from their bytes.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .data import DataError


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


class StoredArray:
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
    "numpy:ndarray": StoredArray,
    "numpy:dtype": lambda name, *flags: _Dtype(name),
    "numpy.multiarray:_reconstruct": lambda kind, shape, code: StoredArray(),
    "numpy.multiarray:scalar": lambda dtype, raw=b"": StoredArray(dtype, raw),
    "numpy.numeric:_frombuffer": lambda raw, dtype, shape, order: StoredArray(
        dtype, raw, shape, order
    ),
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
