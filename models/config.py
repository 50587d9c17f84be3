"""Typed settings of the network and of a training run; the command line is made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .synthetic import SyntheticConfig

BUILT_IN = "built-in"


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
    width: int = 64
    heads: int = 4
    layers: int = 1
    denoise: Literal["differential", "temporal", "plain", "none"] = "differential"
    relations: Literal["on", "off"] = "on"
    past: int | None = 5
    future: int | None = 5
    fusion: Literal["diffusion", "gate"] = "diffusion"
    steps: int = 2
    restart: float = 0.1
    dropout: float = 0.2
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


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        data: `built-in`, or the path of a prepared folder or of raw data that `prepare` can read.
        out: folder of the run; default runs/NAME with the name of the data.
        network: shape of the network.
        built_in: the generated conversations, where `data` is `built-in`.
        modalities: modalities to use, text among them; default all that the data has.
        epochs: most passes over the training split.
        batch_utterances: utterances that a batch may hold; a longer dialogue is a batch of its own.
        batch_dialogues: dialogues that a batch may hold; None is unlimited.
        learning_rate: peak of the schedule.
        warmup: share of all steps over which the learning rate rises linearly; it then falls to
            zero along a cosine.
        weight_decay: decoupled decay of matrices; biases, norms and scalars have none.
        clip_norm: largest norm of the gradient of all parameters; 0 does not clip.
        patience: epochs without a better validation score before training stops; 0 never stops
            early.
        class_weights: `balanced` weights each class by the inverse of its training frequency,
            `sqrt` by the square root of that; the linear baseline gets the same.
        auxiliary_weight: weight of the mean loss of the single-modality heads; the released
            presets have their own.
        min_speaker_utterances: training utterances that a speaker needs for an identity of their
            own; the others share the unknown one.
        autocast: `bfloat16` runs the network in mixed precision.
        seed: of the weights, the order of the dialogues and dropout.
        deterministic: use deterministic kernels only, so that runs on a GPU repeat bit by bit.
        device: `auto` takes CUDA where there is a device.
        threads: threads of torch on the CPU; default torch's own choice.
        resume: continue the run that `out` holds; with --no-resume it is thrown away instead.
        save_every: steps between two checkpoints; 0 saves at the end of each epoch only.
    """

    data: str = BUILT_IN
    out: Path | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    built_in: SyntheticConfig = field(default_factory=SyntheticConfig)
    modalities: tuple[str, ...] | None = None
    epochs: int = 10
    batch_utterances: int = 150
    batch_dialogues: int | None = None
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    patience: int = 5
    class_weights: Literal["none", "sqrt", "balanced"] = "none"
    auxiliary_weight: float = 0.3
    min_speaker_utterances: int = 20
    autocast: Literal["none", "bfloat16"] = "none"
    seed: int = 0
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    resume: bool = True
    save_every: int = 0

    def __post_init__(self) -> None:
        at_least = {
            "epochs": 1,
            "batch_utterances": 1,
            "batch_dialogues": 1,
            "threads": 1,
            "weight_decay": 0,
            "clip_norm": 0,
            "patience": 0,
            "auxiliary_weight": 0,
            "min_speaker_utterances": 1,
            "seed": 0,
            "save_every": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} must be finite and at least {least}, got {value}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be finite and above 0, got {self.learning_rate}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        released = self.network.preset != "default"
        if released and self.auxiliary_weight != TrainConfig.auxiliary_weight:
            raise ValueError(
                f"auxiliary_weight must keep its default with preset {self.network.preset!r}, "
                "which has a loss of its own"
            )
        if self.modalities is not None and len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must be distinct, got {list(self.modalities)}")

    @property
    def folder(self) -> Path:
        """Folder of the run, `out` or its default."""
        return self.out if self.out is not None else Path("runs") / Path(self.data).resolve().name

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, as JSON values.

        A run is resumed only under the same identity. The others say where and how it runs.
        """
        settings = asdict(self)
        for name in ("out", "device", "threads", "resume", "save_every"):
            del settings[name]
        if self.data != BUILT_IN:
            del settings["built_in"]
            settings["data"] = str(Path(self.data).resolve())
        settings["modalities"] = None if self.modalities is None else list(self.modalities)
        for name, value in settings.get("built_in", {}).items():
            if isinstance(value, tuple):
                settings["built_in"][name] = list(value)
        return settings


def from_json(settings: dict[str, Any]) -> TrainConfig:
    """The settings that `TrainConfig.identity` wrote; the others take their defaults.

    Raises:
        ValueError: a name is unknown or a value is not allowed.
    """
    values = dict(settings)
    if values.get("modalities") is not None:
        values["modalities"] = tuple(values["modalities"])
    parts = {"network": NetworkConfig, "built_in": SyntheticConfig}
    try:
        for name, part in parts.items():
            if name in values:
                values[name] = part(**_tuples(values[name]))
        return TrainConfig(**values)
    except TypeError as error:
        raise ValueError(f"settings of another version of rdfkern: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
