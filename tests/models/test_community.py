"""Community pickles: the known layout, pickles with code in them, damaged ones."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict, defaultdict

import numpy as np
import pytest

from rdfkern.models.community import read_community
from rdfkern.models.data import DataError
from rdfkern.models.safe_pickle import load_restricted

DIMS = {"text": 6, "audio": 3, "visual": 2}
POSITIONS = {"speakers": 1, "labels": 2, "text": 3, "audio": 7, "visual": 8}


def layout(kind="iemocap", dialogues=20, seed=0):
    """A pickle's content as lists (IEMOCAP) or arrays (MELD), with the truth beside it."""
    rng = np.random.default_rng(seed)
    meld = kind == "meld"
    keys = [i if meld else f"Ses0{i % 5}_{i}" for i in range(dialogues)]
    length = {key: int(rng.integers(1, 6)) for key in keys}
    labels = {key: rng.integers(0, 7 if meld else 6, length[key]).tolist() for key in keys}
    features = {
        name: {
            key: rng.standard_normal((length[key], dim)).astype(np.float32 if meld else np.float64)
            for key in keys
        }
        for name, dim in DIMS.items()
    }
    who = {key: rng.integers(0, 9 if meld else 2, length[key]) for key in keys}
    speakers = {
        key: np.eye(9)[who[key]].tolist() if meld else ["FM"[i] for i in who[key]] for key in keys
    }
    stored = features
    if not meld:
        stored = {name: {k: list(v) for k, v in table.items()} for name, table in features.items()}
    unused = {key: ["unused"] for key in keys}
    content = [
        {key: [f"{key}_{i}" for i in range(length[key])] for key in keys},
        speakers,
        labels,
        stored["text"],
        unused,
        unused,
        unused,
        stored["audio"],
        stored["visual"],
        {key: ["words"] * length[key] for key in keys},
        keys[:-4] if meld else set(keys[:-4]),
        keys[-4:],
    ] + ([{"extra": 1}] if meld else [])
    return content, keys, labels, features, who


