"""Inputs of a `OneMapShape`, their truth, and everybody's ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rdfkern
from rdfkern._backends.dispatch import CHAINS
from rdfkern.ops.masks import band_mask

from .candidates import Candidate, Run, fresh
from .conversations import conversations
from .shapes import BOTH, OneMapShape

TEMPORAL = "temporal_diff_attention"
RESTART = 0.2
Peer = Callable[..., Tensor]


class OneMapProblem:
    """Dense (B, H, L, D) or packed (T, H, D) inputs.

    Attributes:
        lengths: of packed dialogues, None if dense.
        inputs: q, k, v, and of the temporal form lam, one learned number as in ReDiFu. The v of
            the diffusion is what it spreads.
        settings: what peers of the diffusion get besides: steps, and visible (L, L) or None.
    """

    def __init__(
        self, shape: OneMapShape, device: torch.device, folder: Path | None = None
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, shape.dtype
        self.lengths: list[int] | None = None
        self.source: str | None = None
        if shape.conversations is not None:
            real = conversations(shape.conversations, folder)
            self.lengths, self.source = real.lengths, real.source
        generator = torch.Generator().manual_seed(0)

        def draw(width: int) -> Tensor:
            size = (shape.batch, shape.heads, shape.length, width)
            if self.lengths is not None:
                size = (sum(self.lengths), shape.heads, width)
            return torch.randn(size, generator=generator).to(device, shape.dtype)

        self.inputs = {"q": draw(shape.head_dim), "k": draw(shape.head_dim)}
        self.inputs |= {"v": draw(shape.value_dim)}
        if shape.op == TEMPORAL:
            self.inputs |= {"lam": torch.tensor(0.5, device=device)}
        self.gradient = self.checked_gradient = draw(shape.value_dim)
        self.settings: dict[str, Any] = {}
        if shape.op != TEMPORAL:
            band = band_mask(
                shape.length, shape.length, is_causal=False, window=shape.window, device=device
            )
            self.settings = {"steps": shape.steps, "visible": band}

    @cached_property
    def packing(self) -> dict[str, Any]:
        """What the operations take beside packed inputs, nothing if they are dense."""
        if self.lengths is None:
            return {}
        starts = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)
        return {"cu_seqlens": starts, "max_seqlen": max(self.lengths)}

    def call(self, inputs: dict[str, Tensor]) -> tuple[str, tuple, dict]:
        """Name of the public operation and its arguments."""
        options = dict(self.packing)
        if self.shape.op != TEMPORAL:
            options |= {"steps": self.shape.steps, "restart": RESTART, "window": self.shape.window}
        return self.shape.op, tuple(inputs.values()), options

    def attend(self, inputs: dict[str, Tensor], impl: str) -> Tensor:
        """The operation by an implementation of rdfkern."""
        operation, positional, options = self.call(inputs)
        return getattr(rdfkern, operation)(*positional, **options, impl=impl)

    def by_peer(self, inputs: dict[str, Tensor], peer: Peer) -> Tensor:
        """A peer, of packed inputs dialogue by dialogue."""
        q, k, v, *lam = (x.to(self.dtype) if x.dim() == 0 else x for x in inputs.values())
        if self.lengths is None:
            return peer(q, k, v, *lam, **self.settings)
        split = (tensor.split(self.lengths) for tensor in (q, k, v))
        outs = [
            peer(*(part.transpose(0, 1)[None] for part in parts), *lam, **self.settings)
            for parts in zip(*split, strict=True)
        ]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def truth(self) -> dict[str, Tensor]:
        wide = {name: tensor.double() for name, tensor in self.inputs.items()}
        return self._outcome(wide, lambda inputs: self.attend(inputs, "reference"))

    def plain(self) -> dict[str, Tensor]:
        eager = PEERS[self.shape.op]["eager"]
        return self._outcome(self.inputs, lambda inputs: self.by_peer(inputs, eager))

    def _outcome(
        self, inputs: dict[str, Tensor], attend: Callable[[dict[str, Tensor]], Tensor]
    ) -> dict[str, Tensor]:
        leaves = fresh(inputs)
        out = attend(leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.gradient.to(out.dtype))
        return self.observed(out, dict(zip(leaves, gradients, strict=True)))

    def observed(self, out: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": out.detach()} | gradients

    def useful_flops(self, direction: str) -> float:
        """Of the matrix products with a map that is kept: scores once, values in every step."""
        shape, steps = self.shape, self.shape.steps or 1
        per_pair = shape.head_dim + steps * shape.value_dim
        if direction == BOTH:
            per_pair += 2 * shape.head_dim + 2 * steps * shape.value_dim
        pairs = sum(length**2 for length in self.lengths or [shape.length] * shape.batch)
        visible = self.settings.get("visible")
        if visible is not None and self.lengths is None:
            pairs = shape.batch * int(visible.sum())
        return 2.0 * shape.heads * per_pair * pairs

    def reasons(self) -> dict[str, str | None]:
        """Implementations of rdfkern in order of choice, with None or why they cannot run."""
        operation, positional, options = self.call(self.inputs)
        return rdfkern.available_backends(operation, *positional, **options)


def temporal_eager(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Two softmax maps, their difference, one product: as ReDiFu is released."""
    scale = q.shape[-1] ** -0.5
    first, second = ((q @ keys.mT * scale).softmax(-1) for keys in (k, k.roll(1, dims=2)))
    return (first - lam * second) @ v


