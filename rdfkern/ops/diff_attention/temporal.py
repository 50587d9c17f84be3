"""The temporal form on the kernels of differential attention, with one map."""

from __future__ import annotations

from torch import Tensor

from ..._backends.dispatch import Arguments
from . import op
from .formula import Coefficient, normalise_heads
from .temporal_values import difference, mapped_values, merges


def kernel_arguments(arguments: Arguments) -> Arguments:
    """What the predicates of kernels ask about, with values as wide as the kernels get them."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    if not merges(q, k, arguments["lam"], arguments["alpha"]):
        v = v[..., :1].expand(*v.shape[:-1], 2 * v.shape[-1])
    return {"q1": q, "v": v, "attn_mask": None}


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
    values, merged = mapped_values(q, k, v, lam, alpha, cu_seqlens, key_padding_mask)
    norm = {"norm_weight": norm_weight, "norm_eps": norm_eps, "out_scale": out_scale}
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
