"""Modules around the operations."""

from .attention import MultiheadDiffAttention
from .attention_v2 import MultiheadDiffAttentionV2
from .convert import diff_attention_from_multihead, diff_encoder_layer_from_transformer
from .diffusion import TextGuidedDiffusion
from .encoder_layer import DiffTransformerEncoderLayer
from .relation import RelationConv
from .relation_attention import RelationAttention

__all__ = [
    "DiffTransformerEncoderLayer",
    "MultiheadDiffAttention",
    "MultiheadDiffAttentionV2",
    "RelationAttention",
    "RelationConv",
    "TextGuidedDiffusion",
    "diff_attention_from_multihead",
    "diff_encoder_layer_from_transformer",
]
