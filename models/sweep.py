"""How a trained network bears noise: weighted F1 against the signal-to-noise ratio."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .data import TEXT, Corpus, Dialogue
from .metrics import weighted_f1
from .predict import predict
from .runs import TrainedModel
from .tables import markdown_table, percent

RATIOS = (-10.0, -5.0, 0.0, 5.0, 10.0, 20.0, math.inf)


def with_noise(
    dialogues: Sequence[Dialogue], modalities: Sequence[str], ratio: float, seed: int, draw: int
) -> list[Dialogue]:
    """Dialogues with white Gaussian noise added to the features of some modalities.

    The power of a modality is the variance of its features over these dialogues, averaged over
    the columns: a constant offset carries nothing. The noise has the same power in every column.

    Args:
        dialogues: at least one.
        modalities: that get noise.
        ratio: signal-to-noise ratio in dB; infinity adds none.
        seed: of the noise.
        draw: index of the noise draw; draws of one seed are independent, and one draw is the same
            up to its scale at every ratio and for every network.
    """
    features = [dict(dialogue.features) for dialogue in dialogues]
    for name in modalities:
        generator = np.random.default_rng([seed, draw, zlib.crc32(name.encode())])
        everything = np.concatenate([found[name] for found in features])
        power = everything.var(0, dtype=np.float64).mean()
        scale = math.sqrt(power) * 10 ** (-ratio / 20)
        for found in features:
            noise = generator.standard_normal(found[name].shape)
            found[name] = (found[name] + scale * noise).astype(np.float32)
    return [
        replace(dialogue, features=found)
        for dialogue, found in zip(dialogues, features, strict=True)
    ]


def noise_sweep(
    model: TrainedModel,
    corpus: Corpus,
    split: str,
    ratios: Sequence[float],
    *,
    modalities: Sequence[str] | None = None,
    draws: int = 5,
    seed: int = 0,
    device: torch.device,
    batch_utterances: int,
) -> dict[float, list[float]]:
    """Weighted F1 under noise.

    Args:
        model: the trained network.
        corpus: the data.
        split: to score.
        ratios: signal-to-noise ratios in dB.
        modalities: that get noise; default all of the network's but text.
        draws: noise draws per ratio; infinity needs one.
        seed: of the noise.
        device: to predict on.
        batch_utterances: utterances of a batch.

    Returns:
        Ratio to the weighted F1 of each draw, in [0, 1].

    Raises:
        ValueError: a modality is not the network's, or none is left to get noise.
    """
    chosen = [name for name in model.dims if name != TEXT] if modalities is None else modalities
    unknown = [name for name in chosen if name not in model.dims]
    if unknown or not chosen:
        raise ValueError(
            f"noisy must name modalities of the network, {list(model.dims)}, got {list(chosen)}"
        )
    dialogues = model.check(corpus).splits[split]
    labels = np.concatenate([dialogue.labels for dialogue in dialogues])
    network = model.network.to(device)

    def score(ratio: float, draw: int) -> float:
        noisy = with_noise(dialogues, chosen, ratio, seed, draw)
        predictions = predict(
            network,
            noisy,
            model.dims,
            model.vocabulary,
            device=device,
            batch_utterances=batch_utterances,
            autocast=model.config.autocast,
        )
        return weighted_f1(labels, np.concatenate(predictions))

    return {
        ratio: [score(ratio, draw) for draw in range(1 if math.isinf(ratio) else draws)]
        for ratio in ratios
    }


def sweep_table(curves: Mapping[str, Mapping[float, Sequence[float]]]) -> str:
    """Markdown table of the mean weighted F1 in per cent, and the standard deviation.

    Args:
        curves: name of the network to ratio to the scores of its draws (or seeds).
    """
    ratios = list(next(iter(curves.values())))
    rows = [
        [_ratio_name(ratio), *(_mean_and_spread(curve[ratio]) for curve in curves.values())]
        for ratio in ratios
    ]
    return markdown_table(["SNR (dB)", *curves], rows)


def sweep_csv(curves: Mapping[str, Mapping[float, Sequence[float]]]) -> str:
    """The scores as CSV, one row per network, ratio and draw."""
    lines = ["network,snr_db,draw,weighted_f1"]
    for name, curve in curves.items():
        for ratio, values in curve.items():
            lines += [f"{name},{ratio:g},{draw},{value:.6f}" for draw, value in enumerate(values)]
    return "\n".join(lines) + "\n"


def draw_sweep(path: Path, curves: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Plot the curves as PNG; clean features are a dashed line."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        noisy = sorted(ratio for ratio in curve if not math.isinf(ratio))
        mean = [100 * np.mean(curve[ratio]) for ratio in noisy]
        spread = [100 * np.std(curve[ratio]) for ratio in noisy]
        axes.errorbar(noisy, mean, spread, label=name, color=f"C{index}", marker="o", capsize=3)
        if math.inf in curve:
            clean = 100 * float(np.mean(curve[math.inf]))
            axes.axhline(clean, color=f"C{index}", linestyle="--", linewidth=1)
    axes.set_xlabel("signal-to-noise ratio (dB)")
    axes.set_ylabel("weighted F1 (%)")
    axes.legend()
    figure.savefig(path)


def write_sweep(folder: Path, curves: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Write `sweep.md`, `sweep.csv` and `sweep.png`.

    Raises:
        OSError: a file could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.md").write_text(sweep_table(curves) + "\n")
    (folder / "sweep.csv").write_text(sweep_csv(curves))
    draw_sweep(folder / "sweep.png", curves)


def _ratio_name(ratio: float) -> str:
    return "no noise" if math.isinf(ratio) else f"{ratio:g}"


def _mean_and_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(float(np.mean(values)))} ± {percent(float(np.std(values, ddof=1)))}"
