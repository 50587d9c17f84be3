"""The values of the temporal form: its second map is the first one with shifted columns.

A2[i, j] = A1[i, j - 1], with the step before the first one of a dialogue being its last. So
A2 V = A1 next(V), where next(V) holds the values of the step that follows, and

    alpha · A1 V - lam · A2 V = A1 (alpha · V - lam · next(V))

where all queries that share their values share lam and alpha as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formula import Coefficient, compute_dtype, per_row


def merges(q: Tensor, k: Tensor, *coefficients: Coefficient) -> bool:
    """Whether queries that share their values share each of the coefficients too."""
    packed, shared = q.dim() == 3, q.shape[1] != k.shape[1]
    for coefficient in coefficients:
        shape = (1, 1, *(coefficient.shape if isinstance(coefficient, Tensor) else ()))
        rows, heads = shape[-2:] if packed else (shape[-1], shape[-2])
        if rows > 1 or (shared and heads > 1):
            return False
    return True


def mapped_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Coefficient,
    alpha: Coefficient,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, bool]:
    """What A1 is applied to: alpha · V - lam · next(V), rounded once, and True.

    Where they do not merge: V and next(V) side by side, and False; see `difference`.
    """
    following = next_values(v, cu_seqlens, key_padding_mask)
    if not merges(q, k, lam, alpha):
        return torch.cat([v, following], dim=-1), False
    compute = compute_dtype(v.dtype)
    values, following = v.to(compute), following.to(compute)
    if isinstance(alpha, Tensor) or alpha != 1.0:
        values = per_row(alpha, compute) * values
    if isinstance(lam, Tensor):
        values = torch.addcmul(values, per_row(lam, compute), following, value=-1)
    else:
        values = torch.sub(values, following, alpha=lam)
    return values.to(v.dtype), True


def difference(both: Tensor, lam: Coefficient, alpha: Coefficient) -> Tensor:
    """alpha · A1 V - lam · A1 next(V), wide, of the two side by side."""
    compute = compute_dtype(both.dtype)
    first, second = both.to(compute).chunk(2, dim=-1)
    return per_row(alpha, compute) * first - per_row(lam, compute) * second


def next_values(v: Tensor, cu_seqlens: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """v of the next present step of the same dialogue, the last one wrapping to the first.

    Args:
        v: (B, H, L, Dv), or packed (T, H, Dv) with `cu_seqlens`.
        key_padding_mask: (B, L) or (T,), True for absent steps. What these get does not matter.
    """
    if cu_seqlens is not None:
        present = None if key_padding_mask is None else ~key_padding_mask
        return v.index_select(0, _next_steps(cu_seqlens, v.shape[0], present))
    if key_padding_mask is None:
        return v.roll(-1, dims=2)
    batch, length = key_padding_mask.shape
    starts = torch.arange(batch + 1, device=v.device) * length
    steps = _next_steps(starts, batch * length, ~key_padding_mask.flatten())
    steps = steps.view(batch, length) - starts[:-1, None]  # [B, L]
    return torch.take_along_dim(v, steps[:, None, :, None], dim=2)


def _next_steps(cu_seqlens: Tensor, total: int, present: Tensor | None) -> Tensor:
    """(T,) row of the present step after each row in its dialogue, the last one's being the first.

    A row that is absent stands for itself.
    """
    starts = cu_seqlens.to(torch.int64)
    row = torch.arange(total, device=starts.device)
    dialogue = torch.searchsorted(starts[1:], row, right=True)  # [T]
    first, end = starts[dialogue], starts[dialogue + 1]
    if present is None:
        return torch.where(row + 1 == end, first, row + 1)
    in_order = torch.argsort(~present, stable=True)  # present rows first, in order
    counted = torch.cat([starts.new_zeros(1), present.cumsum(0)])  # present rows before each row
    rank = counted[1:]  # of the next one, if it is of this dialogue
    rank = torch.where(rank < counted[end], rank, counted[first])
    return torch.where(present, in_order[rank.clamp(max=total - 1)], row)
