"""Evaluate a trained network: `python -m rdfkern.models.evaluate RUN [--sweep]`."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from .cli import run_command
from .data import Corpus
from .predict import predict
from .processes import choose_device
from .report import build_report, format_report, write_report
from .runs import TrainedModel, load_data, load_model
from .sweep import RATIOS, noise_sweep, sweep_table, write_sweep
from .train import set_up_torch

PROGRAM = "python -m rdfkern.models.evaluate"


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a trained network, and optionally sweep the noise of its features.

    Attributes:
        run: folder of a finished training run.
        data: data to score; default those of the run.
        split: to score.
        sweep: also score under noise, over a range of signal-to-noise ratios.
        beside: another run to sweep for comparison, such as one with --network.denoise plain.
        snr: signal-to-noise ratios in dB; `inf` is no noise.
        noisy: modalities that get noise; default all but text.
        draws: noise draws per ratio.
        seed: of the noise.
        out: folder for the report; default a folder in the run, named after the split.
        batch_utterances: utterances of a batch.
        device: `auto` takes CUDA where there is a device.
        threads: threads of torch on the CPU; default torch's own choice.
    """

    run: Positional[Path]
    data: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    sweep: bool = False
    beside: Path | None = None
    snr: tuple[float, ...] = RATIOS
    noisy: tuple[str, ...] | None = None
    draws: int = 5
    seed: int = 0
    out: Path | None = None
    batch_utterances: int = 600
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"draws": 1, "seed": 0, "batch_utterances": 1, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.snr or any(math.isnan(ratio) or ratio == -math.inf for ratio in self.snr):
            raise ValueError(f"snr must be one or more ratios in dB or inf, got {self.snr}")
        if self.beside is not None and not self.sweep:
            raise ValueError("beside compares noise sweeps and needs --sweep")


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Report on a trained network, print it and write it.

    Returns:
        The report, as `report.build_report`.

    Raises:
        ValueError: the run or the data do not fit.
    """
    set_up_torch(config.threads)
    device = choose_device(config.device)
    model = load_model(config.run)
    source = model.config if config.data is None else replace(model.config, data=config.data)
    corpus = load_data(source)
    narrowed = model.check(corpus)
    predictions = predict(
        model.network.to(device),
        narrowed.splits.get(config.split, ()),
        model.dims,
        model.vocabulary,
        device=device,
        batch_utterances=config.batch_utterances,
        autocast=model.config.autocast,
    )
    about = {
        "config": model.config.identity(),
        "seed": model.config.seed,
        "command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
        "training": model.training,
    }
    weighting = model.config.class_weights
    report = build_report(narrowed, config.split, predictions, about, weighting)
    folder = config.run / f"evaluate-{config.split}" if config.out is None else config.out
    write_report(folder, report)
    print(format_report(report), flush=True)
    if config.sweep:
        curves = {_name(config.run, config): _sweep(config, model, corpus)}
        if config.beside is not None:
            beside = load_model(config.beside)
            curves[_name(config.beside, config)] = _sweep(config, beside, corpus)
        write_sweep(folder, curves)
        print(f"\nWeighted F1 (%) under noise, mean ± deviation of {config.draws} noise draws")
        print(f"\n{sweep_table(curves)}")
    print(f"\nreport: {folder}")
    return report


def _name(run: Path, config: EvaluateConfig) -> str:
    """Folder name of a run, or its path where both runs have the same."""
    other = config.beside if run == config.run else config.run
    return str(run) if other is not None and other.name == run.name else run.name


def _sweep(config: EvaluateConfig, model: TrainedModel, corpus: Corpus) -> dict[float, list[float]]:
    return noise_sweep(
        model,
        corpus,
        config.split,
        config.snr,
        modalities=config.noisy,
        draws=config.draws,
        seed=config.seed,
        device=choose_device(config.device),
        batch_utterances=config.batch_utterances,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the evaluation; returns the exit code."""
    return run_command(EvaluateConfig, run_evaluation, arguments, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
