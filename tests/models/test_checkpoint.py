import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from rdfkern.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_json,
    save_checkpoint,
    under_prefix,
    with_prefix,
    write_json,
)


def tensors(fill=1.0):
    return {
        "a": torch.full((30, 20), fill),
        "b/c": torch.tensor(3.0),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "empty": torch.zeros(0, 3),
        "half": torch.full((3,), fill, dtype=torch.bfloat16),
    }


def test_round_trip_keeps_every_bit(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    state = {"step": 3, "score": 0.1 + 0.2, "history": [{"epoch": 1}]}
    save_checkpoint(path, tensors(), state)
    found, read = load_checkpoint(path)
    assert read == state
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype
    assert torch.equal(load_file(path)["a"], tensors()["a"])  # an ordinary safetensors file
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_views_of_one_storage_are_saved_apart(tmp_path):
    base = torch.arange(6.0)
    save_checkpoint(tmp_path / "x", {"a": base[:3], "b": base[2:], "c": base}, {})
    found, _ = load_checkpoint(tmp_path / "x")
    assert torch.equal(found["b"], base[2:])


def test_prefixes_are_inverse():
    both = with_prefix("model", {"a.b": torch.ones(1)}) | with_prefix("best", {"c": torch.ones(2)})
    assert under_prefix("model", both).keys() == {"a.b"}
    assert under_prefix("best", both).keys() == {"c"}


def failing_fsync(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors(1.0), {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(CheckpointError, match="x.safetensors: No space left.*intact"):
            save_checkpoint(path, tensors(2.0), {"step": 2})
    found, state = load_checkpoint(path)
    assert state == {"step": 1} and torch.equal(found["a"], tensors(1.0)["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_outgrows_its_limit_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors(1.0), {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(CheckpointError, match=r"could not save .*x.safetensors"):
            save_checkpoint(path, tensors(2.0), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert load_checkpoint(path)[1] == {"step": 1}


def test_nothing_saved_before_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(CheckpointError, match="nothing was saved before"):
        write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "header", "state"])
def test_damage_is_found(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors(), {"step": 1})
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-1] ^= 1
    elif damage == "empty":
        content = bytearray()
    elif damage == "state":
        content = content.replace(b"step", b"stop")
    else:
        content[10] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint .*x.safetensors is damaged"):
        load_checkpoint(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not a checkpoint of rdfkern"):
        load_checkpoint(tmp_path / "foreign")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="bad.json is damaged"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path / "none.json")
