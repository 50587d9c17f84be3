"""The temporal form on the kernels of differential attention: its second map by shifted keys.

One softmax would do for both maps, but the kernels need no padding, no square mask and no copies of
the values, which on dialogues saves more than the second softmax costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._backends.dispatch import Arguments
from . import op
from .formula import Coefficient

Reason = Callable[[Arguments | None], str | None]


def reason_of(kernels: Reason) -> Reason:
    """The predicate of the temporal form on kernels whose own predicate is given."""

    def can_run(arguments: Arguments | None) -> str | None:
        if arguments is None:
            return kernels(None)
        if arguments["dropout_p"] > 0.0:
            return "draws the dropout of both maps apart, and here the second drops what the first"
        return kernels({"q1": arguments["q"], "v": arguments["v"], "attn_mask": None})

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
    """`diff_attention` with q2 = q and k2 the keys of the step before, by the kernel `impl`."""
    options = {
        "alpha": alpha,
        "key_padding_mask": key_padding_mask,
        "is_causal": False,
        "window": None,
        "dropout_p": dropout_p,
        "scale": scale,
        "norm_weight": norm_weight,
        "norm_eps": norm_eps,
        "out_scale": out_scale,
        "return_lse": False,
        "impl": impl,
    }
    if cu_seqlens is not None:
        present = None if key_padding_mask is None else ~key_padding_mask
        before = k.index_select(0, _step_before(cu_seqlens, k.shape[0], present))
        return op.diff_attention_varlen(
            q, k, q, before, v, lam, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
        )
    if key_padding_mask is None:
        before = k.roll(1, dims=2)
    else:
        batch, length = key_padding_mask.shape
        starts = torch.arange(batch + 1, device=k.device) * length
        step = _step_before(starts, batch * length, ~key_padding_mask.flatten())
        step = step.view(batch, length) - starts[:-1, None]  # [B, L]
        before = k.gather(2, step[:, None, :, None].expand_as(k))
    return op.diff_attention(q, k, q, before, v, lam, attn_mask=None, **options)


def _step_before(cu_seqlens: Tensor, total: int, present: Tensor | None) -> Tensor:
    """(T,) row of the present step before each row in its dialogue, the first one's being the last.

    What an absent row gets lies in its dialogue, and does not matter.
    """
    starts = cu_seqlens.to(torch.int64)
    row = torch.arange(total, device=starts.device)
    dialogue = torch.searchsorted(starts[1:], row, right=True)  # [T]
    first, last = starts[dialogue], starts[dialogue + 1] - 1
    if present is None:
        return torch.where(row == first, last, row - 1)
    in_order = torch.argsort(~present, stable=True)  # present rows first, in order
    counted = torch.cat([starts.new_zeros(1), present.cumsum(0)])  # present rows before each row
    rank = counted[:-1] - 1
    rank = torch.where(rank < counted[first], counted[last + 1] - 1, rank)
    return torch.where(present, in_order[rank.clamp(min=0)], row)
