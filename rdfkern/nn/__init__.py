"""Modules around the operations."""

from .attention import DiffTransformerEncoderLayer, MultiheadDiffAttention
from .diffusion import TextGuidedDiffusion
from .relation import RelationAttention, RelationConv

__all__ = [
    "DiffTransformerEncoderLayer",
    "MultiheadDiffAttention",
    "RelationAttention",
    "RelationConv",
    "TextGuidedDiffusion",
]
