"""Builds csrc/cuda for the CPU and lets rdfkern run it there; include/cuda_runtime.h says how.

Tests reach it through the fixture `cuda_emulator`. Faulty and sanitized builds run in a process of
their own, since a process can hold one library with an operator: `run_tests` starts pytest there,
and RDFKERN_EMULATOR_LIBRARY tells the harness in it which library to load.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX") or "c++"
LIBRARY_VARIABLE = "RDFKERN_EMULATOR_LIBRARY"
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -w -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 "
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())} "
    f"-I{HERE / 'include'} -I{TORCH / 'include'}"
).split()
SANITIZERS = ("-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=bounds,alignment")
ASAN_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0"
SCHEDULES = ("forward", "reverse", "round robin", "eager warps", "random")


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    return None if shutil.which(COMPILER) else f"no C++ compiler: {COMPILER} is not on PATH"


def build(
    source: str,
    folder: Path,
    *,
    sanitize: bool = False,
    faults: tuple[tuple[str, str, str], ...] = (),
) -> Path:
    """The library of one .cu of csrc/cuda, with everything that it includes.

    Args:
        source: name of the .cu.
        folder: where copies, objects and the library go.
        sanitize: with the sanitizers of addresses, array bounds and alignment.
        faults: (file, text, replacement) to plant; each text must occur exactly once in its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = SOURCES
    if faults:
        sources = folder / "sources"
        shutil.copytree(SOURCES, sources)
        for name, text, replacement in faults:
            content = (sources / name).read_text()
            assert content.count(text) == 1, f"{name} has {content.count(text)} times: {text}"
            (sources / name).write_text(content.replace(text, replacement))
    flags = [*FLAGS, *(SANITIZERS if sanitize else ())]
    objects = []
    for path in (sources / source, HERE / "runtime.cpp", HERE / "torch_shims.cpp"):
        objects.append(str(folder / f"{path.stem}.o"))
        _run(COMPILER, *flags, "-x", "c++", "-c", str(path), "-o", objects[-1])
    library = folder / f"{Path(source).stem}.so"
    links = ("-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu")
    _run(COMPILER, "-shared", *objects, *flags, *links, "-o", str(library))
    return library


def build_program(source: Path, folder: Path) -> Path:
    """A program of one .cu with a main of its own, with sanitizers."""
    program = folder / source.stem
    flags = (*FLAGS, f"-I{SOURCES}", *SANITIZERS)
    _run(COMPILER, *flags, "-x", "c++", str(source), str(HERE / "runtime.cpp"), "-o", str(program))
    return program


def _runtime(name: str) -> str:
    asking = [COMPILER, f"-print-file-name={name}"]
    return subprocess.run(asking, capture_output=True, text=True, check=True).stdout.strip()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Emulator:
    """One loaded library. Its operators, registered for CUDA, also take tensors on the CPU."""

    def __init__(self, library: Path, operators: tuple[str, ...]) -> None:
        torch.ops.load_library(library)
        self._set_schedule = ctypes.CDLL(str(library)).emulator_set_schedule
        self._set_schedule.argtypes = (ctypes.c_int, ctypes.c_uint64)
        self._registrations = torch.library.Library("rdfkern", "FRAGMENT")
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        for name in operators:
            overload = getattr(torch.ops.rdfkern, name).default
            self._registrations.impl(
                name, lambda *a, overload=overload: overload.redispatch(cuda, *a), "CPU"
            )

    @contextmanager
    def schedule(self, name: str, seed: int = 0) -> Iterator[None]:
        """In what order the threads of a block run; one of SCHEDULES."""
        self._set_schedule(SCHEDULES.index(name), seed)
        try:
            yield
        finally:
            self._set_schedule(0, 0)


def load(source: str, operators: tuple[str, ...]) -> Emulator:
    """The emulator of one .cu; builds it unless RDFKERN_EMULATOR_LIBRARY names a library."""
    if library := os.environ.get(LIBRARY_VARIABLE):
        return Emulator(Path(library), operators)
    with tempfile.TemporaryDirectory() as folder:
        return Emulator(build(source, Path(folder)), operators)


def run_tests(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with these arguments, on this library, in a process where sanitizers work."""
    environment = os.environ | {LIBRARY_VARIABLE: str(library), "ASAN_OPTIONS": ASAN_OPTIONS}
    if b"__asan_init" in library.read_bytes():
        # The sanitizer must come first, and it looks for the C++ library when it starts.
        environment["LD_PRELOAD"] = " ".join(map(_runtime, ("libasan.so", "libstdc++.so.6")))
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], timeout=600
    )
