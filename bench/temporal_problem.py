"""Inputs of a `TemporalShape`, their truth, and everybody's ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rdfkern
from rdfkern._backends.dispatch import CHAINS

from .candidates import Candidate, Run, fresh
from .conversations import conversations
from .shapes import BOTH, TemporalShape

Peer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class TemporalProblem:
    """Dense (B, H, L, D) or packed (T, H, D) inputs; lambda is one learned number, as in ReDiFu.

    Attributes:
        lengths: of packed dialogues, None if dense.
        inputs: q, k, v, lam.
    """

    def __init__(
        self, shape: TemporalShape, device: torch.device, folder: Path | None = None
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
        self.inputs |= {"v": draw(shape.value_dim), "lam": torch.tensor(0.5, device=device)}
        self.gradient = self.checked_gradient = draw(shape.value_dim)

    def call(self, inputs: dict[str, Tensor]) -> tuple[str, tuple, dict]:
        """Name of the public operation and its arguments."""
        options = {}
        if self.lengths is not None:
            starts = torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)
            options = {"cu_seqlens": starts, "max_seqlen": max(self.lengths)}
        return "temporal_diff_attention", tuple(inputs.values()), options

    def attend(self, inputs: dict[str, Tensor], impl: str) -> Tensor:
        """The operation by an implementation of rdfkern."""
        operation, positional, options = self.call(inputs)
        return getattr(rdfkern, operation)(*positional, **options, impl=impl)

    def by_peer(self, inputs: dict[str, Tensor], peer: Peer) -> Tensor:
        """A peer, dialogue by dialogue: the key before the first step is that dialogue's last."""
        *tensors, lam = inputs.values()
        lam = lam.to(self.dtype)
        if self.lengths is None:
            return peer(*tensors, lam)
        split = (tensor.split(self.lengths) for tensor in tensors)
        outs = [
            peer(*(part.transpose(0, 1)[None] for part in parts), lam)
            for parts in zip(*split, strict=True)
        ]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def truth(self) -> dict[str, Tensor]:
        wide = {name: tensor.double() for name, tensor in self.inputs.items()}
        return self._outcome(wide, lambda inputs: self.attend(inputs, "reference"))

    def plain(self) -> dict[str, Tensor]:
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
        """Of the matrix products of one map, which is all that a fused kernel needs."""
        shape = self.shape
        per_pair = shape.head_dim + shape.value_dim
        if direction == BOTH:
            per_pair += 3 * shape.head_dim + 2 * shape.value_dim
        lengths = self.lengths or [shape.length] * shape.batch
        return 2.0 * shape.heads * per_pair * sum(length**2 for length in lengths)

    def reasons(self) -> dict[str, str | None]:
        """Implementations of rdfkern in order of choice, with None or why they cannot run."""
        operation, positional, options = self.call(self.inputs)
        return rdfkern.available_backends(operation, *positional, **options)


def eager(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Two softmax maps, their difference, one product: as ReDiFu is released."""
    scale = q.shape[-1] ** -0.5
    first, second = ((q @ keys.mT * scale).softmax(-1) for keys in (k, k.roll(1, dims=2)))
    return (first - lam * second) @ v


def two_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    attend = F.scaled_dot_product_attention
    return attend(q, k, v) - lam * attend(q, k.roll(1, dims=2), v)


def one_call(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """One softmax map, of values from which the next step's are subtracted beforehand."""
    return F.scaled_dot_product_attention(q, k, v - lam * v.roll(-1, dims=2))


PEERS: dict[str, Peer] = {
    "eager": eager,
    "2 SDPA calls": two_calls,
    "1 SDPA call, values subtracted": one_call,
}


def ours(impl: str) -> Candidate:
    """An implementation of rdfkern as a candidate."""

    def prepare(problem: TemporalProblem) -> Run:
        leaves = fresh(problem.inputs)
        return Run(lambda: problem.attend(leaves, impl), leaves)

    return Candidate(f"rdfkern {impl}", prepare, ours=impl)


def candidates(shape: TemporalShape, device: torch.device) -> list[Candidate]:
    """All that the shape has a use for on a kind of device."""

    def of(peer: Peer) -> Callable[[TemporalProblem], Run]:
        def prepare(problem: TemporalProblem) -> Run:
            leaves = fresh(problem.inputs)
            return Run(lambda: problem.by_peer(leaves, peer), leaves)

        return prepare

    prefix = "" if shape.conversations is None else "loop: "
    found = [ours(impl) for impl in CHAINS[device.type] if impl != "reference"]
    return found + [Candidate(prefix + name, of(peer)) for name, peer in PEERS.items()]
