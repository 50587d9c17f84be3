import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from rdfkern.models.data import DataError
from rdfkern.models.metrics import bootstrap_interval, scores, weighted_f1

PAIRS = st.lists(
    st.tuples(st.integers(-1, 4), st.integers(0, 4)).filter(lambda pair: pair != (-1, -1)),
    min_size=1,
    max_size=30,
).filter(lambda pairs: any(label >= 0 for label, _ in pairs))


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_weighted_f1_is_sklearns_on_labelled_utterances(pairs):
    labels, predictions = np.array(pairs).T
    known = labels >= 0
    truth = f1_score(labels[known], predictions[known], average="weighted", zero_division=0)
    assert weighted_f1(labels, predictions) == pytest.approx(truth)
    table = scores(labels, predictions, list("abcde"))
    assert table["weighted_f1"] == pytest.approx(truth)
    assert table["utterances"] == known.sum() == np.sum(table["confusion"])
    assert table["accuracy"] == pytest.approx((labels == predictions)[known].mean())


def test_scores_by_hand():
    table = scores(np.array([0, 0, 1, 2, -1]), np.array([0, 1, 1, 1, 0]), ["a", "b", "c", "d"])
    assert table["classes"]["a"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "support": 2,
    }
    assert table["classes"]["b"]["precision"] == pytest.approx(1 / 3)
    assert table["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)  # d never occurs
    assert table["weighted_f1"] == pytest.approx((2 * 2 / 3 + 1 / 2) / 4)
    assert table["confusion"][0] == [1, 1, 0, 0]


def test_unlabelled_split_cannot_be_scored():
    nothing = np.array([-1, -1])
    for score in (
        lambda: weighted_f1(nothing, np.zeros(2, int)),
        lambda: scores(nothing, np.zeros(2, int), ["a"]),
        lambda: bootstrap_interval([nothing], [np.zeros(2, int)]),
    ):
        with pytest.raises(DataError, match="no utterance of the split has a label"):
            score()


def test_bootstrap_equals_a_loop_over_resampled_dialogues():
    generator = np.random.default_rng(0)
    labels = [generator.integers(-1, 3, n) for n in (4, 7, 2, 9, 5)]
    guesses = [generator.integers(0, 3, len(part)) for part in labels]
    found = bootstrap_interval(labels, guesses, draws=300, seed=5)
    counts = np.random.default_rng(5).multinomial(5, np.full(5, 0.2), size=300)
    values = [
        weighted_f1(
            np.concatenate([np.tile(part, n) for part, n in zip(labels, row, strict=True)]),
            np.concatenate([np.tile(part, n) for part, n in zip(guesses, row, strict=True)]),
        )
        for row in counts
    ]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert found["unit"] == "dialogues"
    assert found == bootstrap_interval(labels, guesses, draws=300, seed=5)
    assert found != bootstrap_interval(labels, guesses, draws=300, seed=6)


def test_bootstrap_of_a_single_dialogue_resamples_utterances():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 200)
    guesses = np.where(generator.random(200) < 0.7, labels, 0)
    found = bootstrap_interval([labels, np.array([-1])], [guesses, np.array([0])])
    assert found["unit"] == "utterances"
    assert found["low"] < weighted_f1(labels, guesses) < found["high"]
    assert found["high"] - found["low"] > 0.05
