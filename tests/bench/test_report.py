"""Reports: ratios, refusals, errors; and the one command for GPUs, rehearsed."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import conftest, gpu
from bench.report import render, write
from bench.results import ResultsError, read_results

ROOT = Path(__file__).resolve().parents[2]


def entry(candidate, seconds, *, impl=None, green=True, direction="forward"):
    info = {
        "operation": "diff_attention",
        "candidate": candidate,
        "impl": impl,
        "automatic": impl == "cpu",
        "shape": "square",
        "numbers": {"L": 8},
        "conversations": None,
        "dtype": "float32",
        "direction": direction,
        "device": "a processor",
        "threads": 2,
        "torch": "2.13",
        "peak_memory_bytes": 3 << 20,
        "gemm_share": 0.5,
        "check": {"green": green, "worst": 0.5, "ratio": 44.0, "tensor": "dk"},
    }
    stats = {"min": seconds, "median": 2 * seconds, "rounds": 7}
    return {"name": candidate, "extra_info": info, "stats": stats}


CONTENT = {
    "datetime": "today",
    "benchmarks": [
        entry("rdfkern cpu", 0.1, impl="cpu"),
        entry("rdfkern torch", 0.4, impl="torch"),
        entry("eager", 0.3),
        entry("2 SDPA calls", 0.25),
    ],
    "rdfkern": {
        "command": "python -m pytest bench",
        "left_out": [
            {
                "operation": "diff_attention",
                "shape": "square",
                "direction": "forward",
                "candidate": "4 SDPA calls",
                "reason": "check red: out errs 50 times what plain torch does",
                "red": True,
            },
            {
                "operation": "diff_attention",
                "shape": "square",
                "direction": "forward",
                "candidate": "2 FlexAttention calls",
                "reason": "no compiler",
                "red": False,
            },
        ],
    },
}


@pytest.fixture
def saved(tmp_path):
    def save(content):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(content))
        return path

    return save


def section(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_ratio_is_fastest_peer_over_ours(saved):
    text = render(read_results(saved(CONTENT)))
    row = next(line for line in text.splitlines() if line.startswith("| square (float32)"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("square (float32)", "forward", "cpu", "100", "3.0", "50 %"),
        *("2 SDPA calls", "250", "3.0", "**2.50**", "2.50"),
    ]
    assert "a processor, 2 threads, torch 2.13" in text
    assert "4 SDPA calls: check red" in section(text, "Refused")
    assert "2 FlexAttention calls: no compiler" in section(text, "Left out")


def test_a_red_figure_is_refused_even_if_it_is_the_fastest(saved):
    content = copy.deepcopy(CONTENT)
    content["benchmarks"].append(entry("wrong", 0.001, green=False))
    text = render(read_results(saved(content)))
    assert "wrong: check red: dk errs 44 times" in section(text, "Refused")
    assert "wrong" not in text.split("## Refused")[0]
    assert "**2.50**" in text


def test_our_red_figure_gives_no_ratio(saved):
    content = copy.deepcopy(CONTENT)
    content["benchmarks"][0]["extra_info"]["check"]["green"] = False
    text = render(read_results(saved(content)))
    assert "| no figure |" in text and "**2.50**" not in text
    assert "rdfkern cpu: check red" in section(text, "Refused")


def test_a_figure_without_a_check_is_refused(saved):
    content = copy.deepcopy(CONTENT)
    del content["benchmarks"][3]["extra_info"]["check"]
    content["benchmarks"].append({"name": "stranger", "stats": {}, "extra_info": {}})
    results = read_results(saved(content))
    assert [item.candidate for item in results.refused[:2]] == ["2 SDPA calls", "stranger"]
    assert "**3.00**" in render(results)  # against eager


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": 3}', '{"benchmarks": [3]}'])
def test_other_files_are_named_and_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"other\.json"):
        read_results(path)


def test_a_missing_file_ends_in_one_line(tmp_path):
    command = [sys.executable, "-m", "bench.report", str(tmp_path / "no.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == f"bench.report: {tmp_path / 'no.json'}: cannot be read: " + (
        "No such file or directory"
    )


def test_plots_are_drawn(saved, tmp_path):
    write([saved(CONTENT)], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "diff_attention-time.png", "diff_attention-memory.png"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("shapes", "circle", "got 'circle'"),
        ("conversations", Path("nowhere"), "nowhere is not a folder"),
        ("threads", 0, "must be above 0"),
        ("seconds", -1.0, "must be above 0"),
    ],
)
def test_bad_options_are_named(option, value, message):
    options = {"shapes": "tiny", "device": "cpu", "threads": None, "seconds": 1.0}
    options |= {"conversations": None, option: value}
    config = SimpleNamespace(option=SimpleNamespace(**options), stash={})
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


def test_autotuning_that_is_stopped_keeps_what_is_done(monkeypatch, tmp_path):
    program = (
        """import time; print('{"shape": "a", "reason": null}', flush=True);"""
        """print('{"sha', end="", flush=True); time.sleep(60)"""
    )

    def tune(*arguments, **options):
        command = [sys.executable, "-c", program]
        return subprocess.run(command, text=True, **options)

    monkeypatch.setattr(gpu, "_python", tune)
    plan = gpu.Plan("cuda", "gpu", 3 / 60, tmp_path, False, ())
    found = gpu._autotune(plan)
    assert found["tuned"] == ["a"] and found["not tuned"] == {}
    assert found["stopped"] == "stopped after 0.05 minutes"


def test_rehearsal_of_the_gpu_command(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    # pytest-benchmark measures nothing in a worker of xdist, which this process may be.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads((tmp_path / "results.json").read_text())
    steps = content["rdfkern"]
    assert steps["environment"]["packages"]["torch"]
    assert steps["measurements"] == "passed"
    assert "tiny" in steps["autotuning"]["not tuned"]
    report = (tmp_path / "report.md").read_text()
    for words in ("## diff_attention", "## relation_conv", "dry run on the CPU", "## Steps"):
        assert words in report
    assert (tmp_path / "diff_attention-time.png").exists()
    operations = {entry["extra_info"]["operation"] for entry in content["benchmarks"]}
    assert operations == {
        "diff_attention",
        "temporal_diff_attention",
        "diffusion_attention",
        "relation_conv",
        "relation_attention",
        "relation_dot_attention",
    }
    for timed in content["benchmarks"]:
        assert timed["extra_info"]["check"]["green"]
        assert timed["stats"]["min"] == min(timed["stats"]["data"])
