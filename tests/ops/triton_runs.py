"""Where tests of Triton kernels run: in Triton's interpreter, under ttsem, or on a GPU.

Triton decides at import whether it interprets, so a file of such tests runs itself in processes of
its own: once in the interpreter, once under ttsem where that is installed. On a machine with a GPU
its tests run in the very process that collects them: `pytest -m gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rdfkern
from rdfkern._backends import triton_device

INTERPRETED = triton_device.interpreted()
SIMULATED = INTERPRETED or "ttsem" in sys.modules
REASON = rdfkern.available_backends("diff_attention")["triton"]  # why no kernel runs here, or None
DEVICE = "cpu" if INTERPRETED else "cuda"


def _of_kernels(reason: str | None) -> Callable:
    skip = pytest.mark.skipif(reason is not None, reason=str(reason))
    return lambda test: pytest.mark.gpu(skip(test))


kernels_run = _of_kernels(REASON and f"{REASON}; see test_in_the_interpreter")
# On a GPU, or on the one that ttsem makes.
compiled = _of_kernels("kernels are interpreted" if INTERPRETED else REASON)
on_a_gpu = _of_kernels("kernels are simulated" if SIMULATED else REASON)
outside = pytest.mark.skipif(REASON is None, reason="the kernels run in this very process")
selections = pytest.mark.parametrize(
    "select", ["not slow", pytest.param("slow", marks=pytest.mark.slow)]
)


def in_the_interpreter(file: str, select: str = "not slow") -> None:
    """Run the tests of a file, and have them pass."""
    _run(file, select, "-m", "pytest", TRITON_INTERPRET="1")


def under_ttsem(file: str, select: str = "not slow") -> None:
    """The same where kernels are checked for races and for reads and writes out of bounds."""
    if importlib.util.find_spec("ttsem") is None:
        pytest.skip("ttsem is not installed: pip install --ignore-requires-python --no-deps ttsem")
    _run(file, select, "-m", "ttsem.sanitize", "pytest")


def _run(file: str, select: str, *command: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, *command, file, "-q", "-x", "-m", select]
        + ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
