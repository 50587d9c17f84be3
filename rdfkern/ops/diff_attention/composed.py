"""Differential attention as calls of SDPA, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import repeat_heads
from ..packing import Packing
from ..sdpa import masked_sdpa
from .formula import (
    Coefficient,
    compute_dtype,
    masked_scores,
    normalise_heads,
    per_row,
    split_mask,
    visible_keys,
)
from .temporal_values import difference, mapped_values


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Coefficient,
    *,
    alpha: Coefficient,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """A call of SDPA for each map; the difference and the norm in float32."""
    compute, v = compute_dtype(v.dtype), v.flatten(3)
    boolean, bias = split_mask(attn_mask)
    # Causal masking alone is left to SDPA, which then needs no Lq x Lk mask.
    sdpa_causal = is_causal and window is None
    visible = visible_keys(
        q1.shape[2],
        k1.shape[2],
        attn_mask=boolean,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal and not sdpa_causal,
        window=window,
        device=q1.device,
    )
    first, second = (
        masked_sdpa(
            q,
            k,
            v,
            visible=visible,
            is_causal=sdpa_causal,
            bias=bias,
            dropout_p=dropout_p,
            scale=scale,
        ).to(compute)
        for q, k in ((q1, k1), (q2, k2))
    )  # [B, H, Lq, Dv]
    out = per_row(alpha, compute) * first - per_row(lam, compute) * second
    out = normalise_heads(out, norm_weight, norm_eps, out_scale).to(v.dtype)
    if not return_lse:
        return out
    if sdpa_causal:
        visible = visible_keys(
            q1.shape[2],
            k1.shape[2],
            attn_mask=boolean,
            key_padding_mask=key_padding_mask,
            is_causal=True,
            window=None,
            device=q1.device,
        )
    with torch.no_grad():
        normalisers = [
            masked_scores(
                q.to(compute),
                repeat_heads(k, q.shape[1]).to(compute),
                scale=scale,
                bias=bias,
                visible=visible,
            ).logsumexp(dim=-1)
            for q, k in ((q1, k1), (q2, k2))
        ]
    return out, torch.stack(normalisers)


def diff_attention_varlen(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Coefficient,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alpha: Coefficient,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """One dense call on padded sequences.

    They are padded on the left, so that the dense call's bottom-right alignment is theirs. Causal
    self-attention is padded on the right: no query then sees padding, and no mask is needed.
    """
    causal_only = (
        is_causal
        and window is None
        and key_padding_mask is None
        and cu_seqlens_q is cu_seqlens_k
        and max_seqlen_q == max_seqlen_k
    )
    queries = Packing.from_cu_seqlens(
        cu_seqlens_q, q1.shape[0], max_seqlen_q, flush_right=not causal_only
    )
    keys = Packing.from_cu_seqlens(
        cu_seqlens_k, k1.shape[0], max_seqlen_k, flush_right=not causal_only
    )
    padding = None
    if not causal_only:
        present = keys.valid if key_padding_mask is None else keys.pad(~key_padding_mask)
        padding = ~present  # [B, Lk]
    result = diff_attention(
        _to_dense(q1, queries),
        _to_dense(k1, keys),
        _to_dense(q2, queries),
        _to_dense(k2, keys),
        _to_dense(v, keys),
        _rows_to_dense(lam, queries),
        alpha=_rows_to_dense(alpha, queries),
        attn_mask=None,
        key_padding_mask=padding,
        is_causal=is_causal,
        window=window,
        dropout_p=dropout_p,
        scale=scale,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        return_lse=return_lse,
    )
    if not return_lse:
        return queries.unpad(result.transpose(1, 2))
    out, lse = result
    lse = queries.unpad(lse.permute(1, 3, 0, 2))  # [T, 2, H]
    return queries.unpad(out.transpose(1, 2)), lse.transpose(0, 1)


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
) -> Tensor:
    """One call of SDPA, of alpha · V - lam · next(V) or of V and next(V) side by side."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    values, merged = mapped_values(q, k, v, lam, alpha, cu_seqlens, key_padding_mask)
    packing = None
    present = None if key_padding_mask is None else ~key_padding_mask  # [B, L] or [T]
    if cu_seqlens is not None:
        packing = Packing.from_cu_seqlens(cu_seqlens, q.shape[0], max_seqlen)
        present = packing.valid if present is None else packing.pad(present)
        q, k, values = (_to_dense(x, packing) for x in (q, k, values))
    visible = None if present is None else present[:, None, None, :]
    out = masked_sdpa(q, k, values, visible=visible, dropout_p=dropout_p, scale=scale)
    if packing is not None:
        out = packing.unpad(out.transpose(1, 2))  # [T, H, .]
    out = out.to(compute_dtype(v.dtype)) if merged else difference(out, lam, alpha)
    return normalise_heads(out, norm_weight, norm_eps, out_scale).to(v.dtype)


def _to_dense(packed: Tensor, packing: Packing) -> Tensor:
    return packing.pad(packed).transpose(1, 2)  # [B, H, L, D]


def _rows_to_dense(coefficient: Coefficient, packing: Packing) -> Coefficient:
    """From what broadcasts to (T, H) to what broadcasts to (B, H, L)."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    rows = coefficient.expand(torch.broadcast_shapes(coefficient.shape, (1, 1)))  # [T or 1, H or 1]
    return rows.mT if rows.shape[0] == 1 else packing.pad(rows).mT
