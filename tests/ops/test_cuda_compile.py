"""nvcc compiles the CUDA kernels within their limits, without spills, and for tensor cores."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from rdfkern._backends import jit
from rdfkern.csrc import ROOT

# The registers of each kernel, by source.
LIMITS = json.loads((Path(__file__).parent / "cuda_limits.json").read_text())
# Kernels that multiply matrices.
PRODUCTS = re.compile(
    r"forward_kernel, \d|query_gradients|key_gradients|convolve|weight_gradient|edge_gradient|"
    r"^maxima"
)


def _nvcc() -> str | None:
    try:
        return jit.nvcc()
    except jit.BuildError:
        return None


NVCC = _nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in CUDA_HOME")


def name_of(symbol):
    """A kernel's name with its template arguments."""
    name = re.search(r"[a-z_]+_kernel", symbol)[0]
    views = re.findall(r"(?:Band|Edge|Window)(?:View|Pairs)", symbol)[:1]
    return ", ".join((name, *views, *re.findall(r"Li(\d+)E", symbol)))


def usage_of(source, architecture, folder):
    """What every kernel uses, by its name."""
    command = [
        NVCC,
        *jit.NVCC_FLAGS.split(),
        f"-DTORCH_TARGET_VERSION={jit.TARGET_VERSION}",
        f"-I{Path(torch.__file__).parent / 'include'}",
        "--cubin",
        f"-arch={architecture}",
        "-Xptxas=-v",
        "--keep",
        f"--keep-dir={folder}",
        str(ROOT / "cuda" / source),
        "-o",
        str(folder / "kernels.cubin"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know {architecture}")
    assert done.returncode == 0, done.stderr
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = {}
    for match in pattern.finditer(done.stdout + done.stderr):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels[name_of(match["name"])] = {
            "registers": int(match["registers"]),
            "local memory": int(match["stack"]) + int(match["stores"]) + int(match["loads"]),
            "static shared memory": int(shared[1]) if shared else 0,
        }
    for entry in next(folder.glob("*.ptx")).read_text().split(".entry ")[1:]:
        kernels[name_of(entry.split("(")[0])]["tensor cores"] = "mma.sync" in entry
    return kernels


@pytest.mark.parametrize("source", LIMITS)
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name == "sm_90" else [pytest.mark.slow])
        for name in ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
    ],
)
def test_kernels_keep_to_their_limits(architecture, source, tmp_path):
    kernels = usage_of(source, architecture, tmp_path)
    assert kernels.keys() == LIMITS[source].keys()
    for name, usage in kernels.items():
        assert usage["local memory"] == 0, f"{name} spills: {usage}"
        # Shared memory is dynamic; launch.h refuses to compile a layout of more than 64 KiB.
        assert usage["static shared memory"] == 0, f"{name}: {usage}"
        assert usage["registers"] <= LIMITS[source][name], f"{name}: {usage}"
        products = architecture != "sm_75" and PRODUCTS.search(name) is not None
        assert usage["tensor cores"] == products, f"{name}: {usage}"
