"""Typed settings of the network and of a training run; the command line is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network; the four parts of ReDiFu can be replaced for ablations.

    Attributes:
        preset: `default`, or the public network's exact arithmetic for one of its two data sets
            (the other fields then have no effect and must keep their defaults).
        width: hidden width D of every modality.
        heads: attention heads; must divide `width`, and `width / 2` for differential attention.
        layers: Transformer layers that denoise each modality other than text.
        denoise: attention of these layers: `differential` (two learned maps), `temporal` (the
            second map attends with the keys of one step earlier), `plain` (one softmax map), or
            `none` (no such layers).
        relations: `on`, or `off` for no relation subgraphs.
        past: utterances before the target that a relation reaches; None is unlimited.
        future: utterances after the target that a relation reaches; None is unlimited.
        fusion: `diffusion` (guided by text attention), or `gate` (the same gated sum without
            diffusion).
        steps: diffusion steps K, at least 1.
        restart: restart probability r of the diffusion, in [0, 1].
        dropout: probability of dropping an activation, in [0, 1).
        context: modalities whose input carries position and speaker identity: the `others` than
            text, or `all`.

    Raises:
        ValueError: a field is out of its range; the message names it.
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
    context: Literal["others", "all"] = "others"

    def __post_init__(self) -> None:
        for name, choices in get_type_hints(type(self)).items():
            if get_origin(choices) is Literal and getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        at_least = {"width": 1, "heads": 1, "layers": 1, "past": 0, "future": 0, "steps": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"restart must be in [0, 1], got {self.restart}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        parts = 2 * self.heads if self.denoise == "differential" else self.heads
        if self.width % parts:
            spelled = "2 * heads" if self.denoise == "differential" else "heads"
            raise ValueError(
                f"width must be a multiple of {spelled} ({parts}) with denoise={self.denoise!r}, "
                f"got {self.width}"
            )
