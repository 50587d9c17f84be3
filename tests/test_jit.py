"""The cache of native libraries: who builds, who waits, what a broken cache or compiler does."""

import logging
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from rdfkern._backends import jit

COMPILER = os.environ.get("CXX") or "c++"
pytestmark = pytest.mark.skipif(
    jit.unavailable("cpu", build=False) is not None, reason="no compiler for native libraries"
)

# Stands in for the recipe of the `cpu` library in this process and in the ones started below.
SMALL_LIBRARY = """
from pathlib import Path
from rdfkern._backends import jit
def recipe(name):
    source = Path({source!r})
    return jit.Recipe(name, ("-O0", "-fPIC"), (), (source,), ())
jit.recipe = recipe
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """One small C++ file as the whole library, an empty cache, no memory of earlier attempts."""
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int rdfkern_answer() { return 42; }')
    monkeypatch.setenv("RDFKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("RDFKERN_JIT", raising=False)
    monkeypatch.setattr(jit, "_outcomes", {})
    monkeypatch.setattr(jit, "recipe", jit.recipe)
    exec(SMALL_LIBRARY.format(source=str(file)), {})
    return file


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A compiler that notes every call and takes its time; returns how often it compiled."""
    log = tmp_path / "calls"
    script = tmp_path / "spy-c++"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nsleep ${{SPY_SLEEP:-0}}\nexec {COMPILER} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return lambda: (
        len([c for c in log.read_text().splitlines() if " -c " in c]) if log.exists() else 0
    )


def in_process(source, code, **popen):
    program = SMALL_LIBRARY.format(source=str(source)) + code
    return subprocess.Popen([sys.executable, "-c", program], **popen)


def answer(library):
    import ctypes

    return ctypes.CDLL(str(library)).rdfkern_answer()


def test_builds_once_and_then_needs_no_compiler(source, spy, monkeypatch):
    library = jit.build("cpu")
    assert answer(library) == 42
    assert jit.build("cpu") == library
    assert spy() == 1
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("RDFKERN_JIT", "0")
    jit.load("cpu")
    assert jit.unavailable("cpu", build=False) is None
    assert sorted(path.name for path in library.parent.iterdir()) == [
        "cpu.sha256",
        "cpu.so",
        "lock",
    ]


def test_place_follows_content_and_instruction_set(source, monkeypatch):
    before = jit.recipe("cpu").folder
    source.write_text(source.read_text().replace("42", "43"))
    assert jit.recipe("cpu").folder != before
    monkeypatch.undo()
    folders = set()
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        folders.add(jit.recipe("cpu").folder)
    assert len(folders) == (3 if os.uname().machine == "x86_64" else 1)


def test_asking_does_not_build(source, spy):
    assert jit.unavailable("cpu", build=False) is None
    assert spy() == 0
    assert jit.unavailable("cpu", build=True) is None
    assert spy() == 1


def test_import_does_not_build(source, spy):
    subprocess.run([sys.executable, "-c", "import rdfkern"], check=True, timeout=120)
    assert spy() == 0


def test_lock_file_of_a_dead_process_does_not_block(source):
    folder = jit.recipe("cpu").folder
    folder.mkdir(parents=True)
    (folder / "lock").write_text("")
    start = time.perf_counter()
    jit.build("cpu")
    assert time.perf_counter() - start < 30


