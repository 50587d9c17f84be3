"""Train variants of the network over seeds and tabulate them: `python -m rdfkern.models.study`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Suppress

from .checkpoint import read_json, write_atomically, write_json
from .cli import run_command
from .config import TrainConfig
from .data import TEXT, Corpus
from .processes import choose_device
from .report import versions
from .runs import REPORT, load_data, load_model
from .sweep import RATIOS, noise_sweep, sweep_table, write_sweep
from .tables import markdown_table, percent
from .train import run_training

PROGRAM = "python -m rdfkern.models.study"
FULL = "full"
SWEPT = (FULL, "no-differential")
Variant = Literal[
    "full",
    "no-differential",
    "no-denoising",
    "no-relations",
    "no-diffusion",
    "text-only",
    "linear",
]


@dataclass(frozen=True)
class StudyConfig(TrainConfig):
    """Train each variant with each seed, and compare the weighted F1 on the test split.

    Attributes:
        seed: comes from `seeds`.
        out: folder of the study, with one run per variant and seed; default runs/study-NAME.
        variants: `full`, the same without one part, text alone, or the linear model on the same
            features. `no-differential` has plain attention in the place of differential,
            `no-denoising` no such layers at all.
        seeds: of the training; the data stay the same.
        sweep: also sweep the noise for `full` and `no-differential`.
        draws: noise draws per ratio and seed in the sweep.
    """

    seed: Suppress[int] = 0
    variants: tuple[Variant, ...] = (
        FULL,
        "no-differential",
        "no-denoising",
        "no-relations",
        "no-diffusion",
        "text-only",
        "linear",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: bool = False
    draws: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct and at least one, got {list(values)}")
        if FULL not in self.variants:
            raise ValueError(f"variants must contain {FULL!r}, which the others are compared with")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least 0, got {list(self.seeds)}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.sweep and not set(SWEPT) <= set(self.variants):
            raise ValueError(f"sweep compares {SWEPT} and needs both in variants")

    @property
    def study_folder(self) -> Path:
        """Folder of the study, `out` or its default."""
        if self.out is not None:
            return self.out
        return self.folder.with_name(f"study-{self.folder.name}")

    def run(self, variant: str, seed: int) -> TrainConfig:
        """Settings of one run; only those of `linear` don't differ from `full`."""
        shared = {part.name: getattr(self, part.name) for part in fields(TrainConfig)}
        shared |= {"seed": seed, "out": self.study_folder / f"{variant}-seed{seed}"}
        parts = {
            "no-differential": {"denoise": "plain"},
            "no-denoising": {"denoise": "none"},
            "no-relations": {"relations": "off"},
            "no-diffusion": {"fusion": "gate"},
        }
        shared["network"] = replace(self.network, **parts.get(variant, {}))
        if variant == "text-only":
            shared["modalities"] = (TEXT,)
        return TrainConfig(**shared)


def run_study(config: StudyConfig) -> dict[str, Any]:
    """Train what is not trained yet, and write study.json and study.md.

    Returns:
        `variants`: variant to `scores` (test weighted F1 by seed, in [0, 1]), `mean`, `min`,
        `max`, `deviation` and `differences` to the full network with the same seed.

    Raises:
        ValueError: settings, data or the folder do not fit, or torchrun started the study.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study runs in one process; use torchrun with rdfkern.models.train")
    corpus = load_data(config)
    scores: dict[str, dict[int, float]] = {variant: {} for variant in config.variants}
    for seed in config.seeds:
        for variant in config.variants:
            if variant == "linear":
                continue
            print(f"\n{variant}, seed {seed}", flush=True)
            results = run_training(config.run(variant, seed), corpus)["results"]
            scores[variant][seed] = results["network"]["weighted_f1"]
    if "linear" in config.variants:
        # It has no seed: its training is convex, and its report stands beside the full network.
        found = read_json(config.run(FULL, config.seeds[0]).folder / REPORT)["results"]["linear"]
        scores["linear"] = {seed: found["weighted_f1"] for seed in config.seeds}
    study: dict[str, Any] = {
        "config": config.run(FULL, config.seeds[0]).identity(),
        "seeds": list(config.seeds),
        "versions": versions(),
        "corpus": corpus.name,
        "provenance": dict(corpus.provenance),
        "variants": {name: _summary(found, scores[FULL]) for name, found in scores.items()},
    }
    text = [format_study(study)]
    if config.sweep:
        curves = _sweep(config, corpus)
        write_sweep(config.study_folder, curves)
        study["sweep"] = {
            name: {f"{ratio:g}": values for ratio, values in curve.items()}
            for name, curve in curves.items()
        }
        title = (
            f"Test weighted F1 (%) under noise in all modalities but text: mean ± deviation over "
            f"seeds, each the mean of {config.draws} noise draws."
        )
        text += [title, sweep_table(curves)]
    report = "\n\n".join(text)
    write_atomically(config.study_folder / "study.md", f"{report}\n".encode())
    write_json(config.study_folder / "study.json", study)
    print(f"\n{report}\n\nstudy: {config.study_folder}")
    return study


def format_study(study: Mapping[str, Any]) -> str:
    """The study as Markdown, in per cent and points."""
    rows = []
    for name, found in study["variants"].items():
        difference = found["differences"]
        if name == FULL:
            paired = ["", ""]
        else:
            mean = 100 * float(np.mean(difference))
            paired = [
                f"{mean:+.1f}",
                f"{100 * min(difference):+.1f} to {100 * max(difference):+.1f}",
            ]
        rows.append(
            [name, percent(found["mean"]), percent(found["deviation"])]
            + [percent(found["min"]), percent(found["max"]), *paired]
        )
    header = ["variant", "weighted F1", "deviation", "min", "max", "against full", "range"]
    lines = [
        f"{study['corpus']}, test split, seeds {', '.join(map(str, study['seeds']))}; "
        "`against full` is the mean difference in points to the full network of the same seed.",
        "\n".join(f"- {name}: {origin}" for name, origin in study["provenance"].items()),
        markdown_table(header, rows),
    ]
    return "\n\n".join(line for line in lines if line)


def _summary(scores: Mapping[int, float], full: Mapping[int, float]) -> dict[str, Any]:
    values = list(scores.values())
    return {
        "scores": {str(seed): value for seed, value in scores.items()},
        "mean": float(np.mean(values)),
        "min": min(values),
        "max": max(values),
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "differences": [value - full[seed] for seed, value in scores.items()],
    }


def _sweep(config: StudyConfig, corpus: Corpus) -> dict[str, dict[float, list[float]]]:
    """Variant to ratio to one score per seed, the mean over the noise draws."""
    curves: dict[str, dict[float, list[float]]] = {}
    for variant in SWEPT:
        curves[variant] = {ratio: [] for ratio in RATIOS}
        for seed in config.seeds:
            model = load_model(config.run(variant, seed).folder)
            curve = noise_sweep(
                model,
                corpus,
                "test",
                RATIOS,
                draws=config.draws,
                device=choose_device(config.device),
                batch_utterances=config.batch_utterances,
            )
            for ratio, values in curve.items():
                curves[variant][ratio].append(float(np.mean(values)))
    return curves


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the study; returns the exit code."""
    return run_command(StudyConfig, run_study, arguments, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
