"""The prepare command and `load_corpus`."""

from __future__ import annotations

import json
import os
import pickle
import resource

import numpy as np
import pytest

from rdfkern.models.corpus_format import read_corpus
from rdfkern.models.data import DataError
from rdfkern.models.prepare import detect_format, load_corpus, main
from rdfkern.models.sources import MELD_FILES


@pytest.fixture
def meetings(tmp_path):
    """A small JSON-lines file with two label fields."""
    rng = np.random.default_rng(0)
    lines = []
    for number, split in enumerate(["train"] * 4 + ["val", "test"]):
        utterances = [
            {
                "speaker": f"s{i % 3}",
                "text": " ".join(rng.choice(["so", "yeah", "right", "hm", "well"], 4)),
                "da_basic": "SBDFQ"[i % 5],
                "mood": "up" if i % 2 else "down",
                "start": 2.0 * i,
                "end": 2.0 * i + (0 if i == 1 else 2.5),
            }
            for i in range(6)
        ]
        lines.append(
            json.dumps({"dialogue": f"m{number}", "split": split} | {"utterances": utterances})
        )
    path = tmp_path / "source" / "talks.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(lines))
    return path


def test_command(tmp_path, meetings, capsys):
    assert main([str(meetings), str(tmp_path / "out"), "--dim", "5"]) == 0
    printed = capsys.readouterr().out
    corpus = read_corpus(tmp_path / "out")
    assert corpus.dims == {"text": 5, "timing": 6}
    assert corpus.labels == ("S", "B", "D", "F", "Q")
    assert [len(corpus.splits[s]) for s in ("train", "validation", "test")] == [4, 1, 1]
    rows = {
        cells[0]: cells[1:]
        for line in printed.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[1:]
    }
    assert rows["utterances"] == ["24", "6", "6"]
    assert rows["S"] == ["8", "2", "2"]
    assert "text, 5 columns: tf-idf" in printed
    assert "utterances without times: 6, 6 of them because" in printed
    record = json.loads((tmp_path / "out" / "dialogues.jsonl").read_text().splitlines()[0])
    assert record["utterances"][0]["end"] == 2.5
    assert "end" not in record["utterances"][1]


def test_label_field(tmp_path, meetings):
    assert main([str(meetings), str(tmp_path / "out"), "--label-field", "mood"]) == 0
    assert read_corpus(tmp_path / "out").labels == ("down", "up")


def test_existing_output(tmp_path, meetings, capsys):
    command = [str(meetings), str(tmp_path / "out")]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {tmp_path / 'out'}: a corpus is there already")
    assert printed.err.count("\n") == 1 and not printed.out
    assert main([*command, "--dim", "3", "--overwrite"]) == 0
    assert read_corpus(tmp_path / "out").dims["text"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dim", "0"], "dim is 0, expected at least 1"),
        (["--join-episodes"], "join_episodes is True: no effect for format mrda"),
        (["--format", "meld", "--label-field", "x"], "label_field is 'x': no effect"),
        (["--format", "meld"], "train_sent_emo.csv: cannot be read"),
        (["--text", "x", "--dim", "9"], "dim is 9: no effect for format mrda with text 'x'"),
    ],
)
def test_unusable_options(tmp_path, meetings, capsys, options, message):
    assert main([str(meetings), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


def test_damaged_source(tmp_path, meetings, capsys):
    meetings.write_text(meetings.read_text() + "\n{")
    assert main([str(meetings), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{meetings}, line 7: not valid JSON" in error and "Traceback" not in error
    assert os.listdir(tmp_path) == ["source"]


def test_full_disk(tmp_path, meetings, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        status = main([str(meetings), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "corpus not written, nothing half written remains" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["source"]


def test_detection(tmp_path, meetings):
    assert detect_format(meetings) == "mrda"
    for folder, file in (("a", "dev_sent_emo.csv"), ("b", "emorynlp_test_final.csv")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    assert detect_format(tmp_path / "a") == "meld"
    assert detect_format(tmp_path / "b") == "emorynlp"
    (tmp_path / "c.pkl").touch()
    assert detect_format(tmp_path / "c.pkl") == "community"
    with pytest.raises(DataError, match="not recognised"):
        detect_format(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        detect_format(tmp_path / "absent")


def test_load_corpus_and_its_cache(tmp_path, meetings):
    fresh = load_corpus(meetings, dim=4)
    cache = tmp_path / "cache"
    first = load_corpus(meetings, cache_dir=cache, dim=4)
    (entry,) = os.listdir(cache)
    stamp = (cache / entry / "corpus.json").stat().st_mtime_ns
    second = load_corpus(str(meetings), cache_dir=str(cache), dim=4)
    assert (cache / entry / "corpus.json").stat().st_mtime_ns == stamp
    for corpus in (first, second):
        for split in fresh.splits:
            for one, other in zip(fresh.splits[split], corpus.splits[split], strict=True):
                np.testing.assert_array_equal(one.features["text"], other.features["text"])
    load_corpus(meetings, cache_dir=cache, dim=3)
    assert len(os.listdir(cache)) == 2
    meetings.write_text(meetings.read_text() + "\n")
    load_corpus(meetings, cache_dir=cache, dim=4)
    assert len(os.listdir(cache)) == 3


def test_load_prepared(tmp_path, meetings, capsys):
    assert main([str(meetings), str(tmp_path / "out"), "--dim", "4"]) == 0
    assert load_corpus(tmp_path / "out").dims["text"] == 4
    with pytest.raises(DataError, match="is prepared already, dim=5 can have no effect"):
        load_corpus(tmp_path / "out", dim=5)
    assert main([str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    with pytest.raises(TypeError):
        load_corpus(meetings, colour="red")


def test_community_pickle(tmp_path):
    keys = [f"d{i}" for i in range(12)]
    table = {
        name: {key: np.ones((2, dim)) * i for i, key in enumerate(keys)}
        for name, dim in (("text", 3), ("audio", 2), ("visual", 1))
    }
    content = (
        {},
        {key: ["M", "F"] for key in keys},
        {key: [0, 5] for key in keys},
        table["text"],
        {},
        {},
        {},
        table["audio"],
        table["visual"],
        {},
        keys[:10],
        keys[10:],
    )
    path = tmp_path / "features.pkl"
    path.write_bytes(pickle.dumps(content))
    assert main([str(path), str(tmp_path / "out")]) == 0
    corpus = read_corpus(tmp_path / "out")
    assert corpus.dims == {"text": 3, "audio": 2, "visual": 1}
    assert corpus.labels == ("hap", "sad", "neu", "ang", "exc", "fru")
    assert corpus.splits["test"][0].features["audio"].tolist() == [[10, 10], [10, 10]]
    assert main([str(path), str(tmp_path / "other"), "--dim", "9"]) == 2


def test_real_meld(tmp_path, data_folder):
    """The first lines of the real files."""
    (tmp_path / "meld").mkdir()
    for file in MELD_FILES.values():
        lines = (data_folder / "meld" / file).read_bytes().splitlines(keepends=True)
        (tmp_path / "meld" / file).write_bytes(b"".join(lines[:201]))
    assert main([str(tmp_path / "meld"), str(tmp_path / "out"), "--dim", "16"]) == 0
    corpus = load_corpus(tmp_path / "out")
    assert corpus.dims == {"text": 16, "timing": 6}
    assert [sum(map(len, corpus.splits[split])) for split in corpus.splits] == [200] * 3
