"""Inputs of relation attention's Triton kernels, and the launches of those on windows.

Launches are made without running them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..._backends.triton_device import architecture
from ..._backends.triton_utils import Launch, dot_precision, unit_stride
from . import attention_config as config
from .attention_triton_bwd_dst import relation_attn_bwd_dst_kernel
from .attention_triton_bwd_src import relation_attn_bwd_src_kernel
from .attention_triton_fwd import relation_attn_fwd_kernel
from .attention_triton_within import (
    relation_attn_within_bwd_dst_kernel,
    relation_attn_within_fwd_kernel,
)
from .bands import EdgeLists
from .windows import Windows


@dataclass(frozen=True)
class Problem:
    """The inputs that forward and backward share; shapes are those of the contract.

    value and, in the dot form, dst and src have dense last dimensions.
    """

    value: Tensor
    dst: Tensor
    src: Tensor
    rel: Tensor
    graph: Windows | EdgeLists
    seed: int
    dropout_p: float
    scale: float
    negative_slope: float
    within: bool

    @property
    def is_dot(self) -> bool:
        return self.dst.dim() == 3

    @property
    def heads(self) -> int:
        return self.value.shape[1]

    @property
    def width(self) -> int:
        return self.value.shape[2]

    @property
    def depth(self) -> int:
        return self.dst.shape[2] if self.is_dot else 0

    @property
    def relations(self) -> int:
        return self.rel.shape[0]

    def new_wide(self, *size: int) -> Tensor:
        """Memory for sums and statistics, float32."""
        return self.value.new_empty(size, dtype=torch.float32)

    def tiles(self, kernel: str) -> config.Tiles:
        """Those of a kernel on windows on the device of the inputs."""
        depth = padded_width(self.depth) if self.is_dot else 0
        where = (self.value.dtype, architecture(self.value.device))
        return config.tiles(kernel, depth, padded_width(self.width), *where)

    def arguments(self) -> dict[str, Any]:
        """Kernel arguments by name that almost all kernels have in common."""
        return {
            "value_ptr": self.value,
            "dst_ptr": self.dst,
            "src_ptr": self.src,
            "rel_ptr": self.rel,
            "value_strides": self.value.stride()[:2],
            "dst_strides": self.dst.stride()[:2],
            "src_strides": self.src.stride()[:2],
            "rel_strides": self.rel.stride(),
            "heads": self.heads,
            "seed": self.seed,
            "threshold": int(self.dropout_p * 2**32),
            "scale": self.scale,
            "negative_slope": self.negative_slope,
            "inverse_kept": 1.0 / (1.0 - self.dropout_p),
            "D": self.depth,
            "C": self.width,
            "BLOCK_D": padded_width(self.depth),
            "BLOCK_C": padded_width(self.width),
            "IS_DOT": self.is_dot,
            "HAS_DROPOUT": self.dropout_p > 0.0,
        }


def describe(
    value: Tensor,
    dst: Tensor,
    src: Tensor,
    rel: Tensor,
    graph: Windows | EdgeLists,
    *,
    seed: int | None,
    scale: float,
    negative_slope: float,
    within: bool,
    dropout_p: float,
) -> Problem:
    """Collect the inputs; copies only those that the kernels cannot address."""
    if dst.dim() == 3:
        dst, src = unit_stride(dst), unit_stride(src)
    options = (seed or 0, dropout_p, scale, negative_slope, within)
    return Problem(unit_stride(value), dst, src, rel, graph, *options)


def padded_width(columns: int) -> int:
    """Width of a tile of that many columns: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(columns))


def windows_forward_launch(problem: Problem, out: Tensor, softmax: Tensor) -> Launch:
    """The launch that fills `out` and, without `within`, `softmax`."""
    nodes = problem.value.shape[0]
    given = _windows_arguments(problem, "within" if problem.within else "forward")
    given["out_ptr"] = out
    if not problem.within:
        given["softmax_ptr"] = softmax
    return Launch(
        relation_attn_within_fwd_kernel if problem.within else relation_attn_fwd_kernel,
        lambda meta: (triton.cdiv(nodes, meta["BLOCK_M"]) * problem.heads,),
        given,
    )


