"""Checks of the public arguments, and the canonical ones that every implementation takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._backends.autocast import autocast_inputs
from ..._backends.checks import (
    FLOATING,
    check_broadcastable,
    check_cu_seqlens,
    check_device,
    check_floating,
    check_max_seqlen,
    check_number,
    check_padding_mask,
    check_shape,
    check_window,
)
from .formula import Coefficient, compute_dtype, dim_of_values

DENSE_HINT = "one value per head is (H, 1), one per head and query (H, Lq)"
PACKED_HINT = "one value per head is (H,), one per row (T, 1)"


def dense_arguments(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Coefficient,
    *,
    alpha: Coefficient = 1.0,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Validated arguments of `diff_attention`; an attn_mask gets four dimensions."""
    q1, k1, q2, k2, v = autocast_inputs(q1, k1, q2, k2, v)
    check_floating({"q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v})
    _check_rank("q1", q1, 4, "(B, H, Lq, D)")
    check_shape("q2", q2, tuple(q1.shape), "(B, H, Lq, D) of q1")
    batch, heads, lq, dim = q1.shape
    check_shape("k1", k1, (batch, None, None, dim), "(B, Hkv, Lk, D)")
    check_shape("k2", k2, tuple(k1.shape), "(B, Hkv, Lk, D) of k1")
    if v.dim() == 5:
        check_shape("v", v, (*k1.shape[:3], None, None), "(B, Hkv, Lk, P, Dv / P)")
    else:
        check_shape("v", v, (*k1.shape[:3], None), "(B, Hkv, Lk, Dv)")
    _check_sizes("q1", q1, "k1", k1.shape[1], heads, v)
    rows = (batch, heads, lq)
    for name, coefficient in (("lam", lam), ("alpha", alpha)):
        _check_coefficient(name, coefficient, rows, "(B, H, Lq)", DENSE_HINT, q1)
    lk = k1.shape[2]
    if attn_mask is not None:
        attn_mask = _checked_mask(attn_mask, (batch, heads, lq, lk), q1)
    if key_padding_mask is not None:
        check_padding_mask(key_padding_mask, (batch, lk), "(B, Lk)", "q1", q1)
    return {
        "q1": q1,
        "k1": k1,
        "q2": q2,
        "k2": k2,
        "v": v,
        "lam": lam,
        "alpha": alpha,
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        **_band(is_causal, window),
        **_epilogue(q1, v, dropout_p, scale, norm_weight, norm_eps, out_scale),
        "return_lse": bool(return_lse),
    }


def varlen_arguments(
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
    alpha: Coefficient = 1.0,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Validated arguments of `diff_attention_varlen`, which have no attn_mask."""
    q1, k1, q2, k2, v = autocast_inputs(q1, k1, q2, k2, v)
    check_floating({"q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v})
    _check_rank("q1", q1, 3, "(Tq, H, D)")
    check_shape("q2", q2, tuple(q1.shape), "(Tq, H, D) of q1")
    total_q, heads, dim = q1.shape
    check_shape("k1", k1, (None, None, dim), "(Tk, Hkv, D)")
    check_shape("k2", k2, tuple(k1.shape), "(Tk, Hkv, D) of k1")
    check_shape("v", v, (*k1.shape[:2], None), "(Tk, Hkv, Dv)")
    _check_sizes("q1", q1, "k1", k1.shape[1], heads, v)
    _check_packing("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, "q1", q1)
    if cu_seqlens_k is not cu_seqlens_q or max_seqlen_k != max_seqlen_q or len(k1) != total_q:
        _check_packing("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, "k1", k1)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must hold as many sequences as cu_seqlens_q "
            f"({cu_seqlens_q.shape[0] - 1}), got {cu_seqlens_k.shape[0] - 1}"
        )
    for name, coefficient in (("lam", lam), ("alpha", alpha)):
        _check_coefficient(name, coefficient, (total_q, heads), "(T, H)", PACKED_HINT, q1)
    if attn_mask is not None:
        raise ValueError(
            "attn_mask must be None for packed sequences, where its rows and columns have no "
            "place; call diff_attention once per sequence instead"
        )
    if key_padding_mask is not None:
        check_padding_mask(key_padding_mask, tuple(k1.shape[:1]), "(Tk,)", "q1", q1)
    return {
        "q1": q1,
        "k1": k1,
        "q2": q2,
        "k2": k2,
        "v": v,
        "lam": lam,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "alpha": alpha,
        "key_padding_mask": key_padding_mask,
        **_band(is_causal, window),
        **_epilogue(q1, v, dropout_p, scale, norm_weight, norm_eps, out_scale),
        "return_lse": bool(return_lse),
    }


def temporal_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Coefficient,
    *,
    alpha: Coefficient = 1.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
) -> dict[str, Any]:
    """Validated arguments of `temporal_diff_attention`."""
    q, k, v = autocast_inputs(q, k, v)
    check_floating({"q": q, "k": k, "v": v})
    if cu_seqlens is not None:
        _check_rank("q", q, 3, "(T, H, D) with cu_seqlens")
        total, heads, dim = q.shape
        check_shape("k", k, (total, None, dim), "(T, Hkv, D)")
        check_shape("v", v, (*k.shape[:2], None), "(T, Hkv, Dv)")
        _check_sizes("q", q, "k", k.shape[1], heads, v)
        _check_packing("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, "q", q)
        rows, spelled, hint = (total, heads), "(T, H)", PACKED_HINT
        positions, spelled_positions = (total,), "(T,)"
    else:
        _check_rank("q", q, 4, "(B, H, L, D) without cu_seqlens")
        batch, heads, length, dim = q.shape
        check_shape("k", k, (batch, None, length, dim), "(B, Hkv, L, D)")
        check_shape("v", v, (*k.shape[:3], None), "(B, Hkv, L, Dv)")
        _check_sizes("q", q, "k", k.shape[1], heads, v)
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen needs cu_seqlens (packed inputs), got {max_seqlen} alone")
        rows, spelled, hint = (batch, heads, length), "(B, H, L)", DENSE_HINT
        positions, spelled_positions = (batch, length), "(B, L)"
    for name, coefficient in (("lam", lam), ("alpha", alpha)):
        _check_coefficient(name, coefficient, rows, spelled, hint, q)
    if key_padding_mask is not None:
        check_padding_mask(key_padding_mask, positions, spelled_positions, "q", q)
    return {
        "q": q,
        "k": k,
        "v": v,
        "lam": lam,
        "alpha": alpha,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "key_padding_mask": key_padding_mask,
        **_epilogue(q, v, dropout_p, scale, norm_weight, norm_eps, out_scale),
    }


def _check_rank(name: str, tensor: Tensor, rank: int, spelled: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have shape {spelled}, got {tuple(tensor.shape)}")


def _check_sizes(q_name: str, q: Tensor, k_name: str, kv_heads: int, heads: int, v: Tensor) -> None:
    for name, tensor, dim in ((q_name, q, q.shape[-1]), ("v", v, dim_of_values(v))):
        if dim == 0:
            raise ValueError(
                f"{name} must have a head dim of at least 1, got {tuple(tensor.shape)}"
            )
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{k_name} must have a number of heads that divides the {heads} heads of {q_name}, "
            f"got {kv_heads}"
        )


def _check_coefficient(
    name: str, value: Coefficient, rows: tuple[int, ...], spelled: str, hint: str, q: Tensor
) -> None:
    if not isinstance(value, Tensor):
        check_number(name, value)
        return
    check_broadcastable(name, value, rows, spelled, hint)
    _check_wide(name, value, q)


def _check_wide(name: str, tensor: Tensor, q: Tensor) -> None:
    """`tensor` takes part at the precision of the subtraction, so it may be that wide."""
    widest = compute_dtype(q.dtype)
    if tensor.dtype not in FLOATING or compute_dtype(tensor.dtype) not in (torch.float32, widest):
        raise TypeError(
            f"{name} must have a floating dtype up to {widest} with inputs of {q.dtype}, "
            f"got {tensor.dtype}"
        )
    check_device(name, tensor, "the queries", q)


def _checked_mask(attn_mask: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool:
        (_, attn_mask) = autocast_inputs(q, attn_mask)
        if attn_mask.dtype != q.dtype:
            raise TypeError(
                f"attn_mask must be bool or have the dtype of the queries ({q.dtype}), "
                f"got {attn_mask.dtype}"
            )
    hint = "a mask per sequence is (B, 1, Lq, Lk)"
    check_broadcastable("attn_mask", attn_mask, shape, "(B, H, Lq, Lk)", hint)
    check_device("attn_mask", attn_mask, "the queries", q)
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))


def _check_packing(
    cu_name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int | None, name: str, x: Tensor
) -> None:
    check_cu_seqlens(cu_name, cu_seqlens, x.shape[0])
    check_device(cu_name, cu_seqlens, name, x)
    check_max_seqlen(max_name, max_seqlen, cu_name, cu_seqlens)


def _band(is_causal: bool, window: tuple[int, int] | None) -> dict[str, Any]:
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    window = check_window(window)
    return {"is_causal": is_causal, "window": None if window == (-1, -1) else window}


def _epilogue(
    q: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
) -> dict[str, Any]:
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is not None:
        check_number("scale", scale)
    check_number("out_scale", out_scale)
    if norm_eps is None:
        if norm_weight is not None or out_scale != 1.0:
            given = "norm_weight" if norm_weight is not None else f"out_scale={out_scale}"
            raise ValueError(
                f"{given} belongs to the norm, which norm_eps=None leaves out; set norm_eps"
            )
    else:
        check_number("norm_eps", norm_eps)
        if not norm_eps > 0.0:
            raise ValueError(
                f"norm_eps must be above 0, or a row of zeros has no norm; got {norm_eps}"
            )
    if norm_weight is not None:
        if not isinstance(norm_weight, Tensor):
            raise TypeError(
                f"norm_weight must be a tensor or None, got {type(norm_weight).__name__}"
            )
        check_shape("norm_weight", norm_weight, (dim_of_values(v),), "(Dv,)")
        _check_wide("norm_weight", norm_weight, q)
    return {
        "dropout_p": dropout_p,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "norm_weight": norm_weight,
        "norm_eps": norm_eps,
        "out_scale": out_scale,
    }
