"""The layers in torch alone, on a list of edges: a peer, and what errors are counted in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """Source, target and relation of every edge, and how many targets and relations there are."""

    source: Tensor
    target: Tensor
    kind: Tensor
    num_dst: int
    num_relations: int

    @property
    def rows(self) -> int:
        """Pairs of a target and a relation."""
        return self.num_dst * self.num_relations

    @cached_property
    def place(self) -> Tensor:
        """(E,), the pair of every edge."""
        return self.target * self.num_relations + self.kind

    @cached_property
    def counts(self) -> Tensor:
        """(rows, 1), edges of every pair, at least 1."""
        return torch.bincount(self.place, minlength=self.rows).clamp(min=1)[:, None]


def conv(inputs: dict[str, Tensor], x_dst: Tensor, edges: Edges) -> Tensor:
    """Means by (target, relation), then one product with all weights."""
    x = inputs["x"]
    sums = x.new_zeros(edges.rows, x.shape[1]).index_add(0, edges.place, x[edges.source])
    return one_product(inputs, x_dst, sums / edges.counts.to(x.dtype))


def one_product(inputs: dict[str, Tensor], x_dst: Tensor, means: Tensor) -> Tensor:
    """Means (N_dst R, in) through all weights at once, with root and bias."""
    heard = means.view(x_dst.shape[0], -1) @ inputs["weight"].flatten(0, 1)
    return heard + x_dst @ inputs["root"] + inputs["bias"]


def attention(h: Tensor, dst: Tensor, src: Tensor, rel: Tensor, edges: Edges) -> Tensor:
    """R-GAT over the edges of a target: (N_dst, H C)."""
    logits = dst[edges.target] + src[edges.source] + rel[edges.kind]  # [E, H]
    return _attend(F.leaky_relu(logits, 0.2), h, edges)


def dot_attention(query: Tensor, key: Tensor, value: Tensor, rel: Tensor, edges: Edges) -> Tensor:
    """The dot form: (N_dst, H C)."""
    logits = (query[edges.target] * key[edges.source]).sum(2) * query.shape[2] ** -0.5
    return _attend(logits + rel[edges.kind], value, edges)


def _attend(logits: Tensor, value: Tensor, edges: Edges) -> Tensor:
    """Softmax over the edges of a target, and the weighted sum of their sources' values."""
    target = edges.target
    index = target[:, None].expand_as(logits)
    largest = logits.new_full((edges.num_dst, logits.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, index, logits.detach(), "amax")
    weights = (logits - largest[target]).exp()
    weights = weights / torch.zeros_like(largest).index_add(0, target, weights)[target]
    messages = weights[:, :, None] * value[edges.source]
    return (
        value.new_zeros(edges.num_dst, *value.shape[1:]).index_add(0, target, messages).flatten(1)
    )
