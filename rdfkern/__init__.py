"""Differential attention, relation message passing and attention diffusion for PyTorch."""

import os

from . import nn
from ._backends.dispatch import (
    BackendUnavailableError,
    available_backends,
    explain,
    use_backend,
)
from .ops.diff_attention.api import (
    diff_attention,
    diff_attention_varlen,
    temporal_diff_attention,
)
from .ops.diffusion.api import diffusion_attention
from .ops.relation_mp.api import (
    relation_attention,
    relation_conv,
    relation_dot_attention,
    relation_gat,
)
from .ops.relation_mp.graph import RelationGraph
from .ops.relation_mp.spec import RelationSpec

__version__ = "0.1.0"

# In a checkout, models/ and csrc/ stand beside this folder instead of in it. Python started in the
# checkout's root finds this folder before the installed package, so that they would be missing.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "models", "network.py")):
    __path__.append(_checkout)

__all__ = [
    "BackendUnavailableError",
    "RelationGraph",
    "RelationSpec",
    "available_backends",
    "diff_attention",
    "diff_attention_varlen",
    "diffusion_attention",
    "explain",
    "nn",
    "relation_attention",
    "relation_conv",
    "relation_dot_attention",
    "relation_gat",
    "temporal_diff_attention",
    "use_backend",
]
