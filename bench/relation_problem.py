"""Inputs of a `RelationShape`, their truth, and the ways of rdfkern to compute them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import rdfkern
from rdfkern import RelationGraph, RelationSpec

from . import relation_by_hand as by_hand
from .candidates import Candidate, Run, check_memory, fresh
from .conversations import conversations
from .relation_by_hand import Edges
from .shapes import BOTH, PAIRS, RANDOM, RelationShape

CHECKED_TARGETS = 256
EMBEDDING_DIM = 10
# What a layer of attention makes of its features.
TRANSFORMED = {"relation_attention": ("h",), "relation_dot_attention": ("query", "key", "value")}
# Index lists that implementations without a kernel make, of an edge: about six of 8 bytes.
BYTES_OF_AN_EDGE = 48


class RelationProblem:
    """A layer: R-GCN with root and bias, or attention, from features to output.

    R-GAT as ReDiFu's: h = x W per head; logits a · [h_i, h_j, embedding of the relation];
    LeakyReLU, softmax over all edges of a target, weighted sum of h. Dot form: query, key and
    value = x W; logits query · key / sqrt(C) + rel. A shape that does not transform starts from h,
    or from query, key and value. Where there are many targets, some are checked, with a gradient
    that is zero elsewhere: the truth needs the edges into these only.

    Attributes:
        graph: what both rdfkern and, through its edges, the peers get.
        inputs: conv: x, weight, root, bias; R-GAT: x and weight (in, H C), or h (N, H, C), with
            a (H, 2 C + 10) and embedding (R, 10); dot form: x and weight (in, 3 H C), or query,
            key and value (N, H, C), with rel (R, H).
    """

    def __init__(
        self, shape: RelationShape, device: torch.device, folder: Path | None = None
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, shape.dtype
        self.source: str | None = None
        generator = torch.Generator().manual_seed(0)
        self.graph = self._graph(generator, folder).to(device)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator)).to(device, shape.dtype)

        nodes, relations = self.graph.num_dst, self.graph.num_relations
        width, out, heads = shape.width, shape.out, shape.heads
        shrink = width**-0.5
        if shape.op == "relation_conv":
            self.inputs = {
                "x": draw(nodes, width),
                "weight": draw(relations, width, out, scale=shrink),
                "root": draw(width, out, scale=shrink),
                "bias": draw(out),
            }
        else:
            channels, names = out // heads, TRANSFORMED[shape.op]
            if shape.transforms:
                weight = draw(width, len(names) * out, scale=shrink)
                self.inputs = {"x": draw(nodes, width), "weight": weight}
            else:
                self.inputs = {name: draw(nodes, heads, channels) for name in names}
            if shape.op == "relation_attention":
                a_size = 2 * channels + EMBEDDING_DIM
                self.inputs["a"] = draw(heads, a_size, scale=channels**-0.5)
                self.inputs["embedding"] = draw(relations, EMBEDDING_DIM)
            else:
                self.inputs["rel"] = draw(relations, heads)
        self.gradient = draw(nodes, out)
        count = min(CHECKED_TARGETS, nodes)
        self.targets = torch.linspace(0, nodes - 1, count, device=device).long()
        self.checked_gradient = torch.zeros_like(self.gradient)
        self.checked_gradient[self.targets] = self.gradient[self.targets]
        self._checked_edges = _edges_into(self.graph, self.targets)

    def _graph(self, generator: torch.Generator, folder: Path | None) -> RelationGraph:
        shape = self.shape
        if shape.rule == RANDOM:
            edges = torch.randint(shape.length, (2, shape.edges), generator=generator)
            kinds = torch.randint(shape.relations, (shape.edges,), generator=generator)
            return RelationGraph.from_edges(edges, kinds, shape.length, shape.relations)
        if shape.conversations is None:
            self.lengths, speakers = [shape.length] * shape.dialogues, shape.speakers
            total = shape.length * shape.dialogues
            keys = torch.randint(speakers, (total,), generator=generator)
        else:
            real = conversations(shape.conversations, folder)
            self.lengths, self.source = real.lengths, real.source
            keys = torch.tensor([speaker for dialogue in real.speakers for speaker in dialogue])
            speakers = int(keys.max()) + 1
        if shape.rule == PAIRS:
            # The speakers' pair and the direction, with a window around the target.
            table = RelationSpec.dialoguegcn(speakers, None, None).table
            spec = RelationSpec(shape.window, shape.window, table, 2 * speakers**2)
        else:
            spec = RelationSpec.redifu_self(speakers, shape.window)
        return spec.bind(keys, torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32))

    @property
    def most_edges(self) -> int:
        """Number of edges of an explicit graph; of a rule, of pairs within its window."""
        if not self.graph.is_implicit:
            return self.shape.edges
        reach = self.shape.window
        return sum(n * (n if reach is None else min(n, 2 * reach + 1)) for n in self.lengths)

    def edges(self, bytes_of_an_edge: float) -> tuple[Tensor, Tensor]:
        """edge_index (2, E) and edge_type (E,), for a candidate that needs so much for each."""
        check_memory(self.most_edges * (bytes_of_an_edge + BYTES_OF_AN_EDGE), self.device)
        return self.graph.to_edges()

    def layer(self, inputs: dict[str, Tensor], graph: RelationGraph, impl: str) -> Tensor:
        """The layer by an implementation of rdfkern."""
        operation, positional, options = self.call(inputs, graph)
        return getattr(rdfkern, operation)(*positional, **options, impl=impl).flatten(1)

    def call(self, inputs: dict[str, Tensor], graph: RelationGraph) -> tuple[str, tuple, dict]:
        """Name of the public operation and its arguments; a bipartite graph's targets are those
        that are checked."""
        if self.shape.op == "relation_conv":
            x = inputs["x"]
            both = x if graph is self.graph else (x, x[self.targets])
            options = {"root_weight": inputs["root"], "bias": inputs["bias"]}
            return "relation_conv", (both, inputs["weight"], graph), options
        transformed = self.transform(inputs)
        if self.shape.op == "relation_dot_attention":
            query, key, value = transformed
            query = query if graph is self.graph else query[self.targets]
            return "relation_dot_attention", (query, key, value, inputs["rel"], graph), {}
        (h,) = transformed
        if graph is self.graph:
            a_dst, a_src, rel = self.vectors(inputs)
            return "relation_gat", (h, a_dst, a_src, rel, graph), {}
        dst, src, rel = self.logits(h, inputs)
        return "relation_attention", (h, dst[self.targets], src, rel, graph), {}

    def transform(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(N, H, C) each: h = x W, or query, key and value."""
        names, heads = TRANSFORMED[self.shape.op], self.shape.heads
        if not self.shape.transforms:
            return tuple(inputs[name] for name in names)
        product = inputs["x"] @ inputs["weight"]
        if len(names) == 1:
            return (product.unflatten(1, (heads, -1)),)
        return product.unflatten(1, (len(names), heads, -1)).unbind(1)

    def vectors(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of a for h_i and h_j, (H, C), and the logits of the relations, (R, H)."""
        channels = self.shape.out // self.shape.heads
        a_dst, a_src, a_rel = inputs["a"].split([channels, channels, EMBEDDING_DIM], dim=1)
        return a_dst, a_src, inputs["embedding"] @ a_rel.T

    def logits(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The three parts of a · [h_i, h_j, embedding]: (N, H), (N, H), (R, H)."""
        a_dst, a_src, rel = self.vectors(inputs)
        return (h * a_dst).sum(2), (h * a_src).sum(2), rel

    def truth(self) -> dict[str, Tensor]:
        source, target, kind = self._checked_edges
        sizes = self.graph.num_src, len(self.targets)
        graph = RelationGraph.from_edges(
            torch.stack([source, target]), kind, sizes, self.graph.num_relations
        )
        wide = {name: tensor.double() for name, tensor in self.inputs.items()}
        return self._outcome(wide, lambda inputs: self.layer(inputs, graph, "reference"))

    def plain(self) -> dict[str, Tensor]:
        edges = Edges(*self._checked_edges, len(self.targets), self.graph.num_relations)

        def compute(inputs: dict[str, Tensor]) -> Tensor:
            if self.shape.op == "relation_conv":
                return by_hand.conv(inputs, inputs["x"][self.targets], edges)
            return self.by_hand(inputs, edges, self.targets)

        return self._outcome(self.inputs, compute)

    def by_hand(
        self, inputs: dict[str, Tensor], edges: Edges, targets: Tensor | None = None
    ) -> Tensor:
        """A layer of attention in plain torch, of some targets or of all."""

        def chosen(rows: Tensor) -> Tensor:
            return rows if targets is None else rows[targets]

        transformed = self.transform(inputs)
        if self.shape.op == "relation_dot_attention":
            query, key, value = transformed
            return by_hand.dot_attention(chosen(query), key, value, inputs["rel"], edges)
        (h,) = transformed
        dst, src, rel = self.logits(h, inputs)
        return by_hand.attention(h, chosen(dst), src, rel, edges)

    def _outcome(
        self, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]
    ) -> dict[str, Tensor]:
        leaves = fresh(inputs)
        out = compute(leaves)
        gradient = self.checked_gradient[self.targets].to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), gradient)
        return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))

    def observed(self, out: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": out.detach()[self.targets]} | gradients

    def useful_flops(self, direction: str) -> float:
        """Of the matrix products, each relation of a target transformed once; sums not counted.

        Numbers of edges are extrapolated from the targets that are checked.
        """
        shape, nodes = self.shape, self.graph.num_dst
        _, target, kind = self._checked_edges
        per_target = nodes / max(1, len(self.targets))
        if shape.op == "relation_conv":
            heard = len(torch.unique(target * self.graph.num_relations + kind)) * per_target
            products = (heard + nodes) * shape.width * shape.out
        else:
            made = len(TRANSFORMED[shape.op])
            transforms = made * nodes * shape.width if shape.transforms else 0
            of_an_edge = 1 if made == 1 else 2
            products = (of_an_edge * len(target) * per_target + transforms) * shape.out
        return 2.0 * products * (3 if direction == BOTH else 1)

    def reasons(self) -> dict[str, str | None]:
        """Implementations of rdfkern in order of choice, with None or why they cannot run."""
        operation, positional, options = self.call(self.inputs, self.graph)
        return rdfkern.available_backends(operation, *positional, **options)


def _edges_into(graph: RelationGraph, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source, number of the target in `targets`, and relation of all edges into some targets."""
    if not graph.is_implicit:
        (source, target), kind = graph.to_edges()
        number = torch.full((graph.num_dst,), -1, device=target.device)
        number[targets] = torch.arange(len(targets), device=target.device)
        kept = number[target] >= 0
        return source[kept], number[target[kept]], kind[kept]
    spec, starts, keys = graph.spec, graph.cu_seqlens.tolist(), graph.keys.cpu().long()
    sources, numbers, kinds = [], [], []
    for number, target in enumerate(targets.tolist()):
        dialogue = next(d for d, stop in enumerate(starts[1:]) if target < stop)
        first, last = starts[dialogue], starts[dialogue + 1] - 1
        first = first if spec.past is None else max(first, target - spec.past)
        last = last if spec.future is None else min(last, target + spec.future)
        source = torch.arange(first, last + 1)
        kind = spec.table[keys[target], keys[source], (source - target).sign() + 1]
        source, kind = source[kind >= 0], kind[kind >= 0]
        sources, kinds = [*sources, source], [*kinds, kind]
        numbers.append(torch.full_like(source, number))
    return tuple(torch.cat(parts).to(targets.device) for parts in (sources, numbers, kinds))


def ours(impl: str) -> Candidate:
    """An implementation of rdfkern as a candidate."""

    def prepare(problem: RelationProblem) -> Run:
        if impl == "torch":
            check_memory(problem.most_edges * BYTES_OF_AN_EDGE, problem.device)
        leaves = fresh(problem.inputs)
        return Run(lambda: problem.layer(leaves, problem.graph, impl), leaves)

    return Candidate(f"rdfkern {impl}", prepare, ours=impl)
