"""The generator: seeded, of the sizes asked for, and with dynamics that its settings control."""

from dataclasses import replace

import numpy as np
import pytest

from rdfkern.models.synthetic import EMOTIONS, SyntheticConfig, generate

SMALL = SyntheticConfig(dialogues=(12, 3, 4), utterances=(20, 60))


def labels(corpus, split="train"):
    return [dialogue.labels for dialogue in corpus.splits[split]]


def test_same_seed_same_corpus_and_another_seed_another():
    first, again, other = (
        generate(SMALL),
        generate(SMALL),
        generate(replace(SMALL, seed=1)),
    )
    for one, two in zip(first.splits["test"], again.splits["test"], strict=True):
        assert one.speakers == two.speakers
        assert np.array_equal(one.labels, two.labels)
        assert all(np.array_equal(one.features[name], two.features[name]) for name in one.features)
    assert not np.array_equal(np.concatenate(labels(first)), np.concatenate(labels(other)))


def test_sizes_and_provenance():
    corpus = generate(replace(SMALL, audio_dim=5, speakers=(1, 3)))
    assert [len(corpus.splits[split]) for split in ("train", "validation", "test")] == [12, 3, 4]
    assert corpus.dims == {"text": 96, "audio": 5, "visual": 64}
    for dialogue in corpus.splits["train"]:
        assert 20 <= len(dialogue) <= 60
        assert 1 <= len(set(dialogue.speakers)) <= 3
        assert dialogue.labels.min() >= 0
        assert dialogue.labels.max() < len(EMOTIONS)
        for array in dialogue.features.values():
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
    assert all("generated" in sentence for sentence in corpus.provenance.values())


def persistence(corpus):
    """Share of utterances that repeat their speaker's previous emotion."""
    same = total = 0
    for dialogue in corpus.splits["train"]:
        last = {}
        for who, felt in zip(dialogue.speakers, dialogue.labels, strict=True):
            same += last.get(who) == felt
            total += who in last
            last[who] = felt
    return same / total


def test_inertia_keeps_speakers_in_their_mood():
    moody = generate(replace(SMALL, inertia=0.95, contagion=0.0, tone=0.0))
    fickle = generate(replace(SMALL, inertia=0.0, contagion=0.0, tone=0.0))
    assert persistence(moody) > 0.8
    assert persistence(fickle) < 0.5


def test_noise_settings_control_the_distance_to_the_clean_features():
    clean = replace(SMALL, audio_snr=300.0, background=-300.0, identity=-300.0, channel=-300.0)

    def noise(config):
        quiet, loud = generate(clean), generate(config)
        assert np.array_equal(np.concatenate(labels(quiet)), np.concatenate(labels(loud)))
        pairs = zip(quiet.splits["train"], loud.splits["train"], strict=True)
        rows = [one.features["audio"] - two.features["audio"] for one, two in pairs]
        return np.mean(np.concatenate(rows) ** 2)

    assert noise(replace(clean, audio_snr=10.0)) == pytest.approx(0.1, rel=0.1)
    assert noise(replace(clean, background=0.0)) == pytest.approx(1.0, rel=0.15)
    assert noise(replace(clean, identity=0.0)) == pytest.approx(1.0, rel=0.15)
    assert noise(replace(clean, channel=0.0)) == pytest.approx(1.0, rel=0.15)


def test_a_topic_sets_the_tone():
    """With nothing but tone, utterances with the same topic in their text share their emotion."""
    loud = replace(SMALL, inertia=0.0, contagion=0.0, tone=0.7, topic=60.0, text_snr=0.0)
    same = []
    for dialogue in generate(loud).splits["train"]:
        unit = dialogue.features["text"]
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        topic = np.triu(unit @ unit.T > 0.9, k=1)
        same.append(np.mean((dialogue.labels[:, None] == dialogue.labels)[topic]))
    assert np.mean(same) > 0.4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"utterances": (9, 3)}, "utterances must be"),
        ({"speakers": (0, 3)}, "speakers must be"),
        ({"cast": 2}, "cast must be at least"),
        ({"inertia": 1.5}, "inertia must be in"),
        ({"inertia": 0.8, "contagion": 0.8}, r"inertia \+ contagion \+ tone"),
        ({"dialogues": (0, 1, 1)}, "dialogues must be at least 1"),
        ({"text_dim": 0}, "text_dim must be at least 1"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
