"""Differential attention in Triton: what `op` and the dispatcher look for by name."""

from functools import partial

from . import op, temporal
from .triton_bwd import backward
from .triton_fwd import forward

__all__ = [
    "backward",
    "diff_attention",
    "diff_attention_varlen",
    "forward",
    "temporal_diff_attention",
]

diff_attention = partial(op.diff_attention, impl="triton")
diff_attention_varlen = partial(op.diff_attention_varlen, impl="triton")
temporal_diff_attention = partial(temporal.temporal_diff_attention, impl="triton")
