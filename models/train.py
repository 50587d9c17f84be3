"""Train the network: `python -m rdfkern.models.train`, also under torchrun.

The model is picked on the validation split; the test split is read once, at the end.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, load_checkpoint, read_json, save_checkpoint
from .cli import run_command
from .config import TrainConfig
from .data import Corpus
from .predict import predict
from .processes import Processes
from .report import build_report, format_report, write_report
from .runs import CHECKPOINT, LOGS, REPORT, fingerprint, load_data, narrow, open_run, save_model
from .tables import percent
from .trainer import Trainer

PROGRAM = "python -m rdfkern.models.train"


def run_training(config: TrainConfig, corpus: Corpus | None = None) -> dict[str, Any]:
    """Train until the end, continuing the run that `config.out` holds, and report.

    Args:
        config: of the run.
        corpus: the data, where the caller has read them already.

    Returns:
        The report, as `report.build_report`; in processes other than the first, an empty one.

    Raises:
        ValueError: settings, data or the run's folder do not fit; a file cannot be written.
        TrainingError: the loss is not finite.
    """
    processes = Processes.start(config.device)
    try:
        set_up_torch(config.threads, config.deterministic)
        processes.agree(lambda: open_run(config))
        finished = processes.agree(lambda: (config.folder / REPORT).exists())
        if not finished:
            corpus = narrow(_shared_load(config, processes) if corpus is None else corpus, config)
            trainer = _train(config, corpus, processes)
    finally:
        processes.close()
    if not processes.first:
        return {}
    if not finished:
        _report(config, corpus, trainer, processes)
    report = read_json(config.folder / REPORT)
    print(f"\n{format_report(report)}\n\nrun: {config.folder}", flush=True)
    return report


def set_up_torch(threads: int | None, deterministic: bool = False) -> None:
    """Set the number of threads, where given, and deterministic kernels, where asked for."""
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _shared_load(config: TrainConfig, processes: Processes) -> Corpus:
    """Load the data, the first process first: it may write the cache that the others read."""
    loaded: list[Corpus] = []
    processes.agree(lambda: loaded.append(load_data(config)))
    return loaded[0] if loaded else load_data(config)


def _train(config: TrainConfig, corpus: Corpus, processes: Processes) -> Trainer:
    """Run the epochs that are left; checkpoints and logs go to the run's folder."""
    path = config.folder / CHECKPOINT
    mark = fingerprint(corpus)
    resumes = processes.agree(path.exists)
    tensors, saved = load_checkpoint(path) if resumes else ({}, {})
    if resumes and saved["fingerprint"] != mark:
        raise CheckpointError(f"the data have changed since {path} was saved; train in a new out")
    writer = _writer(config.folder / LOGS, saved) if processes.first else None
    trainer = Trainer(config, corpus, processes, writer.add_scalar if writer else _no_log)
    if resumes:
        trainer.restore(tensors, saved["state"])
        if processes.first:
            state = trainer.state
            print(f"continuing {config.folder} in epoch {state.epoch + 1}, step {state.step}")
    elif processes.first:
        print(_describe(config, corpus, trainer, processes), flush=True)

    def save() -> None:
        if processes.first:
            state = {"fingerprint": mark, "state": trainer.state_json()}
            save_checkpoint(path, trainer.state_tensors(), state)

    try:
        while not trainer.finished:
            trainer.run_epoch(save)
            save()
            if processes.first:
                print(_epoch_line(trainer), flush=True)
    finally:
        if writer is not None:
            writer.close()
    return trainer


def _report(config: TrainConfig, corpus: Corpus, trainer: Trainer, processes: Processes) -> None:
    """Save the best weights and report their figures on the test split."""
    state = trainer.state
    training = {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "validation_weighted_f1": state.best_score,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "processes": processes.size,
        "device": str(processes.device),
        "threads": torch.get_num_threads(),
        "history": state.history,
    }
    trainer.network.load_state_dict(trainer.best)
    save_model(config.folder, trainer.best, config, corpus, trainer.vocabulary, training)
    predictions = predict(
        trainer.network,
        corpus.splits["test"],
        trainer.dims,
        trainer.vocabulary,
        device=processes.device,
        batch_utterances=config.batch_utterances,
        autocast=config.autocast,
    )
    about = {
        "config": config.identity(),
        "seed": config.seed,
        "command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
        "training": training,
    }
    report = build_report(corpus, "test", predictions, about, config.class_weights)
    write_report(config.folder, report)


def _writer(folder: Path, saved: dict[str, Any]) -> Any:
    # Imported here: TensorBoard takes a second to import, and only the first process needs it.
    from torch.utils.tensorboard import SummaryWriter

    step = saved["state"]["step"] + 1 if saved else None
    return SummaryWriter(str(folder), purge_step=step)


def _no_log(tag: str, value: float, step: int) -> None:
    """Figures of processes other than the first are the same, so they go nowhere."""


def _describe(config: TrainConfig, corpus: Corpus, trainer: Trainer, processes: Processes) -> str:
    sizes = ", ".join(
        f"{split} {len(found)} dialogues ({sum(map(len, found))} utterances)"
        for split, found in corpus.splits.items()
    )
    parameters = sum(p.numel() for p in trainer.network.parameters())
    return "\n".join(
        [
            f"{corpus.name}: {sizes}; {len(corpus.labels)} classes",
            *(
                f"- {name} ({dim}): {corpus.provenance.get(name, 'unknown')}"
                for name, dim in corpus.dims.items()
            ),
            f"{parameters:,} parameters on {processes.device}, "
            f"{processes.size} process(es); run: {config.folder}",
        ]
    )


def _epoch_line(trainer: Trainer) -> str:
    row = trainer.state.history[-1]
    best = " *" if trainer.state.best_epoch == row["epoch"] else ""
    return (
        f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  validation weighted F1 "
        f"{percent(row['validation_weighted_f1'])}{best}  "
        f"{row['utterances_per_second']:.0f} utterances/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the training; returns the exit code."""
    return run_command(TrainConfig, run_training, arguments, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
