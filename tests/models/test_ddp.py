import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rdfkern.models.checkpoint import read_json
from rdfkern.models.data import Batch
from rdfkern.models.processes import Processes
from rdfkern.models.runs import load_data
from rdfkern.models.train import run_training
from rdfkern.models.trainer import Trainer


def test_two_processes_equal_one(tiny_run, tiny_arguments, tmp_path):
    """Some batches hold a single dialogue, so one process gets none."""
    config = tiny_run("one", network={"dropout": 0.0}, epochs=2, class_weights="balanced")
    assert 1 in {len(batch) for batch in trainer_of(config).batches(0)}
    alone = run_training(config)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "rdfkern.models.train", *tiny_arguments, "--out", str(tmp_path / "two")),
        *("--network.dropout", "0", "--epochs", "2", "--class-weights", "balanced"),
    ]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("epoch   1") == 1  # only the first process reports
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("k_proj.bias"):
            continue  # softmax cancels it: its gradient is rounding noise, which Adam scales up
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5, msg=name)
    together = read_json(tmp_path / "two" / "report.json")
    assert together["about"]["training"]["processes"] == 2
    for row, expected in zip(
        together["about"]["training"]["history"], alone["about"]["training"]["history"], strict=True
    ):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert row["validation_weighted_f1"] == expected["validation_weighted_f1"]


def trainer_of(config) -> Trainer:
    return Trainer(config, load_data(config), Processes(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"denoise": "plain"},
        {"denoise": "temporal"},
        {"denoise": "none", "relations": "off"},
        {"fusion": "gate"},
    ],
    ids=str,
)
def test_every_parameter_has_a_gradient_even_without_a_dialogue(tiny_run, network):
    """DistributedDataParallel waits for the gradient of every parameter in every process."""
    trainer = trainer_of(tiny_run(network=network))
    nothing = Batch(
        features={name: torch.zeros(0, dim) for name, dim in trainer.dims.items()},
        speaker=torch.zeros(0, dtype=torch.int64),
        speaker_id=torch.zeros(0, dtype=torch.int64),
        labels=torch.zeros(0, dtype=torch.int64),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        num_speakers=0,
    )
    outputs = trainer.network(nothing)
    trainer.objective.sums(outputs, nothing.labels).sum().backward()
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
