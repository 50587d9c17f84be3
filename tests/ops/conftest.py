"""Triton without a GPU: its interpreter, with bfloat16 as hardware has it, and its compilers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rdfkern
from rdfkern import csrc


def correct_arithmetic() -> None:
    """Round float32 to bfloat16 to nearest even, multiply bfloat16 tiles by their values, and sum
    products in one order.

    Triton's interpreter, up to 3.9, truncates the one and multiplies the bit patterns of the other.
    It leaves the order to numpy's BLAS, where it depends on layout and processor: backward would
    make other scores than forward did. A sum in float64 rounds once, whatever its order.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)
        return convert(data, source, target, rounding_mode)

    def create_dot(self, a, b, addend, *precision):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        product = np.matmul(a.data, b.data, dtype=np.float64) + addend.data
        return interpreter.TensorHandle(product.astype(addend.data.dtype), addend.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_the_language_once() -> None:
    """Replace Triton's functions by interpreted ones once per launch.

    The interpreter does it anew at every call of a device function, which is most of its time.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)
        return interpreter._LangPatchScope()

    def launch_afresh(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


if os.environ.get("TRITON_INTERPRET") == "1":
    correct_arithmetic()
    patch_the_language_once()


@pytest.fixture
def compile_for():
    """f(launch, architecture): exactly what this launch would compile on that architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    def compile_without_driver(launch, architecture):
        if architecture.startswith("gfx"):
            target = GPUTarget("hip", architecture, 64)
        else:
            target = GPUTarget("cuda", int(architecture[3:]), 32)
        kernel, backend = launch.kernel, make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(**launch.arguments, debug=False)
        options, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)

    return compile_without_driver


@pytest.fixture
def registers(tmp_path):
    """f(compiled, architecture): (registers of a thread, bytes of them that are spilled, stores and
    loads added), as ptxas counts them; of AMD's compiler both are numbers of vector registers."""
    from triton.backends.nvidia.compiler import get_ptxas  # which one depends on the version

    def count(compiled, architecture):
        if architecture.startswith("gfx"):
            assembly = compiled.asm["amdgcn"]
            found = [
                re.search(rf"\.vgpr_{what}:\s+(\d+)", assembly)[1]
                for what in ("count", "spill_count")
            ]
            return int(found[0]), int(found[1])
        capability = int(architecture[3:])
        source = tmp_path / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        log = subprocess.run(
            [
                get_ptxas(capability).path,
                "-lineinfo",
                "-v",
                "--regAllocOptLevel=2",
                source,
                "-o",
                os.devnull,
            ]
            + [f"--gpu-name={architecture}{'a' if capability >= 90 else ''}"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
        return int(re.search(r"Used (\d+) registers", log)[1]), spilled

    return count


@pytest.fixture
def spilled(registers):
    """The second number of `registers` alone."""
    return lambda compiled, architecture: registers(compiled, architecture)[1]


@pytest.fixture
def tracing() -> None:
    """For tests that trace: the device that ttsem makes has no tensors for that."""
    if "ttsem" in sys.modules:
        pytest.skip("ttsem's device cannot be traced")


@pytest.fixture
def temporal_dropout():
    """f(impl, device): outputs and gradients of the temporal form with dropout against a map of
    which the same entries are dropped. V = 1 shows the map itself."""
    length, p = 37, 0.3
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, length, d, generator=generator) for d in (8, 8, 5))
    upstream = torch.randn(1, 2, length, 5, generator=generator)

    def check(impl, device="cpu"):
        def attend(v, lam, q=q, k=k):
            torch.manual_seed(4)
            inputs = [x.to(device) for x in (q, k, v, lam)]
            out = rdfkern.temporal_diff_attention(*inputs, dropout_p=p, impl=impl)
            return out.cpu()

        with torch.no_grad():
            shown = attend(torch.eye(length).expand(1, 2, length, length), torch.zeros(2, 1))
        kept = shown != 0
        assert 0.6 < kept.double().mean() < 0.8
        for lam in (torch.tensor([[0.4], [0.7]]), torch.rand(2, length)):
            leaves = [x.clone().requires_grad_() for x in (q, k, v, lam)]
            out = attend(leaves[2], leaves[3], *leaves[:2])
            wide = [x.detach().double().requires_grad_() for x in leaves]
            weights = torch.softmax(wide[0] @ wide[1].mT / 8**0.5, dim=-1) * kept / (1 - p)
            difference = weights - wide[3][..., None] * weights.roll(1, dims=-1)
            truth = difference @ wide[2]
            got = (out, *torch.autograd.grad(out, leaves, upstream))
            want = (truth, *torch.autograd.grad(truth, wide, upstream.double()))
            for value, expected in zip(got, want, strict=True):
                torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)

    return check


