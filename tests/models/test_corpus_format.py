"""The open format: round trip, atomic writing, damage."""

from __future__ import annotations

import json
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdfkern.models.corpus_format import read_corpus, write_corpus
from rdfkern.models.data import UNLABELLED, Corpus, DataError, Dialogue
from rdfkern.models.sources import RawDialogue, Utterance


def dialogue(name, length, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, length)
    labels[0] = UNLABELLED
    return Dialogue(
        name,
        tuple(rng.choice(["Ann", "Bó"], length)),
        labels,
        {
            "text": rng.standard_normal((length, 5)).astype(np.float32),
            "zeta": rng.standard_normal((length, 1)).astype(np.float32),
            "audio": rng.standard_normal((length, 2)).astype(np.float32),
        },
    )


@pytest.fixture
def corpus():
    return Corpus(
        "tiny",
        ("yes", "no", "può"),
        {
            "train": (dialogue("a", 3, 0), dialogue("b", 1, 1)),
            "validation": (dialogue("a", 2, 2),),
            "test": (),
        },
        {"text": "drawn", "zeta": "also drawn", "audio": "drawn"},
    )


def same(left, right):
    assert (left.name, left.labels, left.dims) == (right.name, right.labels, right.dims)
    assert list(left.dims) == list(right.dims)
    assert left.provenance == right.provenance
    for split in ("train", "validation", "test"):
        assert len(left.splits[split]) == len(right.splits[split])
        for one, other in zip(left.splits[split], right.splits[split], strict=True):
            assert (one.name, one.speakers) == (other.name, other.speakers)
            np.testing.assert_array_equal(one.labels, other.labels)
            for name in left.dims:
                np.testing.assert_array_equal(one.features[name], other.features[name])
                assert one.features[name].dtype == np.float32


def test_round_trip(tmp_path, corpus):
    raw = RawDialogue(
        "b", "train", (Utterance(corpus.splits["train"][1].speakers[0], "é!", None, 1.0, 2.5),)
    )
    write_corpus(tmp_path / "deep" / "c", corpus, raw=[raw])
    same(read_corpus(tmp_path / "deep" / "c"), corpus)
    lines = (tmp_path / "deep" / "c" / "dialogues.jsonl").read_text("utf-8").splitlines()
    stored = json.loads(lines[1])["utterances"][0]
    assert (stored["text"], stored["start"], stored["end"]) == ("é!", 1.0, 2.5)
    assert stored["label"] is None
    assert os.listdir(tmp_path / "deep") == ["c"]


def test_half_precision_and_any_modality(tmp_path, corpus):
    write_corpus(tmp_path / "c", corpus)
    (tmp_path / "c" / "zeta.safetensors").unlink()
    header = json.loads((tmp_path / "c" / "corpus.json").read_text())
    del header["provenance"]
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(header))
    save_file({"features": torch.ones(6, 4, dtype=torch.bfloat16)}, tmp_path / "c/eeg.safetensors")
    read = read_corpus(tmp_path / "c")
    assert read.dims == {"text": 5, "audio": 2, "eeg": 4}
    assert list(read.dims)[0] == "text"
    assert read.provenance["eeg"] == "not stated"


def test_existing_target(tmp_path, corpus):
    write_corpus(tmp_path / "c", corpus)
    with pytest.raises(DataError, match="a corpus is there already"):
        write_corpus(tmp_path / "c", corpus)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is no corpus"):
        write_corpus(tmp_path / "mine", corpus, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is no folder"):
        write_corpus(tmp_path / "file", corpus, overwrite=True)
    (tmp_path / "empty").mkdir()
    write_corpus(tmp_path / "empty", corpus)
    smaller = corpus.select(["text"])
    write_corpus(tmp_path / "c", smaller, overwrite=True)
    same(read_corpus(tmp_path / "c"), Corpus(**vars(smaller) | {"provenance": {"text": "drawn"}}))
    assert sorted(os.listdir(tmp_path)) == ["c", "empty", "file", "mine"]


def test_full_disk(tmp_path, corpus):
    """A real write error half-way (a file size limit): nothing remains, the old corpus stays."""
    write_corpus(tmp_path / "c", corpus)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))
    try:
        with pytest.raises(OSError, match=r"corpus not written, nothing half written remains.*/c'"):
            write_corpus(tmp_path / "c", corpus, overwrite=True)
        with pytest.raises(OSError, match="corpus not written"):
            write_corpus(tmp_path / "new", corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["c"]
    same(read_corpus(tmp_path / "c"), corpus)


def test_failed_swap_restores(tmp_path, corpus, monkeypatch):
    write_corpus(tmp_path / "c", corpus)
    rename = os.rename

    def fail_second(source, target):
        if str(target) == str(tmp_path / "c") and "corpus.json" in os.listdir(source):
            monkeypatch.setattr(os, "rename", rename)
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="No space left"):
        write_corpus(tmp_path / "c", corpus.select(["text"]), overwrite=True)
    same(read_corpus(tmp_path / "c"), corpus)
    assert os.listdir(tmp_path) == ["c"]


