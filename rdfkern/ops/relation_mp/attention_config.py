"""Where relation attention's Triton kernels run, and how they are launched there.

Tiles are analytical defaults: the largest whose accumulators fit the registers and whose operands
fit the shared memory of an architecture, checked by compiling for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..._backends.dispatch import Arguments
from ..._backends.triton_device import device_reason, shared_bytes
from .windows import too_many_rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256
# On windows, as many numbers are kept of every target and head, three times.
MAX_WITHIN = 1024


@dataclass(frozen=True)
class Tiles:
    """Targets and sources of a tile, warps of a program and stages of its software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By kernel on windows and generation: tiles for two-byte types, where queries and values together
# have up to 128 padded columns, up to 256 and up to 512.
DEFAULTS = {
    "forward": {
        "sm_80": (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
        "sm_90": (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2)),
        "sm_100": (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)),
        "gfx": (Tiles(64, 64, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "targets": {
        "sm_80": (Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 16, 8, 1)),
        "sm_90": (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
        "sm_100": (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 1)),
        "gfx": (Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 16, 8, 1)),
    },
    "sources": {
        "sm_80": (Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
        "sm_90": (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
        "sm_100": (Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2), Tiles(16, 64, 8, 1)),
        "gfx": (Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 16, 8, 1)),
    },
    # For sources, with a softmax for each relation, whose statistics differ from pair to pair.
    "within sources": {
        "sm_80": (Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
        "sm_90": (Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 2), Tiles(16, 32, 8, 1)),
        "sm_100": (Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 1)),
        "gfx": (Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 16, 8, 1)),
    },
    # Forward and for targets, with a softmax for each relation.
    "within": {
        "sm_80": (Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2), Tiles(16, 16, 8, 1)),
        "sm_90": (Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2), Tiles(32, 16, 8, 1)),
        "sm_100": (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1), Tiles(16, 32, 8, 1)),
        "gfx": (Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 16, 8, 1)),
    },
}
WIDTHS = (128, 256, 512)
# Without tensor cores, float32 products keep both operands of a tile in registers.
FLOAT32 = (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1))

# Relations whose gradients one program sums; few of them are summed by rows, without a loop.
MANY_RELATIONS = 1024
FEW_RELATIONS = 8

# Elements of the features of one step of a program on edges, and of one of its warps.
EDGE_TILE = 4096
WARP_TILE = 1024
MOST_EDGES = 64
# Edges, and relations, of one step of the sums over relations; programs that share the edges.
SUMMED_EDGES = 32
SUMMED_RELATIONS = 64
MOST_PARTS = 256


def can_run(arguments: Arguments | None) -> str | None:
    """Why the Triton kernels cannot run for these arguments (None: anywhere), or None."""
    if arguments is None:
        return device_reason(None)
    value, graph = arguments["value"], arguments["graph"]
    reason = device_reason(value.device)
    if reason is not None:
        return reason
    if value.dtype not in DTYPES:
        return f"computes in float32, inputs are {value.dtype}"
    widest = max(x.shape[2] for x in (value, arguments.get("query", value)))
    if widest > MAX_WIDTH:
        return f"takes up to {MAX_WIDTH} columns per head, got {widest}"
    if graph.is_implicit:
        relations = graph.num_relations
        if arguments["softmax"] == "within" and relations > MAX_WITHIN:
            return f"takes up to {MAX_WITHIN} relations with softmax='within', got {relations}"
        return too_many_rows(graph)
    return None


def tiles(kernel: str, depth: int, width: int, dtype: torch.dtype, architecture: str) -> Tiles:
    """Launch configuration of a kernel on windows (a key of DEFAULTS).

    Args:
        depth: padded columns of queries and keys, 0 in the additive form.
        width: padded columns of values.
    """
    columns = depth + width
    at = next(at for at, most in enumerate(WIDTHS) if columns <= most)
    if dtype == torch.float32:
        return FLOAT32[at]
    chosen = DEFAULTS[kernel][_generation(architecture)][at]
    limit = shared_bytes(architecture)
    while needed_bytes(kernel, chosen, columns, dtype, architecture) > limit:
        if chosen.num_stages == 1:
            break
        chosen = replace(chosen, num_stages=chosen.num_stages - 1)
    return chosen


def needed_bytes(
    kernel: str, tiles: Tiles, columns: int, dtype: torch.dtype, architecture: str
) -> int:
    """Shared memory of the operands: what stays for a whole program, and the pipeline's stages."""
    resident, streamed = tiles.block_m, tiles.block_n
    if kernel in ("sources", "within sources"):
        resident, streamed = streamed, resident
    if architecture.startswith("gfx"):
        # AMD's compilers keep in registers what stays.
        resident = 0
    weights = 2 * tiles.block_m * tiles.block_n
    return ((resident + tiles.num_stages * streamed) * columns + weights) * dtype.itemsize


def edge_block(width: int) -> int:
    """Edges of one step of a program on edges whose rows have `width` padded columns."""
    return max(16, min(MOST_EDGES, EDGE_TILE // width))


def edge_warps(width: int) -> int:
    """Warps of such a program."""
    return max(1, min(8, edge_block(width) * width // WARP_TILE))


def _generation(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx"
    major = int(architecture[3:]) // 10
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
