"""A linear model on the same features, to compare the network with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .data import UNLABELLED, Corpus, DataError, Dialogue
from .loss import class_weights

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class LinearResult(NamedTuple):
    """What the linear model says.

    Attributes:
        predictions: (T,) int64, label index of every test utterance in the order of the corpus,
            unlabelled ones included.
        strength: inverse regularisation C that was picked.
        validation_f1: weighted F1 on the validation split with it, in [0, 1].
    """

    predictions: np.ndarray
    strength: float
    validation_f1: float


def linear_baseline(corpus: Corpus, seed: int = 0, weighting: str = "none") -> LinearResult:
    """Multinomial logistic regression on the standardised features of all modalities, side by side.

    Each utterance is judged by itself. Fitted on the training split; C is the one of `STRENGTHS`
    with the best weighted F1 on the validation split.

    Args:
        corpus: with the modalities to use.
        seed: of the solver.
        weighting: of the classes, a scheme of `loss.class_weights`.

    Raises:
        DataError: the training split has fewer than two labels, or a split that is needed is empty.
    """
    train, train_labels = _stack(corpus, corpus.splits["train"])
    validation, validation_labels = _stack(corpus, corpus.splits["validation"])
    test, _ = _stack(corpus, corpus.splits["test"])
    known = train_labels != UNLABELLED
    checked = validation_labels != UNLABELLED
    if len(np.unique(train_labels[known])) < 2 or not checked.any():
        raise DataError(
            f"corpus {corpus.name}: a linear model needs two labels in training and labelled "
            "validation utterances"
        )
    weights = class_weights(train_labels[known], len(corpus.labels), weighting)
    best: LinearResult | None = None
    for strength in STRENGTHS:
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(
                C=strength,
                max_iter=1000,
                random_state=seed,
                class_weight=dict(enumerate(weights)),
            ),
        ).fit(train[known], train_labels[known])
        guessed = model.predict(validation[checked])
        score = float(f1_score(validation_labels[checked], guessed, average="weighted"))
        if best is None or score > best.validation_f1:
            predictions = model.predict(test) if len(test) else np.zeros(0, np.int64)
            best = LinearResult(predictions, strength, score)
    return best


def _stack(corpus: Corpus, dialogues: tuple[Dialogue, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(T, all dims) float32 and (T,) int64."""
    width = sum(corpus.dims.values())
    rows = [
        np.concatenate([dialogue.features[name] for name in corpus.dims], axis=1)
        for dialogue in dialogues
    ]
    labels = [dialogue.labels for dialogue in dialogues]
    return (
        np.concatenate([np.zeros((0, width), np.float32), *rows]),
        np.concatenate([np.zeros(0, np.int64), *labels]),
    )
