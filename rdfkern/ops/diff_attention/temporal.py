"""The temporal form on the kernels of differential attention, with one map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._backends.dispatch import Arguments
from . import op
from .formula import Coefficient, normalise_heads
from .temporal_values import difference, merged_values, merges, next_values

Reason = Callable[[Arguments | None], str | None]


def reason_of(kernels: Reason) -> Reason:
    """The predicate of the temporal form on kernels whose own predicate is given."""

    def can_run(arguments: Arguments | None) -> str | None:
        if arguments is None:
            return kernels(None)
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        if not merges(q, k, arguments["lam"], arguments["alpha"]):
            v = v[..., :1].expand(*v.shape[:-1], 2 * v.shape[-1])  # as wide as the kernels' values
        return kernels({"q1": q, "v": v, "attn_mask": None})

    return can_run


def temporal_diff_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Coefficient,
    *,
    alpha: Coefficient,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    impl: str,
) -> Tensor:
    """One map of the kernel `impl`, applied to alpha · V - lam · next(V).

    Where a coefficient differs between queries that share their values, it is applied to V and
    next(V) side by side, and the difference is taken of what comes out.
    """
    following = next_values(v, cu_seqlens, key_padding_mask)
    norm = {"norm_weight": norm_weight, "norm_eps": norm_eps, "out_scale": out_scale}
    merged = merges(q, k, lam, alpha)
    if merged:
        values = merged_values(v, following, lam, alpha)
    else:
        values = torch.cat([v, following], dim=-1)
    out = op.attention(
        q,
        k,
        values,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        scale=scale,
        impl=impl,
        **(norm if merged else {}),
    )
    if merged:
        return out
    return normalise_heads(difference(out, lam, alpha), **norm).to(v.dtype)
