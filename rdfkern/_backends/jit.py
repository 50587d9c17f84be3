"""Native libraries: compiled once per machine, at first use and never at import, kept by content.

A library is identified by everything that goes into it: sources, flags (the instruction set is one
of them), compiler and torch. Whoever finds its file loads it; otherwise one process builds it
under a file lock while the others wait. A failure is remembered for the rest of the process, so
that it costs one attempt and one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..csrc import ROOT

LOCK_TIMEOUT = 600
BUILD_TIMEOUT = 300
X86_FLAGS = {
    "AVX512": (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
    ),
    "AVX2": "-mavx2 -mfma -mf16c",
}
COMMON_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -Wno-psabi"
# 2.11, the oldest torch that rdfkern supports: the library then loads in every later one.
TARGET_VERSION = "0x020b000000000000"

logger = logging.getLogger("rdfkern")
_outcomes: dict[str, str | None] = {}


class BuildError(RuntimeError):
    """A native library could not be built or loaded; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What one library is made of, and so what its name in the cache stands for."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]

    @property
    def key(self) -> str:
        digest = hashlib.sha256()
        compiler = _compiler_version(self.compiler)
        parts = [torch.__version__, platform.machine(), compiler, *self.flags, *self.link_flags]
        for path in (*self.sources, *self.headers):
            parts += [path.name, path.read_text()]
        for part in parts:
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:16]

    def commands(self, folder: Path) -> tuple[list[list[str]], list[str]]:
        """(one compilation per source, the link) with all results in `folder`."""
        objects = [str(folder / f"{source.stem}.o") for source in self.sources]
        compile_all = [
            [self.compiler, *self.flags, "-c", str(source), "-o", target]
            for source, target in zip(self.sources, objects, strict=True)
        ]
        library = str(folder / f"{self.name}.so")
        return compile_all, [self.compiler, "-shared", *objects, *self.link_flags, "-o", library]


def unavailable(name: str, *, build: bool) -> str | None:
    """Why the library cannot be used, or None where it is loaded, cached or can be built.

    Args:
        name: `cpu`.
        build: build and load it now, so that the answer is certain. Otherwise nothing is compiled.
    """
    if build:
        return _outcome(name)
    if name in _outcomes:
        return _outcomes[name]
    try:
        recipe = _recipe(name)
    except BuildError as error:
        return str(error)
    if not (_folder(recipe) / f"{name}.so").exists() and not _may_build():
        return "it is not built yet, and RDFKERN_JIT=0 forbids to build it"
    return None


def load(name: str) -> None:
    """Load the library, building it first where it is not cached.

    Raises:
        BuildError: neither is possible. The reason of the first attempt is repeated afterwards.
    """
    reason = _outcome(name)
    if reason is not None:
        raise BuildError(reason)


@torch.compiler.assume_constant_result
def _outcome(name: str) -> str | None:
    if name not in _outcomes:
        try:
            _load_library(_recipe(name))
            _outcomes[name] = None
        except BuildError as error:
            _outcomes[name] = str(error)
            warnings.warn(f"rdfkern runs without its {name} kernels: {error}", stacklevel=2)
    return _outcomes[name]


def build(name: str) -> Path:
    """Build the library unless it is cached; returns its file.

    Raises:
        BuildError: there is no compiler, it failed, or RDFKERN_JIT=0 forbids to use it.
    """
    recipe = _recipe(name)
    folder = _folder(recipe)
    library = folder / f"{name}.so"
    if library.exists():
        return library
    if not _may_build():
        raise BuildError("it is not built yet, and RDFKERN_JIT=0 forbids to build it")
    with _exclusive(folder):
        if not library.exists():
            _compile(recipe, library)
    return library


def clean() -> None:
    """Remove every cached library."""
    shutil.rmtree(_cache_root(), ignore_errors=True)


def _load_library(recipe: Recipe) -> None:
    library = build(recipe.name)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        if not _may_build():
            raise BuildError(f"{library} does not load: {_reason(error)}") from None
        logger.warning("%s does not load, building it again: %s", library, _reason(error))
        with _exclusive(library.parent), contextlib.suppress(FileNotFoundError):
            os.replace(library, library.with_suffix(".broken"))
        try:
            torch.ops.load_library(build(recipe.name))
        except OSError as second:
            raise BuildError(f"{library} does not load: {_reason(second)}") from None


def _reason(error: OSError) -> str:
    return str(error.__cause__ or error).strip()


def _compile(recipe: Recipe, library: Path) -> None:
    logger.info("building %s kernels (once, some seconds)", recipe.name)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        compile_all, link = recipe.commands(Path(scratch))
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            for _ in pool.map(_run, compile_all):
                pass
        _run(link)
        # Readers see the whole file or none.
        os.replace(Path(scratch) / library.name, library)


def _run(command: list[str]) -> None:
    spelled = shlex.join(command)
    if os.environ.get("RDFKERN_JIT_VERBOSE", "0") not in ("", "0"):
        logger.warning("%s", spelled)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{error} in: {spelled}") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), (lines or ["no output"])[0])
        raise BuildError(f"{first.strip()} in: {spelled}")


def _recipe(name: str) -> Recipe:
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler: {compiler} is not on PATH; install one or set CXX")
    if platform.system() != "Linux":
        raise BuildError(f"native kernels are built on Linux only, this is {platform.system()}")
    torch_folder = Path(torch.__file__).parent
    instructions = ""
    if platform.machine() == "x86_64":
        instructions = X86_FLAGS.get(torch.backends.cpu.get_cpu_capability(), "")
    flags = [
        *COMMON_FLAGS.split(),
        *instructions.split(),
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{torch_folder / 'include'}",
    ]
    folder = ROOT / name
    sources = tuple(sorted(folder.glob("*.cpp")))
    if not sources:
        raise BuildError(f"the installation is incomplete: no sources in {folder}")
    return Recipe(
        name,
        compiler,
        tuple(flags),
        (f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
        sources,
        tuple(sorted(folder.glob("*.h"))),
    )


@cache
def _compiler_version(compiler: str) -> str:
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} does not answer: {error}") from None
    return answer.stdout


def _may_build() -> bool:
    return os.environ.get("RDFKERN_JIT", "1") != "0"


def _cache_root() -> Path:
    if chosen := os.environ.get("RDFKERN_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "rdfkern"


def _folder(recipe: Recipe) -> Path:
    """The library's own folder in the cache, or in a private one where the cache is read-only."""
    folder = _cache_root() / recipe.key
    if (folder / f"{recipe.name}.so").exists():
        return folder
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.info("cache %s is not writable (%s), using a temporary folder", folder, error)
        folder = _private_root() / recipe.key
        folder.mkdir(exist_ok=True)
        return folder


@cache
def _private_root() -> Path:
    return Path(tempfile.mkdtemp(prefix="rdfkern-"))


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    # The kernel releases the lock of a process that dies, so no lock is ever stale.
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=LOCK_TIMEOUT):
            yield
    except Timeout:
        raise BuildError(
            f"another process has been building in {folder} for {LOCK_TIMEOUT} s"
        ) from None
