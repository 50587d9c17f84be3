"""Learning rate and seed of a training step: pure functions of the step."""

from __future__ import annotations

import math

import numpy as np


def learning_rate_at(step: int, total: int, peak: float, warmup: float) -> float:
    """Learning rate of a step: linear warmup to `peak`, then a cosine to zero.

    Args:
        step: from 0.
        total: steps of the whole run.
        peak: highest rate.
        warmup: share of `total` that rises.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout in one step of one process, 64 bits."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
