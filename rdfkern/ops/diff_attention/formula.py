"""The pieces of the formula that both implementations share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends.autocast import without_autocast
from ..masks import band_mask, masked_softmax

Coefficient = float | Tensor
# An additive mask at or below this hides its key, as -inf does: the lowest number of a dtype, which
# many libraries put there, then hides keys from a row whose keys it hides all, too.
HIDDEN = -1e30


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the subtraction and the norm: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dim_of_values(v: Tensor) -> int:
    """Dv of (B, Hkv, Lk, Dv), of (B, Hkv, Lk, P, Dv / P), or of packed (T, Hkv, Dv)."""
    return v.shape[-1] if len(v.shape) < 5 else v.shape[-2] * v.shape[-1]


def per_row(coefficient: Coefficient, dtype: torch.dtype) -> Coefficient:
    """lam or alpha, (..., Lq), as a factor of rows (..., Lq, Dv)."""
    if isinstance(coefficient, Tensor):
        return coefficient.to(dtype).unsqueeze(-1)
    return coefficient


def split_mask(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(boolean mask, additive mask): `attn_mask` is one of them, the other is None.

    What hides a key in the additive one is -inf.
    """
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask, None
    return None, attn_mask.masked_fill(attn_mask <= HIDDEN, float("-inf"))


def visible_keys(
    lq: int,
    lk: int,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    device: torch.device,
) -> Tensor | None:
    """All boolean masks in one.

    Returns:
        bool with four dimensions that broadcast to (B, H, Lq, Lk), no larger than the masks ask
        for; True where the key takes part. None if every key does.
    """
    band = band_mask(lq, lk, is_causal=is_causal, window=window, device=device)
    masks = [
        attn_mask,
        None if key_padding_mask is None else ~key_padding_mask[:, None, None, :],
        None if band is None else band[None, None],
    ]
    visible = None
    for mask in masks:
        if mask is not None:
            visible = mask if visible is None else visible & mask
    return visible


def masked_scores(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None, visible: Tensor | None
) -> Tensor:
    """q kᵀ · scale + bias, and -inf where a key is not visible: (B, H, Lq, Lk)."""
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


def normalise_heads(
    out: Tensor, norm_weight: Tensor | None, norm_eps: float | None, out_scale: float
) -> Tensor:
    """out_scale · RMSNorm over the last dimension · norm_weight; `out` as it is without an eps."""
    if norm_eps is None:
        return out
    out = out * torch.rsqrt(out.square().mean(dim=-1, keepdim=True) + norm_eps) * out_scale
    return out if norm_weight is None else out * norm_weight.to(out.dtype)


def difference_of_maps(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    lam: Tensor,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> Tensor:
    """A1 - lam · A2 itself, (B, H, Lq, Lk) of q1's dtype, for who wants to look at it.

    Dense arguments of `rdfkern.diff_attention`, already validated, with as many kv as query heads,
    a scalar lam and an attn_mask of four dimensions.
    """
    compute = compute_dtype(q1.dtype)
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
    scale = q1.shape[-1] ** -0.5
    with without_autocast(q1.device.type):
        scores = [
            masked_scores(q.to(compute), k.to(compute), scale=scale, bias=bias, visible=visible)
            for q, k in ((q1, k1), (q2, k2))
        ]
        first, second = (masked_softmax(score, None) for score in scores)
        return (first - lam * second).to(q1.dtype)
