"""Modules around the operations."""

from .attention import MultiheadDiffAttention
from .diffusion import TextGuidedDiffusion
from .encoder_layer import DiffTransformerEncoderLayer
from .relation import RelationAttention, RelationConv

__all__ = [
    "DiffTransformerEncoderLayer",
    "MultiheadDiffAttention",
    "RelationAttention",
    "RelationConv",
    "TextGuidedDiffusion",
]
