"""How differential attention is computed without this package.

Every function takes q1, k1, q2, k2, v, lam (H, 1, 1) and `Visible`, and is written as a user of
torch would write it; `attention_candidates` makes candidates of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .candidates import Unsuitable


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees.

    Attributes:
        mask: bool, broadcasts to (B, H, Lq, Lk), or None for all (or all earlier ones).
        is_causal: queries and keys are equally many and a query sees no later key; then `mask`
            is None, so that SDPA may take the causal path of its kernels.
        block_mask: the same for FlexAttention, or None.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    block_mask: Any = None


NAMES = ("q1", "k1", "q2", "k2", "v")
Peer = Callable[..., Tensor]


def eager(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, visible: Visible
) -> Tensor:
    """Two softmax maps, their difference, one product: the formula, in the inputs' dtype."""
    group = q1.shape[1] // k1.shape[1]
    k1, k2, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k1, k2, v))
    hidden = None if visible.mask is None else ~visible.mask
    if visible.is_causal:
        hidden = torch.ones(q1.shape[2], k1.shape[2], dtype=torch.bool, device=q1.device).triu(1)

    def weights(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1)

    return (weights(q1, k1) - lam.to(v.dtype) * weights(q2, k2)) @ v


def joined(*tensors: Tensor) -> Iterator[Tensor]:
    """(B, H, L, D) each, of which a value may come in parts, (B, H, L, P, D / P)."""
    return (tensor.flatten(3) for tensor in tensors)


def two_calls(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, visible: Visible
) -> Tensor:
    """Two SDPA calls with the whole value."""
    return _sdpa(q1, k1, v, visible) - lam.to(v.dtype) * _sdpa(q2, k2, v, visible)


def four_calls(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, visible: Visible
) -> Tensor:
    """Two SDPA calls for each half of the value, so that its width is the head dim.

    The value may come in halves, (B, Hkv, Lk, 2, Dv / 2).
    """
    halves = _halves(v)
    first = torch.cat([_sdpa(q1, k1, half, visible) for half in halves], dim=-1)
    second = torch.cat([_sdpa(q2, k2, half, visible) for half in halves], dim=-1)
    return first - lam.to(v.dtype) * second


def two_padded_calls(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, visible: Visible
) -> Tensor:
    """Two SDPA calls with queries and keys zero-padded to the width of the value."""
    scale = q1.shape[-1] ** -0.5
    q1, k1, q2, k2 = _widen(v.shape[-1], q1, k1, q2, k2)
    first = _sdpa(q1, k1, v, visible, scale)
    return first - lam.to(v.dtype) * _sdpa(q2, k2, v, visible, scale)


def one_padded_call(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, visible: Visible
) -> Tensor:
    """The same as one call, both maps stacked on the head axis."""
    scale = q1.shape[-1] ** -0.5
    q1, k1, q2, k2 = _widen(v.shape[-1], q1, k1, q2, k2)
    stacked = (torch.cat(pair, dim=1) for pair in ((q1, q2), (k1, k2), (v, v)))
    first, second = _sdpa(*stacked, visible, scale).chunk(2, dim=1)
    return first - lam.to(v.dtype) * second


def in_a_loop(
    peer: Peer,
    lengths: list[int],
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
) -> Tensor:
    """A peer on packed (T, H, D), one call for each sequence."""
    split = (tensor.split(lengths) for tensor in (q1, k1, q2, k2, v))
    outs = [
        peer(*(part.transpose(0, 1)[None] for part in parts), lam, Visible())
        for parts in zip(*split, strict=True)
    ]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


# Under their names in reports.
SDPA_PEERS: dict[str, Peer] = {
    "2 SDPA calls": two_calls,
    "4 SDPA calls on value halves": four_calls,
    "2 SDPA calls, D padded to Dv": two_padded_calls,
    "1 SDPA call, D padded to Dv": one_padded_call,
}
GPU_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def with_backend(peer: Peer, backend: SDPBackend) -> Peer:
    """The peer with one implementation of SDPA, which raises where it cannot run."""

    def chosen(*arguments: Any) -> Tensor:
        with sdpa_kernel(backend):
            return peer(*arguments)

    return chosen


def flex(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, visible: Visible
) -> Tensor:
    """Two FlexAttention calls, compiled by themselves, which skip the blocks that are masked."""
    compiled = _compiled_flex()
    grouped = q1.shape[1] != k1.shape[1]

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=visible.block_mask, enable_gqa=grouped)

    return attend(q1, k1) - lam.to(v.dtype) * attend(q2, k2)


def block_mask(
    queries: int,
    keys: int,
    is_causal: bool,
    window: tuple[int, int] | None,
    lengths: Tensor | None,
    device: torch.device,
) -> Any:
    """Block mask of FlexAttention; `lengths` (B,) hides padding keys of each sequence."""
    if not is_causal and window is None and lengths is None:
        return None
    left, right = window or (-1, -1)
    right = 0 if is_causal else right

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = q + (keys - queries)
        kept = k >= (place - left if left >= 0 else 0)
        kept = kept & (k <= (place + right if right >= 0 else keys))
        return kept if lengths is None else kept & (k < lengths[b])

    batch = None if lengths is None else len(lengths)
    return create_block_mask(seen, batch, None, queries, keys, device=device)


def flash_four_calls(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    causal: bool,
    window: tuple[int, int] | None,
) -> Tensor:
    """FlashAttention on (B, L, H, D): a call for each map and half of the value.

    The value may come in halves, (B, Lk, Hkv, 2, Dv / 2).
    """
    flash = flash_attention().flash_attn_func
    options = {"causal": causal, "window_size": window or (-1, -1)}
    halves = _halves(v)
    first = torch.cat([flash(q1, k1, half, **options) for half in halves], dim=-1)
    second = torch.cat([flash(q2, k2, half, **options) for half in halves], dim=-1)
    return first - lam.to(v.dtype) * second


def flash_varlen_four_calls(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    starts: Tensor,
    longest: int,
) -> Tensor:
    """The same on packed (T, H, D)."""
    flash = flash_attention().flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, half: Tensor) -> Tensor:
        return flash(q, k, half, starts, starts, longest, longest)

    halves = v.chunk(2, dim=-1)
    first = torch.cat([attend(q1, k1, half) for half in halves], dim=-1)
    second = torch.cat([attend(q2, k2, half) for half in halves], dim=-1)
    return first - lam.to(v.dtype) * second


def flash_attention() -> Any:
    """The flash-attn package; raises `Unsuitable` where it is not installed."""
    try:
        import flash_attn
    except ImportError as error:
        raise Unsuitable(f"flash-attn is not installed ({error})") from None
    return flash_attn


@cache
def _compiled_flex() -> Peer:
    return torch.compile(flex_attention, dynamic=False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible.mask,
        is_causal=visible.is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _halves(v: Tensor) -> tuple[Tensor, ...]:
    return v.unbind(3) if v.dim() == 5 else v.chunk(2, dim=-1)


def _widen(width: int, *tensors: Tensor) -> Iterator[Tensor]:
    return (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors)
