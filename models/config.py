"""Typed settings of the network and of a training run; the command line is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network; the four parts of ReDiFu can be replaced for ablations.

    Attributes:
        preset: `default`, or the public network's exact arithmetic for one of its two data sets
            (the other fields then have no effect and must keep their defaults).
        width: hidden width D of every modality.
        heads: attention heads; must divide `width`.
        layers: Transformer layers that denoise each modality other than text.
        denoise: attention of these layers: `differential` (two learned maps), `temporal` (the
            second map attends with the keys of one step earlier), `plain` (one softmax map), or
            `none` (no such layers).
        relations: `on`, or `off` for no relation subgraphs.
        past: utterances before the target that a relation reaches; None is unlimited.
        future: utterances after the target that a relation reaches; None is unlimited.
        fusion: `diffusion` (guided by text attention), or `gate` (the same gated sum without
            diffusion).
        steps: diffusion steps K.
        restart: restart probability r of the diffusion, in [0, 1].
        dropout: probability of dropping an activation.
    """

    preset: Literal["default", "released-iemocap", "released-meld"] = "default"
    width: int = 128
    heads: int = 4
    layers: int = 1
    denoise: Literal["differential", "temporal", "plain", "none"] = "differential"
    relations: Literal["on", "off"] = "on"
    past: int | None = 10
    future: int | None = 10
    fusion: Literal["diffusion", "gate"] = "diffusion"
    steps: int = 4
    restart: float = 0.2
    dropout: float = 0.3
