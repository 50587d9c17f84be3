"""The environment report holds what a bug report needs and survives what is broken."""

import json
import subprocess
import sys

from rdfkern import env


def test_command_prints_json_with_one_line_per_operation_and_backend(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rdfkern.env", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["packages"]["torch"]
    operations = report["backends"]
    assert {"diff_attention", "relation_conv", "diffusion_attention"} <= operations.keys()
    for backends in operations.values():
        assert backends["reference"] == "can run"
        assert set(backends) == {"triton", "cuda", "cpu", "torch", "reference"}


def test_a_broken_probe_becomes_a_line(monkeypatch):
    def broken():
        raise OSError("no such driver")

    monkeypatch.setattr(env, "_torch", broken)
    report = env.collect()
    assert report["torch"] == "OSError: no such driver"
    assert "torch: OSError: no such driver" in env.render(report)
