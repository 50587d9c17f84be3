"""The report of a trained network: figures, baselines on the same features, provenance."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .checkpoint import write_json
from .data import UNLABELLED, Corpus, DataError
from .linear import LinearResult, linear_baseline
from .metrics import bootstrap_interval, scores
from .runs import fingerprint
from .tables import markdown_table, percent

PACKAGES = ("rdfkern", "numpy", "scikit-learn", "safetensors")
TITLES = {
    "network": "this network",
    "linear": "linear model, same features",
    "majority": "majority class",
}
_fitted: dict[tuple[int, str], LinearResult] = {}


def build_report(
    corpus: Corpus,
    split: str,
    predictions: Sequence[np.ndarray],
    about: Mapping[str, Any],
    weighting: str = "none",
) -> dict[str, Any]:
    """Score predictions beside the majority class and a linear model on the same features.

    Args:
        corpus: with the modalities that the network used, and only them.
        split: that the predictions are for.
        predictions: one (T,) int array per dialogue of the split.
        about: what else to record: `config`, `seed`, `command` and the like, as JSON values.
        weighting: of the classes in the linear model, that of the network's training.

    Returns:
        JSON values: `about`, `versions`, `corpus`, `split`, `dialogues`, `provenance`, and
        `results` with `network`, `linear` and `majority`, each as `metrics.scores` plus
        `interval` as `metrics.bootstrap_interval`.

    Raises:
        DataError: the split has no labelled utterance.
    """
    dialogues = corpus.splits.get(split, ())
    if not any((dialogue.labels != UNLABELLED).any() for dialogue in dialogues):
        raise DataError(f"corpus {corpus.name} has no labelled utterance in split {split}")
    labels = [dialogue.labels for dialogue in dialogues]
    cuts = np.cumsum([len(dialogue) for dialogue in dialogues])[:-1]
    linear = _linear(replace(corpus, splits={**corpus.splits, "test": dialogues}), weighting)
    train = np.concatenate([dialogue.labels for dialogue in corpus.splits["train"]])
    majority = int(np.bincount(train[train != UNLABELLED]).argmax())
    guesses = {
        "network": list(predictions),
        "linear": np.split(linear.predictions, cuts),
        "majority": [np.full(len(part), majority) for part in labels],
    }
    results = {
        name: {
            **scores(np.concatenate(labels), np.concatenate(guess), corpus.labels),
            "interval": bootstrap_interval(labels, guess),
        }
        for name, guess in guesses.items()
    }
    results["linear"]["C"] = linear.strength
    return {
        "corpus": corpus.name,
        "split": split,
        "dialogues": len(dialogues),
        "provenance": {name: corpus.provenance.get(name, "unknown") for name in corpus.dims},
        "results": results,
        "about": dict(about),
        "versions": versions(),
    }


def _linear(corpus: Corpus, weighting: str) -> LinearResult:
    """The linear baseline, fitted once per corpus: a study reports on the same one many times."""
    key = (fingerprint(corpus), weighting)
    if key not in _fitted:
        _fitted[key] = linear_baseline(corpus, weighting=weighting)
    return _fitted[key]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    # torch's own string also names the build, CPU or CUDA.
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def format_report(report: Mapping[str, Any]) -> str:
    """The report as Markdown that reads well in a terminal; shares in per cent."""
    results = report["results"]
    network = results["network"]
    interval = network["interval"]
    classes = [
        [name, *(percent(row[key]) for key in ("precision", "recall", "f1")), row["support"]]
        for name, row in network["classes"].items()
    ]
    summary = [
        [
            TITLES[name],
            percent(result["weighted_f1"]),
            f"{percent(result['interval']['low'])} to {percent(result['interval']['high'])}",
            percent(result["accuracy"]),
            percent(result["macro_f1"]),
        ]
        for name, result in results.items()
    ]
    lines = [
        f"{report['corpus']}, {report['split']} split: {network['utterances']} labelled "
        f"utterances in {report['dialogues']} dialogues",
        *(f"- {name}: {origin}" for name, origin in report["provenance"].items()),
        "",
        markdown_table(["class", "precision", "recall", "F1", "support"], classes),
        "",
        markdown_table(["", "weighted F1", "95 % interval", "accuracy", "macro F1"], summary),
        "",
        f"Intervals: bootstrap over {interval['unit']}, {interval['draws']} resamples, "
        f"seed {interval['seed']}.",
    ]
    training = report["about"].get("training")
    if training is not None:
        lines.append(
            f"Weights of epoch {training['best_epoch']} of {training['epochs']}, picked by the "
            f"validation weighted F1 ({percent(training['validation_weighted_f1'])})."
        )
    return "\n".join(lines)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.md`, `confusion.png` and, last, `report.json`.

    Raises:
        OSError: a file could not be written.
        CheckpointError: report.json could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    details = [
        f"- command: `{report['about'].get('command', '')}`",
        f"- seed: {report['about'].get('seed')}",
        *(f"- {name} {number}" for name, number in report["versions"].items()),
    ]
    text = "\n".join(
        ["# Report", "", format_report(report), "", "![confusion](confusion.png)", "", *details]
    )
    (folder / "report.md").write_text(text + "\n")
    network = report["results"]["network"]
    draw_confusion(folder / "confusion.png", network["confusion"], list(network["classes"]))
    write_json(folder / "report.json", report)


def draw_confusion(path: Path, confusion: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Confusion matrix as PNG: counts, coloured by the share of the true class."""
    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(4.0, 0.6 * len(names) + 2)
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 20:
        for row, column in np.ndindex(*counts.shape):
            dark = share[row, column] > 0.5
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    figure.savefig(path)
