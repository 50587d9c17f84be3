"""Query heads that share keys and values (grouped-query attention)."""

from __future__ import annotations

from torch import Tensor


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, L, D) to (B, H, L, D): query head h uses kv head h // (H / Hkv)."""
    own = x.shape[1]
    return x if own == heads else x.repeat_interleave(heads // own, dim=1)


def rows_of_groups(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Lq, D) to (B, Hkv, H / Hkv · Lq, D): queries of the same keys under each other."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def heads_of_groups(x: Tensor, lq: int) -> Tensor:
    """The inverse, (B, Hkv, H / Hkv · Lq, D) to (B, H, Lq, D)."""
    return x.unflatten(2, (-1, lq)).flatten(1, 2)
