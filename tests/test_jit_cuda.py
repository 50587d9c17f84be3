"""How the CUDA library is built: for which devices, with which compiler, and why it is not."""

import os
import stat

import pytest
import torch

from rdfkern._backends import jit


@pytest.fixture(autouse=True)
def torch_with_cuda(monkeypatch, tmp_path):
    """As on a machine with a CUDA build of torch and without a device; an empty cache."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("RDFKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_outcomes", {})
    for name in ("RDFKERN_JIT", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def architectures():
    return [flag for flag in jit.recipe("cuda").flags if flag.startswith("-gencode")]


def test_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert jit.unavailable("cuda", build=False) == "this torch is built without CUDA"


def test_no_device():
    assert jit.unavailable("cuda", build=False) == (
        "no CUDA device is visible, and TORCH_CUDA_ARCH_LIST is not set"
    )


def test_devices_that_are_visible(monkeypatch):
    capabilities = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert architectures() == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
    ]


def test_architectures_of_the_environment(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;12.0 9.0a+PTX")
    assert architectures() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    folder = jit.recipe("cuda").folder
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert jit.recipe("cuda").folder != folder


def test_architecture_that_is_no_number(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(jit.BuildError, match="numbers such as 8.0 or 9.0.PTX, got Ampere"):
        jit.recipe("cuda")


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert jit.unavailable("cuda", build=False) == (
        "no CUDA compiler: nvcc is not in /nowhere/bin; install it or set CUDA_HOME"
    )
    with pytest.warns(UserWarning, match="without its cuda kernels: no CUDA compiler"):
        assert jit.unavailable("cuda", build=True).startswith("no CUDA compiler")


def test_forbidden_to_build(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("RDFKERN_JIT", "0")
    assert "RDFKERN_JIT=0 forbids" in jit.unavailable("cuda", build=False)


def test_header_is_part_of_the_content(tmp_path):
    recipe = jit.Recipe("cuda", (), (), (), ())
    header = tmp_path / "tile.cuh"
    header.write_text("1")
    with_header = jit.Recipe("cuda", (), (), (), (header,))
    assert recipe.folder != with_header.folder


def test_compile_error_is_named_and_remembered(monkeypatch, tmp_path):
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(
        f'#!/bin/sh\necho call >> {tmp_path}/calls\necho "kernel.cuh(7): error: no such tile" >&2\n'
        "exit 2\n"
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("CUDA_HOME", str(compiler.parents[1]))
    assert jit.unavailable("cuda", build=False) is None
    with pytest.warns(UserWarning, match=r"kernel.cuh\(7\): error: no such tile in: .*bin/nvcc"):
        reason = jit.unavailable("cuda", build=True)
    # Sources that had not begun when the first one failed are not compiled.
    calls = (tmp_path / "calls").read_text()
    assert jit.unavailable("cuda", build=True) == reason
    assert (tmp_path / "calls").read_text() == calls


def test_nvcc_is_found_on_path(monkeypatch, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert jit.nvcc() == str(compiler)


def test_sources_and_headers_of_the_library(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    recipe = jit.recipe("cuda")
    assert "diff_attention.cu" in [path.name for path in recipe.sources]
    assert {"launch.h", "tiles.cuh"} <= {path.name for path in recipe.headers}
    assert "-ltorch_cuda" in recipe.link_flags
