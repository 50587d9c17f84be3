"""Where relation_conv's Triton kernels run, and how they are launched there.

Tiles are analytical defaults, checked by compiling for every architecture named here: the largest
whose accumulators fit the registers and whose operands fit the shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..._backends.dispatch import Arguments
from ..._backends.triton_device import device_reason

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Every program holds what its key may hear, 3 entries for each key, in registers.
MAX_KEYS = 1365
KERNELS = ("bands", "bands_largest", "bands_weight", "bands_max")
KERNELS += ("edges", "edges_weight", "edges_factor", "edges_max")
# Parts of a weight's gradient that splits of the rows leave behind may take so many bytes.
MAX_SPLIT_BYTES = 64 << 20
# What gradients keep of the maxima of some relations at a time may take so many bytes, unless one
# relation takes more.
MAX_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile, others of a step, columns in and out, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_c: int
    block_e: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """As keyword arguments of a launch of a kernel on bands; lists of edges have no BLOCK_N."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_C": self.block_c,
            "BLOCK_E": self.block_e,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# For bands and for lists of edges, by generation, for two-byte types: a tile of sums and one of
# what they make of the weight, both float32.
DEFAULTS = {
    "bands": {
        "sm_80": Tiles(64, 32, 64, 128, 4, 2),
        "sm_90": Tiles(64, 64, 64, 128, 8, 2),
        "sm_100": Tiles(64, 64, 64, 128, 8, 2),
        "gfx": Tiles(64, 32, 64, 128, 8, 1),
    },
    "edges": {
        "sm_80": Tiles(32, 0, 64, 128, 4, 2),
        "sm_90": Tiles(64, 0, 64, 128, 4, 2),
        "sm_100": Tiles(64, 0, 64, 128, 4, 2),
        "gfx": Tiles(32, 0, 64, 128, 4, 1),
    },
}
# Gradients of maxima: three tiles of float32, the maxima, who attains them, and their gradient.
MAXIMA = Tiles(64, 16, 64, 64, 8, 1)
# Without tensor cores, float32 products keep both operands of a tile in registers.
FLOAT32 = Tiles(32, 32, 32, 64, 4, 1)


def can_run(arguments: Arguments | None) -> str | None:
    """Why the Triton kernels cannot run for these arguments (None: anywhere), or None."""
    if arguments is None:
        return device_reason(None)
    x, graph = arguments["x_src"], arguments["graph"]
    reason = device_reason(x.device)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"computes in float32, inputs are {x.dtype}"
    if graph.is_implicit and graph.spec.num_keys > MAX_KEYS:
        return f"takes up to {MAX_KEYS} keys, got {graph.spec.num_keys}"
    return None


def tiles(
    kernel: str,
    width_in: int,
    width_out: int,
    rows_per_group: float,
    dtype: torch.dtype,
    architecture: str,
) -> Tiles:
    """Launch configuration of a kernel (one of KERNELS).

    Args:
        width_in, width_out: columns of one block of the weight, as the kernel multiplies by it.
        rows_per_group: how many rows stand together on average, at least: groups without any
            count as well.
        dtype: of the features.
        architecture: such as sm_90 or gfx942.
    """
    chosen = DEFAULTS[kernel.split("_")[0]][_generation(architecture)]
    if kernel.endswith("largest"):
        chosen = replace(chosen, block_c=32, num_warps=8)
    elif kernel == "edges_factor":
        chosen = replace(chosen, num_warps=8)
    elif kernel.endswith("max"):
        chosen = MAXIMA
    if dtype == torch.float32:
        chosen = FLOAT32
    together = power_of_two(round(rows_per_group))
    chosen = replace(
        chosen,
        block_m=min(chosen.block_m, together),
        block_n=min(chosen.block_n, together),
        block_c=min(chosen.block_c, power_of_two(width_in)),
        block_e=min(chosen.block_e, power_of_two(width_out)),
    )
    sums = chosen.block_c if kernel.endswith("weight") else chosen.block_m
    tiles_of_sums = 3 if kernel.endswith("max") else 1
    # A warp for 1024 numbers of what the program adds up.
    warps = max(4, tiles_of_sums * sums * chosen.block_e // 1024)
    return replace(chosen, num_warps=min(chosen.num_warps, warps))


def splits(programs: int, row_tiles: int, weight_elements: int, processors: int) -> int:
    """How many parts of the rows share the work on a weight's gradient.

    Args:
        programs: that one part takes. row_tiles: in all rows. weight_elements: of the gradient.
        processors: of the device; two programs for each keep it busy.
    """
    wanted = 2 * processors // programs
    affordable = MAX_SPLIT_BYTES // (4 * weight_elements)
    return max(1, min(wanted, affordable, row_tiles // 4))


def power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller and that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length()) if size > 1 else 16


def _generation(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx"
    major = int(architecture[3:]) // 10
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
