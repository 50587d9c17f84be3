"""The training loss, in a form that adds up exactly over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import UNLABELLED
from .outputs import Outputs


@dataclass(frozen=True)
class Objective:
    """Cross entropy of the fused head plus that of the single-modality heads.

    A batch gives one sum per head and one count; sums and counts of several processes add up, and
    only then are they combined.

    Attributes:
        auxiliary_weight: weight of the mean over the modalities' cross entropies.
        class_weights: (C,) float32 or None; a class's share in every sum and in the count.
        combine: (1 + M,) mean cross entropies, fused head first, to the loss; None is
            fused + auxiliary_weight * mean of the others.
    """

    auxiliary_weight: float
    class_weights: Tensor | None = None
    combine: Callable[[Tensor], Tensor] | None = None

    def sums(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Sum of the (weighted) cross entropies of each head, fused first, (1 + M,) float32.

        Args:
            outputs: (T, C) logits per head.
            labels: (T,) int64; unlabelled utterances add nothing.
        """
        heads = [outputs.fused, *outputs.per_modality.values()]
        return torch.stack(
            [
                F.cross_entropy(
                    head if head.dtype == torch.float64 else head.float(),
                    labels,
                    None if self.class_weights is None else self.class_weights.to(head.device),
                    ignore_index=UNLABELLED,
                    reduction="sum",
                )
                for head in heads
            ]
        )

    def count(self, labels: np.ndarray) -> float:
        """Labelled utterances, or the sum of their class weights.

        Args:
            labels: (T,) int64.
        """
        found = labels[labels != UNLABELLED]
        if self.class_weights is None:
            return float(len(found))
        return float(self.class_weights.double().numpy()[found].sum())

    def loss(self, means: Tensor) -> Tensor:
        """The scalar loss of (1 + M,) mean cross entropies."""
        if self.combine is not None:
            return self.combine(means)
        if len(means) == 1:
            return means[0]
        return means[0] + self.auxiliary_weight * means[1:].mean()

    def shared(
        self, sums: Tensor, count: float, add_up: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What this process differentiates, and the loss of the whole batch.

        The gradients of the first, added over processes, are those of the second in one process,
        for any `combine`: it is linearised at the means of the whole batch.

        Args:
            sums: (1 + M,) of this process's share of the batch.
            count: of the whole batch; 0 gives zero gradients.
            add_up: adds a tensor over the processes, in place; None for a single process.
        """
        total = sums.detach().clone()
        if add_up is not None:
            add_up(total)
        total.requires_grad_()
        with torch.enable_grad():
            value = self.loss(total / count) if count > 0 else total.sum() * 0
            (slope,) = torch.autograd.grad(value, total)
        return (slope * sums).sum(), value.detach()


def combine_released(means: Tensor) -> Tensor:
    """Loss of the released network: fused + 0.1 * sum of the others' squares.

    Args:
        means: (1 + M,) mean cross entropies, fused head first.
    """
    return means[0] + 0.1 * means[1:].square().sum()


CLASS_WEIGHTS = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}


def class_weights(labels: np.ndarray, classes: int, scheme: str) -> np.ndarray:
    """Weight of each class, (N / (classes * N_c)) to the power of the scheme; 0 where N_c is 0.

    Args:
        labels: (N,) int64, `UNLABELLED` where there is none.
        classes: number of classes C.
        scheme: `none` (all 1), `sqrt` (power 1/2) or `balanced` (power 1).

    Returns:
        (C,) float64.
    """
    counts = np.bincount(labels[labels != UNLABELLED], minlength=classes)
    ratio = np.divide(counts.sum(), classes * counts, out=np.zeros(classes), where=counts > 0)
    return np.where(counts > 0, ratio ** CLASS_WEIGHTS[scheme], 0.0)
