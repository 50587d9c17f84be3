"""Parameter names of the publicly released ReDiFu network, so that its weights can be loaded.

The public training script pickles the whole module; take `module.state_dict()` of it with the
public source at hand. Every tensor keeps its shape, only names change: `RELEASED_NAMES` maps a
released name to the one in `ReleasedReDiFu`, parameter by parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

_LINEAR = ("weight", "bias")
_RELATION_LAYERS = {"gatTer": "across_speakers", "gatT": "within_speaker"}
_ENCODERS = {"a_a": "denoisers.audio", "v_v": "denoisers.visual"}
_ENCODER_MODULES = {
    "delta_net.conv": "delta.conv",
    "delta_net.norm": "delta.norm",
    "delta_net.gate.0": "delta.gate",
    "context_gate.norm": "mix.norm",
    "context_gate.w.0": "mix.hidden",
    "context_gate.w.2": "mix.score",
    "pre_norm": "norm",
    "internal_transformer.0.self_attn.qkv": "attention.qkv",
    "internal_transformer.0.self_attn.out": "attention.out",
    "internal_transformer.0.norm1": "attention_norm",
    "internal_transformer.0.feed_forward.layer_norm": "feed_forward.norm",
    "internal_transformer.0.feed_forward.w_1": "feed_forward.expand",
    "internal_transformer.0.feed_forward.w_2": "feed_forward.contract",
    "internal_transformer.0.norm2": "feed_forward_norm",
}
_FUSION_LETTERS = {"t": "text", "a": "audio", "v": "visual"}
_FUSION_MODULES = {
    "norm_{}": "norm",
    "attn_{}.proj": "out",
    "gate_{}.gate.0": "gate",
    "mlp_{}.layers.0": "mlp.0",
    "mlp_{}.layers.3": "mlp.1",
    "mlp_{}.layers.6": "mlp.2",
    "mlp_{}.layers.9": "mlp.3",
}
_OTHER_MODULES = {
    "textf_input": "inputs.text",
    "acouf_input": "inputs.audio",
    "visuf_input": "inputs.visual",
    "agate.gate.0": "filters.audio",
    "vgate.gate.0": "filters.visual",
    "t_output_layer.2": "heads.text",
    "a_output_layer.2": "heads.audio",
    "v_output_layer.2": "heads.visual",
}


def _pairs() -> Iterator[tuple[str, str]]:
    yield "speaker_embeddings.weight", "speaker_embedding.weight"
    modules = dict(_OTHER_MODULES)
    for released, ours in _ENCODERS.items():
        modules |= {f"{released}.{r}": f"{ours}.{o}" for r, o in _ENCODER_MODULES.items()}
        yield f"{released}.delta_net.alpha", f"{ours}.delta.alpha"
        yield f"{released}.internal_transformer.0.self_attn.lambda_", f"{ours}.attention.lam"
    for released, ours in _RELATION_LAYERS.items():
        modules |= {f"{released}.fc": f"{ours}.project", f"{released}.layer_norm": f"{ours}.norm"}
        parts = {"attentions.0": "heads.0", "attentions.1": "heads.1", "out_att": "join"}
        for r, o in parts.items():
            modules[f"{released}.{r}.layer_norm"] = f"{ours}.{o}.norm"
            yield f"{released}.{r}.W", f"{ours}.{o}.weight"
            yield f"{released}.{r}.a", f"{ours}.{o}.score"
            # One embedding shared by all six, which a state dict lists six times.
            yield f"{released}.{r}.relation_embedding.weight", "relation_embedding.weight"
    for letter, modality in _FUSION_LETTERS.items():
        modules |= {
            f"mutual_former.{r.format(letter)}": f"fusion.targets.{modality}.{o}"
            for r, o in _FUSION_MODULES.items()
        }
        yield f"mutual_former.attn_{letter}.qkv.weight", f"fusion.targets.{modality}.qkv.weight"
    for released, ours in modules.items():
        yield from ((f"{released}.{kind}", f"{ours}.{kind}") for kind in _LINEAR)


RELEASED_NAMES: Mapping[str, str] = MappingProxyType(dict(_pairs()))
"""Released parameter name to the name in `ReleasedReDiFu`."""

DISCARDED = re.compile(r"(a_a|v_v)\.pos_emb\.(pe|inv_freq|modality_scales)")
"""Released names without a counterpart: position tables (computed) and a parameter never used."""


def from_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict to the names of `ReleasedReDiFu`.

    Raises:
        ValueError: a name is unknown or missing, or the copies of the shared relation embedding
            differ; the message names the parameter.
    """
    unknown = [
        name for name in state_dict if name not in RELEASED_NAMES and not DISCARDED.fullmatch(name)
    ]
    if unknown:
        raise ValueError(f"the released network has no parameters {unknown}")
    missing = [name for name in RELEASED_NAMES if name not in state_dict]
    if missing:
        raise ValueError(f"the state dict lacks the released network's parameters {missing}")
    renamed: dict[str, Tensor] = {}
    for released, ours in RELEASED_NAMES.items():
        value = state_dict[released]
        if ours in renamed and not torch.equal(renamed[ours], value):
            raise ValueError(
                f"{released} differs from its other copies, but the released network shares it"
            )
        renamed[ours] = value
    return renamed
