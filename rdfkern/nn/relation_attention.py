"""Attention layers over typed relations: R-GAT, and its dot-product form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._backends.checks import check_shape
from ..ops.relation_mp.api import relation_attention, relation_dot_attention, relation_gat
from ..ops.relation_mp.graph import RelationGraph
from .relation import glorot


class RelationAttention(nn.Module):
    """R-GAT layer (Busbridge et al. 2019), or dot-product attention, with a logit per relation.

    Per head: h = x W, a_e = softmax over the edges e = (j -> i) into i of their logits,
    out_i = sum_e a_e h_j. The logits are

    - `additive`: LeakyReLU(att_dst · h_i + att_src · h_j + rel[relation of e]). With
      rel = embedding · a this is ReDiFu's graph attention, where the relation's embedding is
      appended to both nodes' features before the product with the attention vector.
    - `dot`: (x_i query) · (x_j key) / sqrt(out) + rel[relation of e].

    Parameters: weight (in, heads * out), rel (R, heads), bias (heads * out, or out without concat);
    att_dst and att_src (heads, out) of the additive form, query and key (in, heads * out) of the
    dot form, None in the other one.

    Args:
        in_channels: width of x.
        out_channels: width of each head.
        num_relations: R.
        heads: H.
        concat: whether the heads are concatenated; else they are averaged.
        negative_slope: of the LeakyReLU; the dot form has none and takes the default only.
        dropout: probability of dropping an attention weight while training.
        bias: whether to add a bias.
        softmax: `across` all relations, or `within` each of them.
        logits: `additive` or `dot`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_relations: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        bias: bool = True,
        softmax: str = "across",
        logits: str = "additive",
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if softmax not in ("across", "within"):
            raise ValueError(f"softmax must be 'across' or 'within', got {softmax!r}")
        if logits not in ("additive", "dot"):
            raise ValueError(f"logits must be 'additive' or 'dot', got {logits!r}")
        if logits == "dot" and negative_slope != 0.2:
            raise ValueError(
                f"negative_slope belongs to the additive form, got {negative_slope} with "
                f"logits='dot'"
            )
        self.softmax = softmax
        self.logits = logits
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_relations = num_relations
        self.heads = heads
        self.concat = concat
        self.negative_slope = negative_slope
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(in_channels, heads * out_channels))
        self.att_dst = self.att_src = self.query = self.key = None
        if logits == "additive":
            self.att_dst = nn.Parameter(torch.empty(heads, out_channels))
            self.att_src = nn.Parameter(torch.empty(heads, out_channels))
        else:
            self.query = nn.Parameter(torch.empty(in_channels, heads * out_channels))
            self.key = nn.Parameter(torch.empty(in_channels, heads * out_channels))
        self.rel = nn.Parameter(torch.empty(num_relations, heads))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(heads * out_channels if concat else out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters by Glorot's rule; set the bias to 0."""
        names = ("weight", "att_dst", "att_src", "query", "key", "rel")
        for parameter in (getattr(self, name) for name in names):
            if parameter is not None:
                glorot(parameter)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor | tuple[Tensor, Tensor], graph: RelationGraph) -> Tensor:
        """One round of message passing.

        Args:
            x: (N, in), or (x_src (N_src, in), x_dst (N_dst, in)) of a bipartite graph.
            graph: `RelationGraph` with R relations.

        Returns:
            (N_dst, heads * out), or (N_dst, out) without concat.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        x_src, x_dst = x if isinstance(x, tuple | list) else (x, x)
        check_shape("x", x_src, (None, self.in_channels), "(N_src, in)")
        if x_dst is not x_src:
            check_shape("x[1]", x_dst, (None, self.in_channels), "(N_dst, in)")
        out = self._attend(x_src, x_dst, graph)  # [N_dst, H, C]
        out = out.flatten(1) if self.concat else out.mean(dim=1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _attend(self, x_src: Tensor, x_dst: Tensor, graph: RelationGraph) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        value = self._heads_of(x_src, self.weight)
        if self.logits == "dot":
            query, key = self._heads_of(x_dst, self.query), self._heads_of(x_src, self.key)
            return relation_dot_attention(
                query, key, value, self.rel, graph, softmax=self.softmax, dropout_p=dropout_p
            )
        options = {
            "negative_slope": self.negative_slope,
            "softmax": self.softmax,
            "dropout_p": dropout_p,
        }
        if x_dst is x_src:
            return relation_gat(value, self.att_dst, self.att_src, self.rel, graph, **options)
        hearing = self._heads_of(x_dst, self.weight)
        dst, src = (hearing * self.att_dst).sum(dim=-1), (value * self.att_src).sum(dim=-1)
        return relation_attention(value, dst, src, self.rel, graph, **options)

    def _heads_of(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).unflatten(1, (self.heads, self.out_channels))  # [N, H, C]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, num_relations={self.num_relations}, "
            f"heads={self.heads}, logits={self.logits!r}"
        )
