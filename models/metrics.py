"""Scores of predictions: per-class table, weighted F1 and its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from .data import UNLABELLED, DataError


def weighted_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of each class weighted by its support, in [0, 1]; unlabelled utterances don't count.

    Args:
        labels: (N,) int, `UNLABELLED` where there is none.
        predictions: (N,) int.

    Raises:
        DataError: no utterance has a label.
    """
    labels, predictions = _labelled(labels, predictions)
    size = int(max(labels.max(), predictions.max())) + 1
    matrix = np.bincount(labels * size + predictions, minlength=size * size).reshape(size, size)
    return float(_weighted_f1_of(matrix[None])[0])


def scores(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Every figure of a report, as JSON values; shares are in [0, 1].

    Args:
        labels: (N,) int, index into `names`, `UNLABELLED` where there is none.
        predictions: (N,) int, index into `names`.
        names: of the C classes.

    Returns:
        `weighted_f1`, `macro_f1` (over the classes that occur in the labels), `accuracy`,
        `utterances`, `classes` (precision, recall, F1 and support by name) and
        `confusion` (C rows of true classes, C columns of predicted ones).

    Raises:
        DataError: no utterance has a label.
    """
    labels, predictions = _labelled(labels, predictions)
    classes = np.arange(len(names))
    table = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    precision, recall, f1, support = table
    return {
        "weighted_f1": float(np.average(f1, weights=support)),
        "macro_f1": float(f1[support > 0].mean()),
        "accuracy": float(accuracy_score(labels, predictions)),
        "utterances": len(labels),
        "classes": {
            name: {
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "support": int(support[index]),
            }
            for index, name in enumerate(names)
        },
        "confusion": confusion_matrix(labels, predictions, labels=classes).tolist(),
    }


def bootstrap_interval(
    labels: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """95 % percentile bootstrap interval of the weighted F1.

    Whole dialogues are resampled, since the utterances of one are not independent; with a single
    dialogue its utterances are.

    Args:
        labels: one (T,) int array per dialogue, `UNLABELLED` where there is none.
        predictions: the same shapes.
        draws: resamples.
        seed: of the resamples.

    Returns:
        `low`, `high` (in [0, 1]), `level`, `unit` (`dialogues` or `utterances`), `draws`, `seed`.

    Raises:
        DataError: no utterance has a label.
    """
    kept = [_keep(*pair) for pair in zip(labels, predictions, strict=True)]
    units = [pair for pair in kept if len(pair[0])]
    if not units:
        raise DataError("no utterance of the split has a label, so nothing can be scored")
    unit = "dialogues" if len(units) > 1 else "utterances"
    if unit == "utterances":
        found = units[0]
        units = [(found[0][i : i + 1], found[1][i : i + 1]) for i in range(len(found[0]))]
    size = 1 + max(max(part.max() for part in pair) for pair in units)
    matrices = np.zeros((len(units), size * size))
    for row, (truth, guess) in zip(matrices, units, strict=True):
        np.add.at(row, truth * size + guess, 1)
    share = np.full(len(units), 1 / len(units))
    counts = np.random.default_rng(seed).multinomial(len(units), share, size=draws)
    resampled = (counts.astype(np.float64) @ matrices).reshape(draws, size, size)
    low, high = np.percentile(_weighted_f1_of(resampled), [2.5, 97.5])
    return {
        "low": float(low),
        "high": float(high),
        "level": 0.95,
        "unit": unit,
        "draws": draws,
        "seed": seed,
    }


def _keep(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = labels != UNLABELLED
    return labels[keep], predictions[keep]


def _labelled(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, predictions = _keep(labels, predictions)
    if not len(labels):
        raise DataError("no utterance of the split has a label, so nothing can be scored")
    return labels, predictions


def _weighted_f1_of(confusion: np.ndarray) -> np.ndarray:
    """Weighted F1 of confusion matrices (M, C, C), rows true: 2 TP / (support + predicted)."""
    hits = np.diagonal(confusion, axis1=1, axis2=2).astype(np.float64)  # [M, C]
    support = confusion.sum(2)  # [M, C]
    total = support + confusion.sum(1)
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return (f1 * support).sum(1) / support.sum(1)
