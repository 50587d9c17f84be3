"""The meaning of differential attention: two softmax maps and their weighted difference.

Half types are computed in float32 and cast back at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads import repeat_heads
from ..masks import masked_softmax
from .formula import (
    Coefficient,
    compute_dtype,
    masked_scores,
    normalise_heads,
    per_row,
    split_mask,
    visible_keys,
)


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
    """O = alpha · A1 V - lam · A2 V with A_i = softmax(q_i k_iᵀ · scale, masked)."""
    v, dtype, compute = v.flatten(3), v.dtype, compute_dtype(v.dtype)
    boolean, bias = split_mask(attn_mask)
    visible = visible_keys(
        q1.shape[2],
        k1.shape[2],
        attn_mask=boolean,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        window=window,
        device=q1.device,
    )
    v = repeat_heads(v.to(compute), q1.shape[1])
    products, normalisers = [], []
    for q, k in ((q1, k1), (q2, k2)):
        k = repeat_heads(k.to(compute), q.shape[1])
        scores = masked_scores(q.to(compute), k, scale=scale, bias=bias, visible=visible)
        weights = F.dropout(masked_softmax(scores, None), dropout_p)  # [B, H, Lq, Lk]
        products.append(weights @ v)
        normalisers.append(scores.detach().logsumexp(dim=-1))
    out = per_row(alpha, compute) * products[0] - per_row(lam, compute) * products[1]
    out = normalise_heads(out, norm_weight, norm_eps, out_scale).to(dtype)
    return (out, torch.stack(normalisers)) if return_lse else out


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
    """One dense call per sequence; the maximal lengths only matter to faster implementations."""
    lam, alpha = (_spread(coefficient, q1.shape[:2], q1) for coefficient in (lam, alpha))
    outs, normalisers = [], []
    for queries, keys in zip(_slices(cu_seqlens_q), _slices(cu_seqlens_k), strict=True):
        out, lse = diff_attention(
            *(
                packed[rows].transpose(0, 1)[None]  # [1, H, L, D]
                for packed, rows in ((q1, queries), (k1, keys), (q2, queries), (k2, keys))
            ),
            v[keys].transpose(0, 1)[None],
            _rows_of(lam, queries),
            alpha=_rows_of(alpha, queries),
            attn_mask=None,
            key_padding_mask=None if key_padding_mask is None else key_padding_mask[keys][None],
            is_causal=is_causal,
            window=window,
            dropout_p=dropout_p,
            scale=scale,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            out_scale=out_scale,
            return_lse=True,
        )
        outs.append(out[0].transpose(0, 1))  # [Lq, H, Dv]
        normalisers.append(lse[:, 0].mT)  # [2, Lq, H]
    out = torch.cat(outs)
    return (out, torch.cat(normalisers, dim=1)) if return_lse else out


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
    """One dialogue after the other, its second map from keys that are really rolled."""
    if cu_seqlens is None:
        batch, _, length, _ = q.shape
        lam, alpha = (
            _spread(c, q.shape[:3], q).transpose(1, 2).flatten(0, 1) for c in (lam, alpha)
        )
        out = temporal_diff_attention(
            *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),  # [B L, H, D]
            lam,
            alpha=alpha,
            cu_seqlens=torch.arange(batch + 1) * length,
            max_seqlen=length,
            key_padding_mask=None if key_padding_mask is None else key_padding_mask.flatten(),
            dropout_p=dropout_p,
            scale=scale,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            out_scale=out_scale,
        )
        return out.unflatten(0, (batch, length)).transpose(1, 2)
    compute = compute_dtype(v.dtype)
    lam, alpha = (_spread(coefficient, q.shape[:2], q) for coefficient in (lam, alpha))
    outs = []
    for rows in _slices(cu_seqlens):
        out = _temporal_dialogue(
            *(x[rows].to(compute).transpose(0, 1) for x in (q, k, v, lam, alpha)),
            None if key_padding_mask is None else key_padding_mask[rows],
            dropout_p,
            scale,
        )
        outs.append(out.transpose(0, 1))  # [L, H, Dv]
    return normalise_heads(torch.cat(outs), norm_weight, norm_eps, out_scale).to(v.dtype)


def _temporal_dialogue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    alpha: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """q (H, L, D), k, v (Hkv, L, .), lam, alpha (H, L), padding (L,) -> (H, L, Dv)."""
    if padding is not None:
        k, v = k[:, ~padding], v[:, ~padding]
    k, v = (repeat_heads(x[None], q.shape[0])[0] for x in (k, v))  # [H, n, .]
    earlier = k.roll(1, dims=1)
    map1 = masked_softmax(q @ k.mT * scale, None)
    map2 = masked_softmax(q @ earlier.mT * scale, None)
    kept = F.dropout(torch.ones_like(map1), dropout_p)
    map1, map2 = map1 * kept, map2 * kept.roll(1, dims=-1)
    return per_row(alpha, q.dtype) * (map1 @ v) - per_row(lam, q.dtype) * (map2 @ v)


def _slices(cu_seqlens: Tensor) -> list[slice]:
    """Rows of each sequence; no sequence at all counts as an empty one."""
    starts = cu_seqlens.tolist()
    slices = [slice(start, stop) for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    return slices or [slice(0, 0)]


def _spread(coefficient: Coefficient, shape: torch.Size, like: Tensor) -> Tensor:
    if not isinstance(coefficient, Tensor):
        coefficient = torch.tensor(coefficient, dtype=torch.float64, device=like.device)
    return coefficient.expand(shape)


def _rows_of(coefficient: Tensor, rows: slice) -> Tensor:
    return coefficient[rows].mT[None]  # [1, H, L]