@pytest.fixture
def diffusion_of_kernels():
    """f(impl, device): attention diffusion and its gradients against the reference in float64."""
    generator = torch.Generator().manual_seed(5)
    lengths, total = (17, 1, 0, 20), 38
    dense = [torch.randn(2, 3, 19, d, generator=generator).mT.contiguous().mT for d in (6, 6, 11)]
    packed = [x.transpose(1, 2).flatten(0, 1) for x in dense]
    padding = torch.rand(2, 19, generator=generator) > 0.6
    padding[1] = True
    starts = torch.tensor([0, *lengths]).cumsum(0)
    cases = [
        (dense, {}),
        (dense, {"window": (4, 2), "key_padding_mask": padding, "scale": -0.7}),
        (packed, {"cu_seqlens": starts, "max_seqlen": 20, "window": (-1, 3)}),
        (packed, {"cu_seqlens": starts, "max_seqlen": total, "key_padding_mask": padding.view(-1)}),
    ]

    def check(impl, device="cpu"):
        for inputs, options in cases:
            upstream = torch.randn(inputs[2].shape, generator=generator)

            def outcome(impl, dtype, device, inputs=inputs, options=options, upstream=upstream):
                leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
                moved = {n: getattr(x, "to", lambda _, x=x: x)(device) for n, x in options.items()}
                call = {"steps": 3, "restart": 0.3, "impl": impl, **moved}
                out = rdfkern.diffusion_attention(*leaves, **call)
                gradients = torch.autograd.grad(out, leaves, upstream.to(device, dtype))
                return [x.cpu() for x in (out, *gradients)]

            found = outcome(impl, torch.float32, device)
            expected = outcome("reference", torch.float64, "cpu")
            for value, truth in zip(found, expected, strict=True):
                torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)

    return check


@pytest.fixture
def run_with_fault(tmp_path):
    """f(path, text, fault, file, tests): run tests of a file in the interpreter, on a copy of the
    package in which `fault` stands for `text` in the module or C++ source (csrc/...) `path`."""

    def run(path, text, fault, file, tests):
        shutil.copytree(Path(rdfkern.__file__).parent, tmp_path / "rdfkern")
        if not (tmp_path / "rdfkern" / "csrc").exists():
            shutil.copytree(csrc.ROOT, tmp_path / "rdfkern" / "csrc")
        native = {"RDFKERN_CACHE_DIR": str(tmp_path / "cache")} if path.startswith("csrc/") else {}
        source = tmp_path / "rdfkern" / path
        original = source.read_text()
        assert text in original, "the fault no longer applies"
        source.write_text(original.replace(text, fault))
        # Without pythonpath: the project's settings would put the package itself before its copy.
        settings = ["-o", "addopts=--import-mode=importlib", "-o", "pythonpath="]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, "-p", "no:cacheprovider"]
            + [*settings, "--rootdir", str(tmp_path), "--tb=line"]
            + [str(Path(__file__).with_name(file))],
            env={
                **os.environ,
                **native,
                "TRITON_INTERPRET": "1",
                "PYTHONPATH": os.pathsep.join((str(tmp_path), str(Path(__file__).parent))),
                "OMP_NUM_THREADS": "1",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def catches(run_with_fault):
    """f(...): assert that the tests that `run_with_fault` runs fail."""

    def check(*fault):
        run = run_with_fault(*fault)
        # A negative code is a signal: reading or writing elsewhere may end the whole process.
        caught = run.returncode == 1 or run.returncode < 0
        assert caught, run.stdout[-2000:] + run.stderr[-2000:]

    return check
