"""What importing does and does not do, each in a fresh interpreter."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = ("triton", "tyro", "sklearn", "safetensors", "tensorboard", "matplotlib", "torch_scatter")


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_torch_path_work_without_triton_and_compiler(tmp_path):
    run(
        f"""
import os, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
os.environ["PATH"] = ""
import torch
import rdfkern
q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
out = rdfkern.diff_attention(q, k, q, k, v, 0.5)
assert torch.allclose(out, rdfkern.diff_attention(q, k, q, k, v, 0.5, impl="reference"), atol=1e-5)
""",
        tmp_path,
    )


def test_import_loads_neither_optional_packages_nor_implementations(tmp_path):
    loaded = run(
        "import sys, torch; before = set(sys.modules); import rdfkern;"
        "print(*sorted(set(sys.modules) - before))",
        tmp_path,
    ).split()
    optional = [name for name in loaded if name.split(".")[0] in BLOCKED]
    assert optional == []
    assert "rdfkern.models" not in loaded
    assert [name for name in loaded if name.endswith((".reference", ".composed"))] == []


@pytest.mark.parametrize("name", ["models", "csrc"])
def test_no_top_level_import_name_is_claimed(name, tmp_path):
    run(f"import importlib.util as u; assert u.find_spec({name!r}) is None", tmp_path)


def test_every_public_name_is_there_and_documented(tmp_path):
    run(
        "import rdfkern, rdfkern.nn\n"
        "for module in (rdfkern, rdfkern.nn):\n"
        "    for name in module.__all__:\n"
        "        assert getattr(module, name).__doc__, name",
        tmp_path,
    )


def test_models_are_found_from_the_root_of_a_checkout():
    root = Path(__file__).parents[1]
    where = run("import rdfkern.models, rdfkern.csrc; print(rdfkern.models.__file__)", root)
    assert Path(where.strip()) == root / "models" / "__init__.py"


def test_readme_examples_run_as_printed(tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    run("\n".join(blocks), tmp_path)
