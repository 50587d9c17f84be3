"""The temporal form on the kernels of differential attention, with one map.

A2 is A1 with its columns shifted by one step, so A2 V = A1 next(V), where next(V) holds the values
of the step that follows, and the difference is A1 (alpha · V - lam · next(V)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..._backends.dispatch import Arguments
from . import op
from .formula import Coefficient, compute_dtype, normalise_heads, per_row

Reason = Callable[[Arguments | None], str | None]


def reason_of(kernels: Reason) -> Reason:
    """The predicate of the temporal form on kernels whose own predicate is given."""

    def can_run(arguments: Arguments | None) -> str | None:
        if arguments is None:
            return kernels(None)
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        if not _merges(q, k, arguments["lam"], arguments["alpha"]):
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
    following = _next(v, cu_seqlens, key_padding_mask)
    norm = {"norm_weight": norm_weight, "norm_eps": norm_eps, "out_scale": out_scale}
    no_norm = {"norm_weight": None, "norm_eps": None, "out_scale": 1.0}
    merges = _merges(q, k, lam, alpha)
    values = _merged(v, following, lam, alpha) if merges else torch.cat([v, following], dim=-1)
    options = {
        "alpha": 1.0,
        "key_padding_mask": key_padding_mask,
        "is_causal": False,
        "window": None,
        "dropout_p": dropout_p,
        "scale": scale,
        "return_lse": False,
        "impl": impl,
        **(norm if merges else no_norm),
    }
    if cu_seqlens is None:
        out = op.diff_attention(q, k, None, None, values, None, attn_mask=None, **options)
    else:
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        out = op.diff_attention_varlen(q, k, None, None, values, None, *lengths, **options)
    if merges:
        return out
    compute = compute_dtype(v.dtype)
    first, second = out.to(compute).chunk(2, dim=-1)
    out = per_row(alpha, compute) * first - per_row(lam, compute) * second
    return normalise_heads(out, **norm).to(v.dtype)


def _merges(q: Tensor, k: Tensor, *coefficients: Coefficient) -> bool:
    """Whether queries that share their values share each of the coefficients too."""
    packed, shared = q.dim() == 3, q.shape[1] != k.shape[1]
    for coefficient in coefficients:
        shape = (1, 1, *(coefficient.shape if isinstance(coefficient, Tensor) else ()))
        rows, heads = shape[-2:] if packed else (shape[-1], shape[-2])
        if rows > 1 or (shared and heads > 1):
            return False
    return True


def _merged(v: Tensor, following: Tensor, lam: Coefficient, alpha: Coefficient) -> Tensor:
    """alpha · V - lam · next(V), rounded once."""
    compute = compute_dtype(v.dtype)
    values, following = v.to(compute), following.to(compute)
    if isinstance(alpha, Tensor) or alpha != 1.0:
        values = per_row(alpha, compute) * values
    if isinstance(lam, Tensor):
        values = torch.addcmul(values, per_row(lam, compute), following, value=-1)
    else:
        values = torch.sub(values, following, alpha=lam)
    return values.to(v.dtype)


class _Following(torch.autograd.Function):
    """Rows in another order, by `order`; gradients by the inverse, which needs no sums."""

    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(v, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _rows(grad, inverse), None, None


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of packed (T, H, D) by order (T,), of dense (B, H, L, D) by (B, L)."""
    if order.dim() == 1:
        return x.index_select(0, order)
    return torch.take_along_dim(x, order[:, None, :, None], dim=2)


def _next(v: Tensor, cu_seqlens: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """v of the next present step of the same dialogue, the last one wrapping to the first."""
    if cu_seqlens is not None:
        present = None if key_padding_mask is None else ~key_padding_mask
        return _Following.apply(v, *_steps(cu_seqlens, v.shape[0], present))
    if key_padding_mask is None:
        return v.roll(-1, dims=2)
    batch, length = key_padding_mask.shape
    starts = torch.arange(batch + 1, device=v.device) * length
    order, inverse = (
        steps.view(batch, length) - starts[:-1, None]
        for steps in _steps(starts, batch * length, ~key_padding_mask.flatten())
    )
    return _Following.apply(v, order, inverse)


def _steps(cu_seqlens: Tensor, total: int, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T,) row of the present step after each row in its dialogue, and the inverse order.

    The last one's is the first one; a row that is absent stands for itself.
    """
    starts = cu_seqlens.to(torch.int64)
    row = torch.arange(total, device=starts.device)
    dialogue = torch.searchsorted(starts[1:], row, right=True)  # [T]
    first, end = starts[dialogue], starts[dialogue + 1]
    if present is None:
        following = torch.where(row + 1 == end, first, row + 1)
    else:
        in_order = torch.argsort(~present, stable=True)  # present rows first, in order
        counted = torch.cat(
            [starts.new_zeros(1), present.cumsum(0)]
        )  # present rows before each row
        rank = counted[1:]  # of the next one, if it is of this dialogue
        rank = torch.where(rank < counted[end], rank, counted[first])
        following = torch.where(present, in_order[rank.clamp(max=total - 1)], row)
    return following, torch.empty_like(row).scatter(0, following, row)
