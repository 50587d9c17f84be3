"""Inputs of an `AttentionShape`, their truth, and the ways of rdfkern to compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import rdfkern

from .attention_peers import NAMES, Visible, eager, in_a_loop, joined
from .candidates import Candidate, Run, fresh
from .conversations import conversations
from .shapes import BOTH, AttentionShape

# Score entries of the reference's maps: 2 GiB for a few of them in float64.
LARGEST_TRUTH = 2**25


class AttentionProblem:
    """Dense (B, H, L, D) or packed (T, H, D) inputs; lambda is one learned number per head.

    Where the reference cannot hold all maps, the last queries are checked, with a gradient that is
    zero elsewhere: their output and all gradients are then exactly those of these queries alone.

    Attributes:
        lengths: of packed sequences, None if dense.
        inputs: q1, k1, q2, k2, v, lam; v in parts, (B, Hkv, Lk, P, Dv / P), if the shape has some.
    """

    def __init__(
        self, shape: AttentionShape, device: torch.device, folder: Path | None = None
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, shape.dtype
        self.lengths: list[int] | None = None
        self.source: str | None = None
        if shape.conversations is not None:
            real = conversations(shape.conversations, folder)
            self.lengths, self.source = real.lengths, real.source
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, rows: int, width: int) -> Tensor:
            size = (shape.batch, heads, rows, width)
            if self.lengths is not None:
                size = (sum(self.lengths), heads, width)
            return torch.randn(size, generator=generator).to(device, shape.dtype)

        queries, keys, kv_heads = shape.queries, shape.num_keys, shape.num_kv_heads
        parts = shape.value_parts
        self.inputs = {
            "q1": draw(shape.heads, queries, shape.head_dim),
            "k1": draw(kv_heads, keys, shape.head_dim),
            "q2": draw(shape.heads, queries, shape.head_dim),
            "k2": draw(kv_heads, keys, shape.head_dim),
            "v": draw(kv_heads * parts, keys, shape.value_dim // parts),
            "lam": torch.linspace(0.3, 0.8, shape.heads, device=device),  # [H], float32
        }
        if parts > 1:
            # [B, Hkv, Lk, P, Dv / P]
            self.inputs["v"] = self.inputs["v"].unflatten(1, (parts, -1)).movedim(1, 3)
        self.gradient = draw(shape.heads, queries, shape.value_dim)
        self.checked_gradient, self.rows = self.gradient, queries
        entries = shape.batch * shape.heads * keys
        if self.lengths is None and queries * entries > LARGEST_TRUTH:
            self.rows = max(1, LARGEST_TRUTH // entries)
            self.checked_gradient = self.gradient.clone()
            self.checked_gradient[:, :, : queries - self.rows] = 0

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(B+1,) int32, where packed sequences start."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    def attend(self, inputs: dict[str, Tensor], impl: str) -> Tensor:
        """The operation by an implementation of rdfkern."""
        operation, positional, options = self.call(inputs)
        return getattr(rdfkern, operation)(*positional, **options, impl=impl)

    def call(self, inputs: dict[str, Tensor]) -> tuple[str, tuple, dict]:
        """Name of the public operation and its arguments."""
        tensors = [inputs[name] for name in NAMES]
        options = {"is_causal": self.shape.is_causal, "window": self.shape.window}
        if self.lengths is None:
            return "diff_attention", (*tensors, inputs["lam"][:, None]), options
        starts, longest = self.cu_seqlens, max(self.lengths)
        packed = (*tensors, inputs["lam"], starts, starts, longest, longest)
        return "diff_attention_varlen", packed, options

    def mask(self) -> Tensor | None:
        """bool (Lq, Lk) of the keys that a query of a dense problem sees, None for all."""
        shape, device = self.shape, self.device
        left, right = shape.window or (-1, -1)
        right = 0 if shape.is_causal else right
        if left < 0 and right < 0:
            return None
        place = torch.arange(shape.queries, device=device)[:, None]
        place = place + shape.num_keys - shape.queries
        key = torch.arange(shape.num_keys, device=device)
        seen = key >= (place - left if left >= 0 else 0)
        return seen if right < 0 else seen & (key <= place + right)

    def truth(self) -> dict[str, Tensor]:
        wide = {name: tensor.double() for name, tensor in self.inputs.items()}
        return self._outcome(wide, lambda inputs: self.attend(inputs, "reference"))

    def plain(self) -> dict[str, Tensor]:
        return self._outcome(self.inputs, self._eager)

    def _eager(self, inputs: dict[str, Tensor]) -> Tensor:
        tensors = (inputs[name] for name in NAMES)
        lam = inputs["lam"][:, None, None]
        if self.lengths is not None:
            return in_a_loop(eager, self.lengths, *tensors, lam)
        mask = self.mask()
        visible = Visible(None if mask is None else mask[-self.rows :])
        return eager(*joined(*tensors), lam, visible)

    def _outcome(
        self, inputs: dict[str, Tensor], attend: Callable[[dict[str, Tensor]], Tensor]
    ) -> dict[str, Tensor]:
        leaves = fresh(inputs)
        few, gradient = dict(leaves), self.checked_gradient
        if self.lengths is None:
            few |= {name: leaves[name][:, :, -self.rows :] for name in ("q1", "q2")}
            gradient = gradient[:, :, -self.rows :]
        out = attend(few)
        if BOTH not in self.shape.directions:
            return {"out": out.detach()}
        gradients = torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype))
        return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))

    def observed(self, out: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        checked = out if self.lengths is not None else out[:, :, -self.rows :]
        return {"out": checked.detach()} | gradients

    def useful_flops(self, direction: str) -> float:
        """Of the matrix products that the operation cannot do without, in a fused kernel."""
        shape = self.shape
        forward = 2 * shape.head_dim + 2 * shape.value_dim
        backward = 6 * shape.head_dim + 2 * shape.value_dim
        per_pair = forward + (backward if direction == BOTH else 0)
        return 2.0 * shape.heads * per_pair * self._visible_pairs()

    def _visible_pairs(self) -> int:
        shape = self.shape
        sides = [(n, n) for n in self.lengths or ()]
        sides = sides or [(shape.queries, shape.num_keys)] * shape.batch
        left, right = shape.window or (-1, -1)
        pairs = 0
        for queries, keys in sides:
            place = torch.arange(queries) + keys - queries
            last = place if shape.is_causal else torch.full_like(place, keys - 1)
            last = last if right < 0 else last.minimum(place + right)
            first = torch.zeros_like(place) if left < 0 else place - left
            pairs += int((last.clamp(max=keys - 1) - first.clamp(min=0) + 1).clamp(min=0).sum())
        return pairs

    def reasons(self) -> dict[str, str | None]:
        """Implementations of rdfkern in order of choice, with None or why they cannot run."""
        operation, positional, options = self.call(self.inputs)
        return rdfkern.available_backends(operation, *positional, **options)


def ours(impl: str) -> Candidate:
    """An implementation of rdfkern as a candidate."""

    def prepare(problem: AttentionProblem) -> Run:
        leaves = fresh(problem.inputs)
        return Run(lambda: problem.attend(leaves, impl), leaves)

    return Candidate(f"rdfkern {impl}", prepare, ours=impl)
