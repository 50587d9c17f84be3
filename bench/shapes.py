"""The shapes that are measured, and that tests may draw from."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import torch

FORWARD, BOTH = "forward", "forward+backward"
PAIRS, REDIFU, RANDOM = "pairs", "redifu", "random"


@dataclass(frozen=True)
class AttentionShape:
    """A problem of differential attention; D is the head dim of one map, Dv that of the value.

    Attributes:
        name: unique among all shapes.
        group: which of `GROUPS` it belongs to.
        conversations: a kind of `bench.conversations`, whose lengths make a packed batch instead
            of `batch` sequences of `queries` and `keys`.
        window: keys on each side that a query sees, or None.
        value_parts: in how many the value lies in memory, one head after another, as in the cache
            of a DiffLlama.
        compiled: whether peers are also measured under torch.compile.
        directions: what is measured; decoding has no backward.
    """

    name: str
    _: KW_ONLY
    group: str
    batch: int = 1
    heads: int = 4
    kv_heads: int | None = None
    queries: int = 2048
    keys: int | None = None
    head_dim: int = 64
    value_dim: int = 128
    value_parts: int = 1
    is_causal: bool = False
    window: tuple[int, int] | None = None
    conversations: str | None = None
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    directions: tuple[str, ...] = (FORWARD, BOTH)
    op: str = field(default="diff_attention", init=False)

    @property
    def num_keys(self) -> int:
        return self.keys or self.queries

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def numbers(self) -> dict[str, Any]:
        """What the shape consists of, for reports."""
        if self.conversations is None:
            numbers = {"B": self.batch, "Lq": self.queries, "Lk": self.num_keys}
        else:
            numbers = {"lengths": self.conversations}
        numbers |= {"H": self.heads, "D": self.head_dim, "Dv": self.value_dim}
        if self.num_kv_heads != self.heads:
            numbers["Hkv"] = self.num_kv_heads
        if self.value_parts > 1:
            numbers["P"] = self.value_parts
        if self.is_causal:
            numbers["causal"] = True
        if self.window is not None:
            numbers["window"] = f"{self.window[0]}+{self.window[1]}"
        return numbers


@dataclass(frozen=True)
class OneMapShape:
    """A problem with one softmax map: ReDiFu's temporal attention, or attention diffusion.

    Attributes:
        name: unique among all shapes.
        op: `temporal_diff_attention` or `diffusion_attention`.
        group: as in `AttentionShape`.
        window: of the diffusion of dense sequences, or None.
        steps: of the diffusion, where they are needed.
        conversations: a kind of `bench.conversations`, whose lengths make a packed batch instead
            of `batch` sequences of `length`.
    """

    name: str
    _: KW_ONLY
    op: str
    group: str
    batch: int = 1
    heads: int = 4
    length: int = 2048
    head_dim: int = 64
    value_dim: int = 64
    window: tuple[int, int] | None = None
    steps: int | None = None
    conversations: str | None = None
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = (FORWARD, BOTH)

    def __post_init__(self) -> None:
        diffuses = self.op == "diffusion_attention"
        if diffuses != (self.steps is not None):
            raise ValueError(f"steps must be given for the diffusion alone, got {self.steps}")
        if self.window is not None and (not diffuses or self.conversations is not None):
            raise ValueError(f"window is for the diffusion of dense sequences, got {self.window}")

    def numbers(self) -> dict[str, Any]:
        """What the shape consists of, for reports."""
        if self.conversations is None:
            numbers = {"B": self.batch, "L": self.length}
        else:
            numbers = {"lengths": self.conversations}
        numbers |= {"H": self.heads, "D": self.head_dim, "Dv": self.value_dim}
        if self.window is not None:
            numbers["window"] = f"{self.window[0]}+{self.window[1]}"
        return numbers if self.steps is None else numbers | {"steps": self.steps}


@dataclass(frozen=True)
class RelationShape:
    """A layer of relation message passing.

    Attributes:
        name: unique among all shapes.
        op: `relation_conv`, `relation_attention` or `relation_dot_attention`.
        group: as in `AttentionShape`.
        rule: `pairs` (speaker of source, speaker of target, direction: 2 S² relations), `redifu`
            (ReDiFu's intra-speaker graph), or `random` for an explicit list of edges.
        dialogues, length: a batch of equal dialogues with speakers drawn at random; `random` has
            `length` nodes.
        conversations: a kind of `bench.conversations` instead of these.
        window: how far a target hears on each side, None for the whole dialogue.
        edges, relations: of the rule `random`.
        heads: of attention; `out` is the width of all of them together.
        transforms: whether a layer of attention begins with its matrix products. Otherwise it is
            the attention alone, of what they would have made.
    """

    name: str
    _: KW_ONLY
    op: str
    group: str
    rule: str = PAIRS
    dialogues: int = 1
    length: int = 0
    speakers: int = 2
    conversations: str | None = None
    window: int | None = None
    edges: int = 0
    relations: int = 0
    width: int = 128
    out: int = 128
    heads: int = 1
    transforms: bool = True
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = (FORWARD, BOTH)

    def numbers(self) -> dict[str, Any]:
        """What the shape consists of, for reports."""
        if self.rule == RANDOM:
            numbers = {"N": self.length, "E": self.edges, "R": self.relations}
        elif self.conversations is not None:
            numbers = {"dialogues": self.conversations}
        else:
            numbers = {"dialogues": self.dialogues, "length": self.length, "S": self.speakers}
        if self.rule != RANDOM:
            numbers["window"] = "complete" if self.window is None else self.window
        if self.transforms:
            numbers["in"] = self.width
        numbers["out"] = self.out
        if self.op != "relation_conv":
            numbers["H"] = self.heads
        return numbers


Shape = AttentionShape | OneMapShape | RelationShape

GROUPS = ("headline", "more", "scale", "gpu", "tiny")
HEADLINE, MORE, SCALE, GPU, TINY = GROUPS
HALF = torch.bfloat16

_headline = partial(AttentionShape, group=HEADLINE)
_decode = {"queries": 1, "directions": (FORWARD,)}
_more = partial(AttentionShape, group=MORE)
_gpu = partial(AttentionShape, group=GPU, batch=4, heads=16, queries=4096, dtype=HALF)
_tiny = partial(AttentionShape, group=TINY, heads=2, head_dim=8, value_dim=16)
ATTENTION_SHAPES = (
    _headline("square", compiled=True),
    _headline("causal", compiled=True, is_causal=True),
    _headline("square-bf16", dtype=HALF),
    _headline("ragged", heads=8, conversations="dialogues"),
    _more("windowed", window=(128, 128)),
    _more("long", heads=1, queries=16_384, is_causal=True),
    _more("gqa", batch=2, heads=8, kv_heads=2, queries=512),
    _more("small-d", batch=4, heads=8, queries=512, head_dim=16, value_dim=32),
    _more("large-d", heads=2, queries=1024, head_dim=128, value_dim=256),
    _more("equal-dims", queries=1024, value_dim=64),
    _more("decode", batch=4, heads=8, kv_heads=2, keys=4096, **_decode),
    _more("decode-parts", heads=16, keys=4096, value_parts=2, **_decode),
    _gpu("gpu-64", compiled=True),
    _gpu("gpu-64-causal", is_causal=True),
    _gpu("gpu-128-causal", heads=8, head_dim=128, value_dim=256, is_causal=True),
    _gpu("gpu-windowed", queries=8192, window=(512, 0), is_causal=True),
    _gpu("gpu-long", batch=1, heads=8, queries=32_768, is_causal=True),
    _gpu("gpu-gqa", heads=32, kv_heads=8, is_causal=True),
    _gpu("gpu-ragged", heads=8, conversations="dialogues"),
    _gpu("gpu-decode", batch=8, kv_heads=4, keys=8192, **_decode),
    _gpu("gpu-decode-parts", batch=8, keys=8192, value_parts=2, **_decode),
    _tiny("tiny", queries=37, head_dim=16, value_dim=32),
    _tiny("tiny-gqa", heads=4, kv_heads=2, queries=20, keys=33, is_causal=True, window=(9, 0)),
    _tiny("tiny-ragged", conversations="few"),
    _tiny("tiny-parts", keys=300, value_parts=2, **_decode),
)

_temporal = partial(OneMapShape, op="temporal_diff_attention")
TEMPORAL_SHAPES = (
    _temporal("temporal", group=HEADLINE),
    _temporal("temporal-ragged", group=HEADLINE, heads=8, conversations="dialogues"),
    _temporal("gpu-temporal", group=GPU, batch=4, heads=16, length=4096, dtype=HALF),
    _temporal("gpu-temporal-ragged", group=GPU, heads=8, conversations="dialogues", dtype=HALF),
    _temporal("tiny-temporal", group=TINY, heads=2, length=19, head_dim=8, value_dim=16),
    _temporal("tiny-temporal-ragged", group=TINY, heads=2, conversations="few", head_dim=8),
)

_diffusion = partial(OneMapShape, op="diffusion_attention", steps=4)
DIFFUSION_SHAPES = (
    _diffusion("diffusion", group=HEADLINE),
    _diffusion("diffusion-ragged", group=HEADLINE, conversations="dialogues"),
    _diffusion("diffusion-windowed", group=MORE, window=(64, 64)),
    _diffusion("gpu-diffusion", group=GPU, batch=4, heads=16, length=4096, dtype=HALF),
    _diffusion("gpu-diffusion-ragged", group=GPU, heads=8, conversations="dialogues", dtype=HALF),
    _diffusion("tiny-diffusion", group=TINY, heads=2, length=19, head_dim=8, window=(4, 2)),
    _diffusion("tiny-diffusion-ragged", group=TINY, conversations="few", head_dim=16, value_dim=32),
)

_conv = partial(RelationShape, op="relation_conv")
_attention = partial(RelationShape, op="relation_attention")
_dot = partial(RelationShape, op="relation_dot_attention")
_redifu = {"rule": REDIFU, "dialogues": 8, "length": 60, "window": 20}
_few = {"rule": REDIFU, "dialogues": 2, "length": 6, "window": 3, "width": 8, "out": 8}
_wide = {"dialogues": 16, "length": 110, "window": 20, "width": 512, "out": 512}
_scale = {"length": 100_000, "window": 20, "width": 256, "out": 256, "group": SCALE}
RELATION_SHAPES = (
    _conv("complete-2000", group=HEADLINE, length=2000),
    _conv("window-9-speakers", group=HEADLINE, dialogues=16, length=60, window=10, speakers=9),
    _conv("window-wide", group=HEADLINE, **_wide),
    _conv("explicit", group=HEADLINE, rule=RANDOM, length=20_000, edges=400_000, relations=20),
    _attention("redifu", group=HEADLINE, **_redifu),
    _attention("redifu-attention-alone", group=HEADLINE, transforms=False, **_redifu),
    _conv("meeting", group=MORE, window=10, conversations="meeting"),
    _attention("attention-dialogues", group=MORE, window=10, conversations="dialogues"),
    _attention("attention-wide", group=MORE, heads=4, **_wide),
    _attention("attention-complete", group=MORE, length=2000, heads=2),
    _dot("dot-redifu", group=MORE, heads=4, **_redifu),
    _dot("dot-attention-alone", group=MORE, heads=4, transforms=False, **_redifu),
    _dot("dot-dialogues", group=MORE, heads=4, window=10, conversations="dialogues"),
    _conv("scale-window", **_scale),
    _conv("scale-half", **_scale | {"length": 50_000}),
    _conv("scale-complete", group=SCALE, length=20_000),
    _attention("attention-scale", **_scale),
    _conv("gpu-wide", group=GPU, **_wide),
    _conv("gpu-speakers", group=GPU, dialogues=64, length=60, window=10, speakers=9, dtype=HALF),
    _conv("gpu-complete", group=GPU, length=10_000, width=256, out=256),
    _conv("gpu-explicit", group=GPU, rule=RANDOM, length=200_000, edges=4_000_000, relations=20),
    _attention("gpu-redifu", group=GPU, rule=REDIFU, dialogues=16, length=110, window=20),
    _attention("gpu-meeting", group=GPU, conversations="meeting", heads=4),
    _dot("gpu-dot", group=GPU, heads=4, dialogues=16, length=110, window=20),
    _conv("tiny-window", group=TINY, dialogues=3, length=7, window=2, width=8, out=6),
    _conv("tiny-explicit", group=TINY, rule=RANDOM, length=9, edges=20, relations=3, width=4),
    _attention("tiny-attention", group=TINY, **_few),
    _attention("tiny-attention-alone", group=TINY, heads=2, transforms=False, **_few),
    _dot("tiny-dot", group=TINY, heads=2, **_few),
    _dot("tiny-dot-alone", group=TINY, transforms=False, **_few),
)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (*ATTENTION_SHAPES, *TEMPORAL_SHAPES, *DIFFUSION_SHAPES, *RELATION_SHAPES)
}


def select(names: str) -> list[Shape]:
    """Shapes by comma-separated names of shapes and groups, in the order of the table.

    Raises:
        ValueError: a name is neither.
    """
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in SHAPES and name not in GROUPS:
            raise ValueError(
                f"shapes must name shapes or groups, got {name!r}; groups: {', '.join(GROUPS)}; "
                f"shapes: {', '.join(SHAPES)}"
            )
    return [s for s in SHAPES.values() if s.name in wanted or s.group in wanted]
