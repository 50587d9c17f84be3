"""Dense layout and key mask that both implementations compute in."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..masks import band_mask
from ..packing import Packing


def dense_layout(
    q: Tensor,
    k: Tensor,
    z0: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    window: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Dense q, k, z0, which keys each query sees, and the way back to the caller's layout.

    Returns:
        q, k (B, H, L, D), z0 (B, H, L, Dz); visible, bool with four dimensions that broadcast to
        (B, H, L, L), or None for all; restore, which maps (B, H, L, Dz) to the layout of z0.
    """
    keys = None if key_padding_mask is None else ~key_padding_mask

    def restore(z: Tensor) -> Tensor:
        return z

    if cu_seqlens is not None:
        packing = Packing.from_cu_seqlens(cu_seqlens, q.shape[0], max_seqlen)
        q, k, z0 = (packing.pad(tensor).transpose(1, 2) for tensor in (q, k, z0))
        keys = packing.valid if keys is None else packing.pad(keys)

        def restore(z: Tensor) -> Tensor:
            return packing.unpad(z.transpose(1, 2))

    length = q.shape[2]
    band = band_mask(length, length, is_causal=False, window=window, device=q.device)
    visible = None if band is None else band[None, None]  # [1, 1, L, L]
    if keys is not None:
        keys = keys[:, None, None, :]  # [B, 1, 1, L]
        visible = keys if visible is None else visible & keys
    return q, k, z0, visible, restore
