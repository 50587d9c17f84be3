"""Inputs of differential attention, made ready for its Triton kernels."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..._backends.triton_device import architecture
from ..._backends.triton_utils import autotune_requested, dot_precision, unit_stride
from . import config
from .config import Tiles
from .formula import dim_of_values


@dataclass(frozen=True)
class Problem:
    """The inputs that forward and backward share; shapes are those of the contract in `op.py`.

    `scale` is never negative: `query_scale`, the true one, is, and then q1 and q2 are negated.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor | None
    k2: Tensor | None
    v: Tensor
    lam: Tensor | None
    alpha: Tensor
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    left: int
    right: int
    dropout_p: float
    seed: int
    scale: float
    query_scale: float
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    sequences: int
    len_q: int
    len_k: int

    @property
    def maps(self) -> int:
        return 1 if self.q2 is None else 2

    @property
    def heads(self) -> int:
        return self.q1.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k1.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q1.shape[3]

    @property
    def value_dim(self) -> int:
        return dim_of_values(self.v)

    @property
    def rows(self) -> tuple[int, int, int]:
        """(B, H, Lq), with varlen (1, H, T): the shape of everything per query and head."""
        return tuple(self.q1.shape[:3])

    def tuning(self, kernel: str, chosen: Tiles) -> dict[str, Any]:
        """What a `Launch` needs to measure launch options, if it is asked to."""
        if not autotune_requested():
            return {}
        widths = (padded_width(self.head_dim), padded_width(self.value_dim))
        where = (self.q1.dtype, architecture(self.q1.device))
        candidates = config.candidates(kernel, chosen, *widths, *where)
        return {"candidates": candidates, "key": TUNING_KEY}

    def kernel_arguments(self, tiles: Tiles) -> dict[str, Any]:
        """The arguments that all kernels which recompute the maps have in common, by name."""
        mask, padding = self.attn_mask, self.key_padding_mask
        return {
            "q1_ptr": self.q1,
            "k1_ptr": self.k1,
            "q2_ptr": self.q2,
            "k2_ptr": self.k2,
            "v_ptr": self.v,
            "mask_ptr": mask,
            "padding_ptr": padding,
            "cu_seqlens_q_ptr": self.cu_seqlens_q,
            "cu_seqlens_k_ptr": self.cu_seqlens_k,
            "q1_strides": self.q1.stride()[:3],
            "k1_strides": self.k1.stride()[:3],
            "q2_strides": row_strides(self.q2),
            "k2_strides": row_strides(self.k2),
            "v_strides": self.v.stride()[:3],
            "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
            "padding_stride": padding.stride(0)
            if padding is not None and padding.dim() == 2
            else 0,
            "heads": self.heads,
            "group": self.heads // self.kv_heads,
            "len_q": self.len_q,
            "len_k": self.len_k,
            "left": self.left,
            "right": self.right,
            "seed": self.seed,
            # Above 0, so that -inf times it stays -inf.
            "scale_log2": max(self.scale, 1e-30) * math.log2(math.e),
            "dropout_p": self.dropout_p,
            "D": self.head_dim,
            "DV": self.value_dim,
            "BLOCK_D": padded_width(self.head_dim),
            "BLOCK_DV": padded_width(self.value_dim),
            "MAPS": self.maps,
            "HAS_LEFT": self.left >= 0,
            "HAS_RIGHT": self.right >= 0,
            "HAS_DROPOUT": self.dropout_p > 0.0,
            "PRECISION": dot_precision(self.q1.dtype),
            **tiles.launch_options(),
        }


# Arguments on which the best tiles depend; lengths do too, but change from call to call.
TUNING_KEY = ("D", "DV", "MAPS", "HAS_LEFT", "HAS_RIGHT", "HAS_DROPOUT")


def row_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of (B, H, L, .) up to the rows; zeros for a tensor that is not there."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def padded_width(columns: int) -> int:
    """Width of a tile of that many columns: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(columns))


def describe(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor | None,
    alpha: Tensor,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    seed: int | None,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Problem:
    """Collect the inputs; copies only those whose last stride is not 1, or all q of a scale < 0."""
    if scale < 0.0:
        q1, q2 = -q1, None if q2 is None else -q2
    varlen = cu_seqlens_q is not None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.view(torch.uint8)
    if key_padding_mask is not None:
        key_padding_mask = unit_stride(key_padding_mask).view(torch.uint8)
    return Problem(
        *(None if x is None else unit_stride(x) for x in (q1, k1, q2, k2, v)),
        lam=lam,
        alpha=alpha,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        left=left,
        right=right,
        dropout_p=dropout_p,
        seed=0 if seed is None else seed,
        scale=abs(scale),
        query_scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sequences=cu_seqlens_q.shape[0] - 1 if varlen else q1.shape[0],
        len_q=max_seqlen_q if varlen else q1.shape[2],
        len_k=max_seqlen_k if varlen else k1.shape[2],
    )