def windows_by_target_launch(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    softmax: Tensor,
    delta: Tensor,
    ddst: Tensor,
    parts: Tensor,
) -> Launch:
    """The launch that fills `delta`, `ddst` and the parts of drel; grad has dense rows."""
    few, chunk = _summed_relations(problem)
    programs = parts.shape[0] * problem.heads
    return Launch(
        relation_attn_bwd_dst_kernel,
        lambda meta: (programs, triton.cdiv(problem.relations, meta["RELATIONS"])),
        {
            **_windows_arguments(problem, "targets"),
            "grad_ptr": grad,
            "grad_strides": grad.stride()[:2],
            "out_ptr": out,
            "softmax_ptr": softmax,
            "delta_ptr": delta,
            "ddst_ptr": ddst,
            "parts_ptr": parts,
            "relations": problem.relations,
            "FEW": few,
            "RELATIONS": chunk,
        },
    )


def windows_within_by_target_launch(
    problem: Problem, grad: Tensor, softmax: Tensor, ddst: Tensor, parts: Tensor
) -> Launch:
    """The launch that fills `softmax`, `ddst` and, where there are edges, the parts of drel."""
    programs = parts.shape[0] * problem.heads
    return Launch(
        relation_attn_within_bwd_dst_kernel,
        lambda meta: (programs,),
        {
            **_windows_arguments(problem, "within"),
            "grad_ptr": grad,
            "grad_strides": grad.stride()[:2],
            "softmax_ptr": softmax,
            "ddst_ptr": ddst,
            "parts_ptr": parts,
            "relations": problem.relations,
        },
    )


def windows_by_source_launch(
    problem: Problem,
    grad: Tensor,
    softmax: Tensor,
    delta: Tensor | None,
    dvalue: Tensor,
    dsrc: Tensor,
) -> Launch:
    """The launch that fills `dvalue` and `dsrc`; without `delta`, `softmax` is `new_softmax`."""
    nodes = problem.value.shape[0]
    return Launch(
        relation_attn_bwd_src_kernel,
        lambda meta: (triton.cdiv(nodes, meta["BLOCK_N"]) * problem.heads,),
        {
            **_windows_arguments(problem, "within sources" if problem.within else "sources"),
            "grad_ptr": grad,
            "grad_strides": grad.stride()[:2],
            "delta_ptr": delta,
            "softmax_ptr": softmax,
            "relations": problem.relations,
            "dvalue_ptr": dvalue,
            "dsrc_ptr": dsrc,
        },
    )


def new_window_parts(problem: Problem) -> Tensor:
    """Memory for drel by tiles of targets, (P, H, R) float32."""
    chosen = problem.tiles("within" if problem.within else "targets")
    tiles = triton.cdiv(problem.value.shape[0], chosen.block_m)
    return problem.new_wide(tiles, problem.heads, problem.relations)


def new_softmax(problem: Problem) -> Tensor:
    """Memory for exponent, factor and D by relation, (3, N, H, R) float32."""
    return problem.new_wide(3, problem.value.shape[0], problem.heads, problem.relations)


def _windows_arguments(problem: Problem, kernel: str) -> dict[str, Any]:
    graph: Windows = problem.graph
    return {
        **problem.arguments(),
        "order_ptr": graph.order if graph.order.numel() else None,
        "key_ptr": graph.key,
        "ranges_ptr": graph.ranges,
        "table_ptr": graph.table,
        "total": problem.value.shape[0],
        "keys": graph.table.shape[0],
        "PRECISION": dot_precision(problem.value.dtype),
        **problem.tiles(kernel).launch_options(),
    }


def _summed_relations(problem: Problem) -> tuple[int, int]:
    """How many relations a program sums by rows, 0 for none; how many it sums at all."""
    if problem.relations <= config.FEW_RELATIONS:
        return problem.relations, triton.next_power_of_2(problem.relations)
    return 0, min(config.MANY_RELATIONS, triton.next_power_of_2(problem.relations))
