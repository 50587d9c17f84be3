"""MELD and EmoryNLP CSV files, JSON-lines meetings: real ones, tiny ones, damaged ones."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from rdfkern.models.data import DataError
from rdfkern.models.jsonlines import read_mrda
from rdfkern.models.sources import (
    MELD_FILES,
    missing_times,
    read_emorynlp,
    read_meld,
    repair_text,
)

MELD_HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime"
)
GOOD = [
    '1,"Hi, you.",Ann,joy,positive,0,0,1,1,"00:00:01,500","00:00:02,25"',
    '2,Hm.,Bo,neutral,neutral,0,1,1,1,"0:00:02,000","00:00:03,000"',
]


def write_meld(folder, lines, split="validation", header=MELD_HEADER):
    """Three good files, one of them with these lines instead."""
    for name, file in MELD_FILES.items():
        content = [header, *lines] if name == split else [MELD_HEADER, *GOOD]
        data = [line if isinstance(line, bytes) else line.encode() for line in content]
        (folder / file).write_bytes(b"\r\n".join(data) + b"\r\n")
    return folder


def split_counts(corpus):
    dialogues = Counter(dialogue.split for dialogue in corpus.dialogues)
    utterances = Counter()
    for dialogue in corpus.dialogues:
        utterances[dialogue.split] += len(dialogue.utterances)
    return dict(dialogues), dict(utterances)


def test_meld_real(data_folder):
    corpus = read_meld(data_folder / "meld")
    dialogues, utterances = split_counts(corpus)
    assert dialogues == {"train": 1038, "validation": 114, "test": 280}
    assert utterances == {"train": 9989, "validation": 1109, "test": 2610}
    assert max(len(dialogue.utterances) for dialogue in corpus.dialogues) == 33
    everyone = {u.speaker for dialogue in corpus.dialogues for u in dialogue.utterances}
    assert len(everyone) == 304
    first = corpus.dialogues[0].utterances[0]
    assert (first.speaker, first.label) == ("Chandler", "neutral")
    assert (first.start, first.end) == (976.059, 981.731)
    assert corpus.odd_times == missing_times(corpus) == 1


def test_emorynlp_real(data_folder):
    corpus = read_emorynlp(data_folder / "emorynlp")
    dialogues, utterances = split_counts(corpus)
    assert utterances == {"train": 7551, "validation": 954, "test": 984}
    assert sum(dialogues.values()) == 827
    assert missing_times(corpus) == 0
    names = {u.speaker for dialogue in corpus.dialogues for u in dialogue.utterances}
    assert {"Ross Geller", "Rachel Green & Ross Geller"} <= names
    assert not any("[" in name or "," in name for name in names)
    joined = read_emorynlp(data_folder / "emorynlp", join_episodes=True)
    assert len(joined.dialogues) == 97
    assert split_counts(joined)[1] == utterances
    assert max(len(dialogue.utterances) for dialogue in joined.dialogues) == 184
    scenes = [d for d in corpus.dialogues if d.name.startswith("s01e02c")]
    scenes.sort(key=lambda dialogue: dialogue.name)
    episode = next(d for d in joined.dialogues if d.name == "s01e02")
    assert episode.utterances == tuple(u for scene in scenes for u in scene.utterances)


def test_mrda_real(data_folder):
    corpus = read_mrda(data_folder / "mrda" / "mrda_meetings.jsonl.gz")
    dialogues, utterances = split_counts(corpus)
    assert dialogues == {"train": 51, "validation": 12, "test": 12}
    assert sum(utterances.values()) == 108_202
    lengths = [len(dialogue.utterances) for dialogue in corpus.dialogues]
    assert (min(lengths), max(lengths)) == (233, 3391)
    assert corpus.labels == ("S", "B", "D", "F", "Q")


def test_utterances_are_sorted_and_dialogues_keep_their_order(tmp_path):
    lines = [
        "1,b,Ann,joy,positive,7,1,1,1,00:00:03,00:00:04",
        "2,c,Bo,fear,positive,2,0,1,1,00:00:01,00:00:02",
        "3,a,Bo,anger,positive,7,0,1,1,00:00:01,00:00:02",
    ]
    corpus = read_meld(write_meld(tmp_path, lines, "test"))
    seen = [d for d in corpus.dialogues if d.split == "test"]
    assert [d.name for d in seen] == ["dia7", "dia2"]
    assert [u.text for u in seen[0].utterances] == ["a", "b"]


def test_times_and_odd_times(tmp_path):
    lines = [
        '1,a,Ann,joy,positive,0,0,1,1,"01:02:03,250","01:02:03,75"',
        '2,b,Ann,joy,positive,0,1,1,1,"00:00:05,000","00:00:04,000"',
        '3,c,Ann,joy,positive,0,2,1,1,"00:00:05,000","00:00:05,000"',
    ]
    corpus = read_meld(write_meld(tmp_path, lines, "test"))
    first, second, third = corpus.dialogues[-1].utterances
    assert (first.start, first.end) == (3723.25, 3723.75)
    assert (second.start, second.end, third.start, third.end) == (None,) * 4
    assert corpus.odd_times == missing_times(corpus) == 2


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("I’m here".encode(), "I’m here"),
        (b"I\x92m here", "I’m here"),
        ("I\x92m here".encode(), "I’m here"),
        ("Iâ€™m here".encode(), "I’m here"),
        ("cafÃ©".encode(), "café"),
        ("São Ã".encode(), "São Ã"),
    ],
)
def test_encodings(tmp_path, raw, text):
    line = b"1," + raw + b",Ann,joy,positive,0,0,1,1,00:00:01,00:00:02"
    corpus = read_meld(write_meld(tmp_path, [line], "test"))
    assert corpus.dialogues[-1].utterances[0].text == text


def test_repair_leaves_good_text_alone():
    assert repair_text("“Ça va” – naïve…") == "“Ça va” – naïve…"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3,Hi,Ann,joy,positive,1,0,1", "line 4: 8 fields, expected 11"),
        ("3,Hi,Ann,joy,p,1,0,1,1,00:00:01,00:00:02,x", "line 4: 12 fields"),
        ("3,Hi,Ann,happy,p,1,0,1,1,00:00:01,00:00:02", "line 4: Emotion is 'happy', expected one"),
        (
            "3,Hi,Ann,joy,p,x,0,1,1,00:00:01,00:00:02",
            "line 4: Dialogue_ID is 'x', expected a whole",
        ),
        ("3,Hi,Ann,joy,p,1,,1,1,00:00:01,00:00:02", "line 4: Utterance_ID is ''"),
        ("3,Hi,Ann,joy,p,1,0,1,1,soon,00:00:02", "line 4: StartTime is 'soon', expected a time"),
        ("3,Hi,Ann,joy,p,1,0,1,1,00:00:01,00:61:02", "line 4: EndTime is '00:61:02'"),
        ("3,Hi, ,joy,p,1,0,1,1,00:00:01,00:00:02", "line 4: Speaker is"),
        ("3,Hi,['Ann',joy,p,1,0,1,1,00:00:01,00:00:02", "line 4: Speaker is"),
        ("3,Hi,[],joy,p,1,0,1,1,00:00:01,00:00:02", "line 4: Speaker is"),
        ("3,Hi,Ann,joy,p,0,1,1,1,00:00:01,00:00:02", "line 4: Utterance_ID is '1', expected one"),
        ('3,"Hi,Ann,joy,p,1,0,1,1,00:00:01,00:00:02', "line 4: not valid CSV"),
    ],
)
def test_damaged_csv_line(tmp_path, line, message):
    write_meld(tmp_path, [*GOOD, line])
    with pytest.raises(DataError) as caught:
        read_meld(tmp_path)
    assert str(tmp_path / "dev_sent_emo.csv") in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\r\n\r\n", MELD_HEADER.encode() + b"\n"])
def test_empty_csv(tmp_path, content):
    write_meld(tmp_path, GOOD)
    (tmp_path / "test_sent_emo.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"test_sent_emo\.csv: no rows"):
        read_meld(tmp_path)


def test_missing_column_and_file(tmp_path):
    write_meld(tmp_path, GOOD, header=MELD_HEADER.replace("EndTime", "Ende"))
    with pytest.raises(DataError, match=r"dev_sent_emo\.csv, line 1: columns EndTime are missing"):
        read_meld(tmp_path)
    (tmp_path / "dev_sent_emo.csv").unlink()
    with pytest.raises(DataError, match=r"dev_sent_emo\.csv: cannot be read: No such file"):
        read_meld(tmp_path)


def test_binary_garbage_as_csv(tmp_path):
    write_meld(tmp_path, GOOD)
    (tmp_path / "train_sent_emo.csv").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(DataError, match=r"train_sent_emo\.csv"):
        read_meld(tmp_path)


def meeting(**changes):
    utterance = {"speaker": "a", "text": "so", "da_basic": "S", "start": 1.5, "end": 2}
    utterance.update(changes.pop("utterance", {}))
    return {"dialogue": "m", "split": "train", "utterances": [utterance]} | changes


def write_lines(path, records):
    lines = [item if isinstance(item, str) else json.dumps(item) for item in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("given", "split"),
    [("train", "train"), ("val", "validation"), ("dev", "validation"), ("test", "test")],
)
def test_jsonl_splits_and_values(tmp_path, given, split):
    path = write_lines(tmp_path / "a.jsonl", [meeting(split=given), ""])
    (dialogue,) = read_mrda(path).dialogues
    assert dialogue.split == split
    (utterance,) = dialogue.utterances
    assert (utterance.label, utterance.start, utterance.end) == ("S", 1.5, 2)


def test_jsonl_own_label_field_and_missing_values(tmp_path):
    records = [
        meeting(utterance={"mood": "up"}),
        meeting(dialogue="n", utterance={"mood": None, "start": None}),
        meeting(dialogue="o", utterance={"mood": "down", "end": 1.5}),
    ]
    corpus = read_mrda(write_lines(tmp_path / "a.jsonl", records), "mood")
    assert corpus.labels == ("down", "up")
    assert [d.utterances[0].label for d in corpus.dialogues] == ["up", None, "down"]
    assert (corpus.odd_times, missing_times(corpus)) == (1, 2)
    with pytest.raises(DataError, match=r"a\.jsonl: no utterance has a label in field 'colour'"):
        read_mrda(tmp_path / "a.jsonl", "colour")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ("[1]", "line 2: list, expected an object"),
        (meeting(), "line 2: dialogue 'm' of split train appears twice"),
        (meeting(dialogue=""), "line 2: dialogue is ''"),
        (meeting(dialogue="n", split="holdout"), "line 2: split is 'holdout', expected one of"),
        (meeting(dialogue="n", utterances=[]), "line 2: dialogue 'n' has no list of utterances"),
        (meeting(dialogue="n", utterances={"a": 1}), "line 2: dialogue 'n' has no list"),
        (meeting(dialogue="n", utterances=["so"]), "line 2, utterance 0: str, expected an object"),
        (meeting(dialogue="n", utterance={"speaker": 3}), "utterance 0: speaker is 3"),
        (meeting(dialogue="n", utterance={"text": None}), "utterance 0: text is None"),
        (meeting(dialogue="n", utterance={"da_basic": "X"}), "utterance 0: da_basic is 'X'"),
        (meeting(dialogue="n", utterance={"da_basic": 3}), "utterance 0: da_basic is 3"),
        (meeting(dialogue="n", utterance={"start": "1"}), "utterance 0: start is '1'"),
        (meeting(dialogue="n", utterance={"end": float("nan")}), "utterance 0: end is nan"),
        (meeting(dialogue="n", utterance={"end": True}), "utterance 0: end is True"),
        (meeting(dialogue="n", utterance={"start": -1}), "utterance 0: start is -1"),
        (meeting(dialogue="n", utterance={"end": 10**400}), "utterance 0: end is 1000"),
    ],
)
def test_damaged_jsonl(tmp_path, record, message):
    path = write_lines(tmp_path / "a.jsonl", [meeting(), record])
    with pytest.raises(DataError) as caught:
        read_mrda(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_damaged_files(tmp_path):
    packed = gzip.compress(json.dumps(meeting()).encode() * 50)
    cases = {
        "cut.jsonl.gz": (packed[:-20], "damaged gzip"),
        "plain.jsonl.gz": (b"{}\n", "damaged gzip"),
        "flipped.jsonl.gz": (packed[:20] + b"\xff\xff\xff" + packed[23:], "damaged gzip"),
        "latin.jsonl": (b'{"dialogue": "\xe9"}\n', "line 1: not UTF-8"),
        "empty.jsonl": (b"\n", "no dialogues"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read_mrda(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_mrda(tmp_path / "absent.jsonl")