def test_killed_build_leaves_nothing_in_the_way(source, spy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("SPY_SLEEP", "60")
        process = in_process(source, "jit.build('cpu')", start_new_session=True)
        deadline = time.monotonic() + 60
        while not spy() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert spy() == 1
    assert answer(jit.build("cpu")) == 42


@pytest.mark.parametrize("damage", ["garbage", "half", "no checksum"])
def test_damaged_library_is_put_aside_and_rebuilt_once(source, spy, damage, caplog):
    library = jit.build("cpu")
    content = library.read_bytes()
    # A new file: what this process has mapped must not change under it.
    library.unlink()
    library.write_bytes(
        {"garbage": b"no library", "half": content[: len(content) // 2]}.get(damage, content)
    )
    if damage == "no checksum":
        library.with_suffix(".sha256").unlink()
    with caplog.at_level(logging.WARNING, logger="rdfkern"):
        jit.load("cpu")
    assert spy() == 2
    assert library.with_suffix(".damaged").exists()
    assert "is damaged, building it again" in caplog.text


def test_library_that_never_loads_is_remembered(source, spy):
    source.write_text('extern "C" int missing_symbol(); int use = missing_symbol();')
    with pytest.warns(UserWarning, match="does not load: .*missing_symbol"):
        reason = jit.unavailable("cpu", build=True)
    assert "missing_symbol" in reason
    assert jit.unavailable("cpu", build=True) == reason
    assert spy() == 1


def test_cache_that_cannot_be_written(source, spy, tmp_path, monkeypatch):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("RDFKERN_CACHE_DIR", str(in_the_way / "cache"))
    library = jit.build("cpu")
    assert answer(library) == 42
    assert not str(library).startswith(str(tmp_path))
    jit.load("cpu")
    assert spy() == 1


def test_read_only_cache_with_the_library_is_used(source, spy):
    library = jit.build("cpu")
    for path in (library, library.parent):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert jit.build("cpu") == library
        assert spy() == 1
    finally:
        library.parent.chmod(0o700)


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert jit.unavailable("cpu", build=False) == (
        "no C++ compiler: /nowhere/c++ is not on PATH; install one or set CXX"
    )
    with pytest.warns(UserWarning, match="without its cpu kernels: no C.. compiler"):
        assert "no C++ compiler" in jit.unavailable("cpu", build=True)
    with warnings.catch_warnings(), pytest.raises(jit.BuildError, match="no C.. compiler"):
        warnings.simplefilter("error")
        jit.load("cpu")


def test_forbidden_to_build(source, monkeypatch):
    monkeypatch.setenv("RDFKERN_JIT", "0")
    assert "RDFKERN_JIT=0 forbids" in jit.unavailable("cpu", build=False)
    with pytest.raises(jit.BuildError, match="RDFKERN_JIT=0 forbids"):
        jit.build("cpu")


def test_compile_error_is_named_and_remembered(source, spy):
    source.write_text("int answer() { return unheard_of; }")
    with pytest.warns(UserWarning, match="error: .unheard_of. was not declared"):
        reason = jit.unavailable("cpu", build=True)
    assert "answer.cpp:1" in reason and f" -c {source}" in reason
    for _ in range(3):
        with pytest.raises(jit.BuildError, match="unheard_of"):
            jit.load("cpu")
    assert spy() == 1
    assert not list(jit.recipe("cpu").folder.glob("build-*"))


def test_processes_at_once_build_once(source, spy, monkeypatch):
    monkeypatch.setenv("SPY_SLEEP", "1")
    code = "jit.load('cpu')"
    processes = [in_process(source, code) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert spy() == 1


def test_commands_are_shown_on_request(source, monkeypatch, caplog):
    monkeypatch.setenv("RDFKERN_JIT_VERBOSE", "1")
    jit.build("cpu")
    assert f" -c {source} " in caplog.text and " -shared " in caplog.text


def test_operation_goes_on_without_a_compiler(tmp_path):
    code = """
import pytest, torch, rdfkern
x = torch.ones(1, 1, 3, 4)
with pytest.warns(UserWarning, match="no C.. compiler"):
    rdfkern.diff_attention(x, x, x, x, x, 0.5)
assert "cpu: no C++ compiler" in rdfkern.explain("diff_attention", x, x, x, x, x, 0.5)
with pytest.raises(rdfkern.BackendUnavailableError, match="impl='cpu'.*no C.. compiler"):
    rdfkern.diff_attention(x, x, x, x, x, 0.5, impl="cpu")
"""
    environment = os.environ | {"CXX": "/nowhere/c++", "RDFKERN_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


class TestCommand:
    def run(self, *arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "rdfkern.build", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
        )

    def test_builds_and_names_the_file(self):
        done = self.run("cpu")
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.removeprefix("cpu: ").split(" (")[0]).exists()

    def test_clean_and_failure(self, tmp_path):
        (tmp_path / "cpu-old").mkdir()
        done = self.run("cpu", "--clean", RDFKERN_CACHE_DIR=str(tmp_path), CXX="/nowhere/c++")
        assert done.returncode == 1
        assert "cpu: no C++ compiler" in done.stderr
        assert not tmp_path.exists() or not list(tmp_path.iterdir())