def save(path, content, protocol=4):
    path.write_bytes(pickle.dumps(tuple(content), protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["iemocap", "meld"])
def test_layouts(tmp_path, kind, protocol):
    content, keys, labels, features, who = layout(kind)
    corpus = read_community(save(tmp_path / "a.pkl", content, protocol))
    assert corpus.dims == DIMS
    assert corpus.name == kind.upper()
    assert corpus.labels[:3] == (
        ("hap", "sad", "neu") if kind == "iemocap" else ("neutral", "surprise", "fear")
    )
    assert {name: len(found) for name, found in corpus.splits.items()} == {
        "train": 14,
        "validation": 2,
        "test": 4,
    }
    found = {d.name: d for split in corpus.splits.values() for d in split}
    assert set(found) == set(map(str, keys))
    assert [d.name for d in corpus.splits["test"]] == [str(key) for key in keys[-4:]]
    for key in keys:
        dialogue = found[str(key)]
        assert dialogue.labels.tolist() == labels[key]
        names = [f"speaker{i}" for i in who[key]] if kind == "meld" else ["FM"[i] for i in who[key]]
        assert dialogue.speakers == tuple(names)
        for name in DIMS:
            np.testing.assert_array_equal(
                dialogue.features[name], features[name][key].astype(np.float32)
            )
            assert dialogue.features[name].dtype == np.float32


def test_validation_is_fixed_and_has_the_canonical_size(tmp_path):
    content, keys, *_ = layout(dialogues=151)
    content[10:12] = [set(keys[:120]), keys[120:]]
    first = read_community(save(tmp_path / "a.pkl", content))
    content[10] = list(reversed(keys[:120]))
    second = read_community(save(tmp_path / "b.pkl", content))
    for split, size in (("train", 108), ("validation", 12), ("test", 31)):
        names = [d.name for d in first.splits[split]]
        assert len(names) == size
        assert names == [d.name for d in second.splits[split]]


def test_array_forms(tmp_path):
    """Big-endian, Fortran order, half precision, numpy scalars, ordered and default dicts."""
    content, keys, labels, features, _ = layout()
    key = keys[-1]
    content[11] = [key]
    content[3][key] = np.asfortranarray(features["text"][key]).astype(">f8")
    content[7][key] = features["audio"][key].astype(np.float16)
    content[2] = OrderedDict((k, [np.int64(x) for x in v]) for k, v in labels.items())
    content[8] = defaultdict(list, content[8])
    dialogue = read_community(save(tmp_path / "a.pkl", content)).splits["test"][0]
    np.testing.assert_array_equal(
        dialogue.features["text"], features["text"][key].astype(np.float32)
    )
    np.testing.assert_array_equal(
        dialogue.features["audio"], features["audio"][key].astype(np.float16).astype(np.float32)
    )
    assert dialogue.labels.tolist() == labels[key]


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch ran",), "system"),
        (eval, ("open('ran', 'w')",), "builtins.eval"),
        (exec, ("open('ran', 'w')",), "builtins.exec"),
        (getattr, ({}, "keys"), "builtins.getattr"),
        (__import__, ("os",), "builtins.__import__"),
        (np.load, ("ran",), "load"),
        (np.memmap, ("ran", "u1", "w+", 0, (1,)), "memmap"),
        (bytearray, (2**40,), "builtins.bytearray"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, function, arguments, name, protocol):
    monkeypatch.chdir(tmp_path)
    content, *_ = layout()
    content[9] = {"a": Evil(function, *arguments)}
    path = save(tmp_path / "a.pkl", content, protocol)
    with pytest.raises(DataError) as caught:
        read_community(path)
    assert "a.pkl: the pickle refers to" in str(caught.value)
    assert name in str(caught.value) or f"__builtin__.{name.split('.')[-1]}" in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pkl"]


@pytest.mark.parametrize(
    "raw",
    [
        b"cnumpy\nndarray\n}X\x08\x00\x00\x00functionNsb.",
        b"cbuiltins\nset\n(cbuiltins\nrange\n(I0\nI1000000000000\ntRtR.",
        b"cbuiltins\nrange\n(I0\nI1000000000000\ntR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tRX\x01\x00\x00\x00ab.",
        b"X\xff\xff\xff\xffabc",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc",
        b"(" * 1000,
        b"]" + b"]\x94h\x00a" * 3,
        b"]r\x00\x00\x00\x7f.",
    ],
)
def test_hostile_opcodes(tmp_path, raw):
    (tmp_path / "a.pkl").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.pkl: damaged pickle"):
        load_restricted(tmp_path / "a.pkl")


def test_every_truncation_is_an_error(tmp_path):
    content, *_ = layout(dialogues=6)
    whole = pickle.dumps(tuple(content), 4)
    path = tmp_path / "a.pkl"
    for size in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.pkl"):
            read_community(path)


def test_flipped_bytes_never_escape(tmp_path):
    """Random damage either reads or is a DataError, nothing else."""
    content, *_ = layout(dialogues=6)
    whole = pickle.dumps(tuple(content), 2)
    rng = np.random.default_rng(0)
    path = tmp_path / "a.pkl"
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_community(path)
        except DataError:
            refused += 1
    assert refused > 20


def set_features(modality, value):
    def change(content, key):
        content[POSITIONS[modality]][key] = value(content[POSITIONS[modality]][key])

    return change


def put(value):
    def change(rows):
        rows = np.array(rows, np.float64)
        rows[0, 1] = value
        return rows

    return change


def ragged(rows):
    return [*rows[:-1], rows[-1][:-1]] if len(rows) > 1 else [rows[0][:-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_features("labels", lambda v: [9] * len(v)), "utterance 0: label 9, expected 0 to 5"),
        (set_features("labels", lambda v: [0.5] * len(v)), "utterance 0: label 0.5"),
        (set_features("labels", lambda v: [-1] * len(v)), "utterance 0: label -1"),
        (set_features("labels", lambda v: []), "labels: found a list, expected numbers"),
        (set_features("labels", lambda v: ["hap"] * len(v)), "labels: found a str"),
        (set_features("labels", lambda v: 3), r"labels have shape \(\)"),
        (set_features("speakers", lambda v: [*v, "M"]), "speakers for"),
        (set_features("speakers", lambda v: [""] * len(v)), "utterance 0: speaker is empty"),
        (set_features("speakers", lambda v: [[1, 1]] * len(v)), "expected a one-hot row"),
        (set_features("speakers", lambda v: [[0.5, 0.5]] * len(v)), "expected a one-hot row"),
        (set_features("audio", lambda v: [*v, v[0]]), r"audio has shape \(\d, 3\), expected"),
        (set_features("audio", lambda v: np.ones((len(v), 4))), r"audio has shape \(\d, 4\)"),
        (set_features("audio", lambda v: np.ones((len(v), 0))), r"audio has shape \(\d, 0\)"),
        (set_features("visual", put(np.nan)), r"visual, utterance 0: nan at \[0, 1\]"),
        (set_features("visual", put(np.inf)), r"visual, utterance 0: inf at \[0, 1\]"),
        (set_features("visual", put(1e300)), r"visual, utterance 0: 1e\+300 at"),
        (set_features("text", ragged), "text"),
        (set_features("text", lambda v: np.array(v, object)), "element type 'O8?'"),
        (set_features("text", lambda v: np.array(v).astype(str)), "element type 'U"),
        (set_features("text", lambda v: np.array(v).astype(complex)), "element type 'c16'"),
        (lambda c, key: c[3].pop(key), "has no text"),
        (lambda c, key: c.__setitem__(3, [1]), r"element 3 \(text\) is a list"),
        (lambda c, key: c[10].add(key), "are in both training and test"),
        (lambda c, key: c.__setitem__(11, []), "element 11 is"),
        (lambda c, key: c.__setitem__(11, range(500)), "element 11 has 500 ids"),
        (lambda c, key: c.__setitem__(11, [1.5]), "element 11 must hold"),
        (lambda c, key: c.__setitem__(10, {"x"}), "one training dialogue"),
        (lambda c, key: c.__setitem__(11, ["x"]), "dialogue 'x': has no speakers"),
        (lambda c, key: c.pop(), "tuple of 11, expected a tuple of 12"),
    ],
)
def test_entries_that_do_not_fit(tmp_path, change, message):
    content, keys, *_ = layout()
    change(content, keys[-2])
    with pytest.raises(DataError, match=message) as caught:
        read_community(save(tmp_path / "a.pkl", content))
    assert str(tmp_path / "a.pkl") in str(caught.value)


def test_wrong_array_size(tmp_path):
    content, keys, *_ = layout("meld")
    raw = pickle.dumps(tuple(content), 4)
    shape = content[3][keys[-1]].shape
    assert shape[1] == 6
    needle = pickle.dumps(shape, 4)[2:-1]
    damaged = raw.replace(b"K\x06\x86\x94", b"K\x05\x86\x94")
    assert damaged != raw, needle
    (tmp_path / "a.pkl").write_bytes(damaged)
    with pytest.raises(DataError, match=r"needs \d+ bytes, the file has \d+"):
        read_community(tmp_path / "a.pkl")


def test_missing_file_and_other_content(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_community(tmp_path / "absent.pkl")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="holds a dict, expected a tuple"):
        read_community(tmp_path / "a.pkl")
