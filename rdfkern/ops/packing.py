"""Between packed rows (T, ...) with cu_seqlens and padded rows (B, L, ...), without a host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where each packed row stands in the padded layout.

    sequence: (T,) int64, the sequence of a packed row.
    position: (T,) int64, its position in that sequence.
    valid: (B, L) bool, True where a padded slot holds a packed row.
    """

    sequence: Tensor
    position: Tensor
    valid: Tensor

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, total: int, max_seqlen: int, *, flush_right: bool = False
    ) -> Packing:
        """Where the rows of `cu_seqlens` go.

        Args:
            cu_seqlens: (B+1,).
            total: T packed rows.
            max_seqlen: L of the padded layout.
            flush_right: the sequences end, rather than start, together.
        """
        cu = cu_seqlens.to(torch.int64)
        row = torch.arange(total, device=cu.device)
        sequence = torch.searchsorted(cu[1:], row, right=True)  # [T]
        slot = torch.arange(max_seqlen, device=cu.device)
        if flush_right:
            free = max_seqlen - cu.diff()  # [B]
            return cls(sequence, row - cu[sequence] + free[sequence], slot >= free[:, None])
        return cls(sequence, row - cu[sequence], slot < cu.diff()[:, None])

    def pad(self, packed: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...), zeros in the free slots; differentiable."""
        batch, length = self.valid.shape
        padded = packed.new_zeros((batch * length, *packed.shape[1:]))
        padded = padded.index_copy(0, self.sequence * length + self.position, packed)
        return padded.view(batch, length, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, L, ...) back to (T, ...); differentiable."""
        return padded[self.sequence, self.position]