def test_unusable_corpora(tmp_path, corpus):
    no_text = Corpus("x", corpus.labels, corpus.splits)
    for item in [d for split in corpus.splits.values() for d in split]:
        item.features["../evil"] = item.features["audio"]
    with pytest.raises(DataError, match=r"modality '\.\./evil'"):
        write_corpus(tmp_path / "c", no_text)
    for item in [d for split in corpus.splits.values() for d in split]:
        del item.features["text"]
    with pytest.raises(DataError, match="has no modality 'text'"):
        write_corpus(tmp_path / "c", no_text)
    assert os.listdir(tmp_path) == []


def change_header(**changes):
    def change(folder):
        path = folder / "corpus.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_line(function, row=0):
    def change(folder):
        path = folder / "dialogues.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        function(records[row])
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return change


def change_tensor(function, name="audio"):
    def change(folder):
        path = folder / f"{name}.safetensors"
        tensor = load_file(path)["features"].clone()
        changed = function(tensor)
        save_file(changed if isinstance(changed, dict) else {"features": changed}, path)

    return change


def poke(value, row):
    def change(tensor):
        tensor[row, 1] = value
        return tensor

    return change


def cut(folder):
    path = folder / "audio.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "corpus.json").unlink(), r"corpus\.json: missing"),
        (lambda f: (f / "corpus.json").write_text("{"), r"corpus\.json: not valid JSON"),
        (lambda f: (f / "corpus.json").write_text("[]"), r"corpus\.json: expected an object"),
        (change_header(format="other"), r"corpus\.json: expected an object with"),
        (change_header(version=2), r"corpus\.json: version is 2, expected 1"),
        (change_header(name=""), r"corpus\.json: name is ''"),
        (change_header(labels=["a", "a"]), r"corpus\.json: labels are"),
        (change_header(labels=[]), r"corpus\.json: labels are"),
        (change_header(labels=["yes"]), r"dialogues\.jsonl, line 1, utterance \d: label is '\w+'"),
        (change_header(provenance=["x"]), r"corpus\.json: provenance is"),
        (change_header(provenance={"smell": "x"}), r"smell\.safetensors: missing"),
        (lambda f: (f / "dialogues.jsonl").unlink(), r"dialogues\.jsonl: cannot be read"),
        (lambda f: (f / "text.safetensors").unlink(), r"text\.safetensors: missing"),
        (change_line(lambda d: d["utterances"].clear(), 1), r"dialogues\.jsonl, line 2: dialogue"),
        (
            change_line(lambda d: d["utterances"].pop()),
            r"safetensors: shape \(6, \d\), expected \(5",
        ),
        (change_tensor(lambda t: t[:-1]), r"audio\.safetensors: shape \(5, 2\), expected \(6, dim"),
        (change_tensor(lambda t: t[:, 0].clone()), r"audio\.safetensors: shape \(6,\)"),
        (change_tensor(lambda t: t[:, :0].clone()), r"audio\.safetensors: shape \(6, 0\)"),
        (change_tensor(lambda t: t.long()), r"audio\.safetensors: element type torch\.int64"),
        (change_tensor(lambda t: {"x": t}), r"audio\.safetensors: tensors \['x'\]"),
        (
            change_tensor(poke(float("nan"), 4)),
            r"audio\.safetensors, row 4 \(dialogue 'a', utterance 0\): nan in column 1",
        ),
        (
            change_tensor(poke(float("-inf"), 2)),
            r"audio\.safetensors, row 2 \(dialogue 'a', utterance 2\): -inf in column 1",
        ),
        (change_tensor(lambda t: t.double() * 1e300), r"audio\.safetensors, row 0 .*inf"),
        (cut, r"audio\.safetensors: damaged safetensors file"),
    ],
)
def test_damage(tmp_path, corpus, damage, message):
    write_corpus(tmp_path / "c", corpus)
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)