def temporal_two_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    attend = F.scaled_dot_product_attention
    return attend(q, k, v) - lam * attend(q, k.roll(1, dims=2), v)


def temporal_one_call(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """One softmax map, of values from which the next step's are subtracted beforehand."""
    return F.scaled_dot_product_attention(q, k, v - lam * v.roll(-1, dims=2))


def diffusion_eager(
    q: Tensor, k: Tensor, v: Tensor, *, steps: int, visible: Tensor | None
) -> Tensor:
    """The map is made once and kept."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights, z = scores.softmax(-1), v
    for _ in range(steps):
        z = torch.lerp(weights @ z, v, RESTART)
    return z


def diffusion_calls(
    q: Tensor, k: Tensor, v: Tensor, *, steps: int, visible: Tensor | None
) -> Tensor:
    z = v
    for _ in range(steps):
        z = torch.lerp(F.scaled_dot_product_attention(q, k, z, attn_mask=visible), v, RESTART)
    return z


PEERS: dict[str, dict[str, Peer]] = {
    TEMPORAL: {
        "eager": temporal_eager,
        "2 SDPA calls": temporal_two_calls,
        "1 SDPA call, values subtracted": temporal_one_call,
    },
    "diffusion_attention": {"eager": diffusion_eager, "1 SDPA call a step": diffusion_calls},
}


def ours(impl: str) -> Candidate:
    """An implementation of rdfkern as a candidate."""

    def prepare(problem: OneMapProblem) -> Run:
        leaves = fresh(problem.inputs)
        return Run(lambda: problem.attend(leaves, impl), leaves)

    return Candidate(f"rdfkern {impl}", prepare, ours=impl)


def candidates(shape: OneMapShape, device: torch.device) -> list[Candidate]:
    """All that the shape has a use for on a kind of device."""

    def of(peer: Peer) -> Callable[[OneMapProblem], Run]:
        def prepare(problem: OneMapProblem) -> Run:
            leaves = fresh(problem.inputs)
            return Run(lambda: problem.by_peer(leaves, peer), leaves)

        return prepare

    prefix = "" if shape.conversations is None else "loop: "
    found = [ours(impl) for impl in CHAINS[device.type] if impl != "reference"]
    return found + [Candidate(prefix + name, of(peer)) for name, peer in PEERS[shape.op].items()]
