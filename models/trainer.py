"""The training loop: steps, validation, and a state that can be saved and taken up at any step.

The order of the dialogues, the learning rate and the seed of dropout are pure functions of the
settings and the step, so the state needs no generator: a run that was killed and taken up again
ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import under_prefix, with_prefix
from .config import TrainConfig
from .data import UNLABELLED, Corpus, DataError, Dialogue, collate, speaker_vocabulary
from .loss import Objective, class_weights, combine_released
from .metrics import weighted_f1
from .network import build_network
from .predict import mixed_precision, predict
from .processes import Processes
from .progress import Progress
from .sampling import epoch_batches, shares
from .schedule import learning_rate_at, step_seed

BETAS = (0.9, 0.99)


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stands and what may help."""


def input_statistics(dialogues: Sequence[Dialogue]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and standard deviation of each feature over all utterances, by modality.

    Returns:
        Two mappings to (dim,) float32; a feature that never changes has deviation 1.
    """
    means, deviations = {}, {}
    for name in dialogues[0].features:
        values = np.concatenate([dialogue.features[name] for dialogue in dialogues])
        deviation = values.std(0, dtype=np.float64)
        deviation[deviation < 1e-8] = 1.0
        means[name] = torch.from_numpy(values.mean(0, dtype=np.float64).astype(np.float32))
        deviations[name] = torch.from_numpy(deviation.astype(np.float32))
    return means, deviations


@dataclass
class State:
    """Where a run stands.

    Attributes:
        step: optimiser steps taken.
        epoch: epochs finished, validation included.
        position: batches taken of the epoch under way.
        loss: sum of the losses of these batches.
        best_score: best validation weighted F1 so far, -1 before the first.
        best_epoch: its epoch, counted from 1; 0 before the first.
        history: one row of figures per finished epoch.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    loss: float = 0.0
    best_score: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Network, optimiser and state of one run.

    Args:
        config: of the run.
        corpus: with the modalities to use, and only them.
        processes: this process among those of the run.
        log: takes (tag, value, step) of every figure; called in the first process only.

    Raises:
        DataError: a split has no labelled utterance, or training fewer than two classes.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        processes: Processes,
        log: Callable[[str, float, int], None] = lambda tag, value, step: None,
    ) -> None:
        for split, needed in {"train": 2, "validation": 1, "test": 1}.items():
            found = np.concatenate([[], *(d.labels for d in corpus.splits.get(split, ()))])
            if len(np.unique(found[found != UNLABELLED])) < needed:
                raise DataError(
                    f"corpus {corpus.name} needs utterances of {needed} different label(s) in "
                    f"split {split}"
                )
        self.config = config
        self.corpus = corpus
        self.dims = corpus.dims
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self._processes = processes
        self._log = log
        self._dialogues = corpus.splits["train"]
        self._lengths = [len(dialogue) for dialogue in self._dialogues]
        self._total = sum(len(self.batches(epoch)) for epoch in range(config.epochs))
        self.vocabulary = speaker_vocabulary(self._dialogues, config.min_speaker_utterances)
        torch.manual_seed(config.seed)
        self.network = build_network(
            config.network, self.dims, len(corpus.labels), len(self.vocabulary)
        )
        if hasattr(self.network, "set_input_statistics"):
            self.network.set_input_statistics(*input_statistics(self._dialogues))
        self.network.to(processes.device)
        self.objective = self._objective()
        self._optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=config.learning_rate, betas=BETAS
        )
        self._parallel: nn.Module = self.network
        if processes.size > 1:
            self._parallel = DistributedDataParallel(self.network, broadcast_buffers=False)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or the patience has run out."""
        waited = self.state.epoch - self.state.best_epoch
        out_of_patience = 0 < self.config.patience <= waited
        return self.state.epoch >= self.config.epochs or out_of_patience

    def batches(self, epoch: int) -> list[list[int]]:
        """Global batches of an epoch, as indices of training dialogues."""
        config = self.config
        return epoch_batches(
            self._lengths, config.batch_utterances, config.batch_dialogues, config.seed, epoch
        )

    def run_epoch(self, save: Callable[[], None], shown: bool = True) -> None:
        """Take the steps of an epoch that are left, then validate and keep the best weights.

        Args:
            save: called after every `save_every` steps.
            shown: show progress.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        state = self.state
        batches = self.batches(state.epoch)
        sizes = [sum(self._lengths[index] for index in batch) for batch in batches]
        progress = Progress(
            f"epoch {state.epoch + 1}/{self.config.epochs}",
            sum(sizes),
            sum(sizes[: state.position]),
            shown and self._processes.first,
        )
        # Losses stay on the device: reading each one would wait for the GPU at every step.
        running = torch.tensor(state.loss, dtype=torch.float64, device=self._processes.device)
        self._parallel.train()
        for batch, size in zip(batches[state.position :], sizes[state.position :], strict=True):
            loss, norm = self.step(batch)
            running += loss.double()
            state.position += 1
            progress.advance(size)
            every = self.config.save_every
            saves = every > 0 and state.step % every == 0 and state.position < len(batches)
            if saves or state.position == len(batches):
                self._check_finite(loss + norm)
                state.loss = float(running)
            if progress.due:
                progress.show(float(loss))
            if saves:
                save()
            if self._processes.first and state.step % 10 == 0:
                self._log("train/batch_loss", float(loss), state.step)
                self._log("train/gradient_norm", float(norm), state.step)
        progress.close()
        self._finish_epoch(len(batches), progress.rate)

    def step(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One optimiser step on a global batch, of which this process takes its share.

        Args:
            batch: indices of training dialogues.

        Returns:
            The loss of the global batch and the norm of its gradient, scalars on the device.
        """
        config, processes = self.config, self._processes
        torch.manual_seed(step_seed(config.seed, self.state.step, processes.rank))
        rate = learning_rate_at(self.state.step, self._total, config.learning_rate, config.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        share = shares(batch, self._lengths, processes.size)[processes.rank]
        dialogues = [self._dialogues[index] for index in share]
        packed = collate(dialogues, self.dims, self.vocabulary).to(processes.device)
        with mixed_precision(processes.device, config.autocast):
            outputs = self._parallel(packed)
        count = sum(self.objective.count(self._dialogues[index].labels) for index in batch)
        sums = self.objective.sums(outputs, packed.labels)
        surrogate, loss = self.objective.shared(sums, count, processes.add_up)
        self._optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel divides the sum of the gradients by the number of processes.
        (surrogate * processes.size).backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm or math.inf)
        self._optimizer.step()
        self.state.step += 1
        return loss, norm

    def validate(self) -> float:
        """Weighted F1 on the validation split, the same number in every process."""
        processes = self._processes
        dialogues = self.corpus.splits["validation"]
        mine = predict(
            self.network,
            dialogues[processes.rank :: processes.size],
            self.dims,
            self.vocabulary,
            device=processes.device,
            batch_utterances=self.config.batch_utterances,
            autocast=self.config.autocast,
        )
        predictions: list[np.ndarray] = [np.zeros(0, np.int64)] * len(dialogues)
        for rank, part in enumerate(processes.gather(mine)):
            predictions[rank :: processes.size] = part
        labels = np.concatenate([dialogue.labels for dialogue in dialogues])
        return weighted_f1(labels, np.concatenate(predictions))

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser state and best weights so far."""
        moments = {
            f"{index}/{name}": value
            for index, entry in self._optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        return (
            with_prefix("model", self.network.state_dict())
            | with_prefix("optimizer", moments)
            | with_prefix("best", self.best)
        )

    def state_json(self) -> dict[str, Any]:
        """Counters, scores and history, as JSON values."""
        return asdict(self.state)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go to where `state_tensors` and `state_json` were taken."""
        self.state = State(**state)
        self.network.load_state_dict(under_prefix("model", tensors))
        self.best = under_prefix("best", tensors)
        entries: dict[int, dict[str, Tensor]] = {}
        for path, value in under_prefix("optimizer", tensors).items():
            index, name = path.split("/")
            entries.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _finish_epoch(self, batches: int, rate: float) -> None:
        state = self.state
        score = self.validate()
        state.epoch += 1
        if score > state.best_score:
            state.best_score, state.best_epoch = score, state.epoch
            held = self.network.state_dict()
            self.best = {name: value.detach().clone() for name, value in held.items()}
        row = {
            "epoch": state.epoch,
            "step": state.step,
            "train_loss": state.loss / batches,
            "validation_weighted_f1": score,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "utterances_per_second": rate,
        }
        state.history.append(row)
        state.position, state.loss = 0, 0.0
        if self._processes.first:
            for name, value in row.items():
                self._log(f"epoch/{name}", value, state.step)

    def _check_finite(self, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.state.step} (epoch "
                f"{self.state.epoch + 1}); a lower learning_rate or clip_norm may help"
            )

    def _objective(self) -> Objective:
        weights = None
        if self.config.class_weights != "none":
            labels = np.concatenate([dialogue.labels for dialogue in self._dialogues])
            values = class_weights(labels, len(self.corpus.labels), self.config.class_weights)
            weights = torch.from_numpy(values.astype(np.float32))
        released = self.config.network.preset != "default"
        return Objective(
            self.config.auxiliary_weight, weights, combine_released if released else None
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        return [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": self.config.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
