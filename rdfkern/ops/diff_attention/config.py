"""Where the Triton kernels of differential attention run, and how they are launched there.

Tiles are analytical defaults: the largest whose accumulators and operands fit the registers and
the shared memory of an architecture, checked by compiling for it. RDFKERN_AUTOTUNE=1 measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..._backends.triton_device import architecture, device_reason, shared_bytes
from .formula import dim_of_values

MAX_HEAD_DIM = 256
MAX_VALUE_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes over queries and keys, warps of a program and stages of its software pipeline."""

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


# By kernel and generation: `Tiles` for two-byte types, for widths (of two keys, or of the value) up
# to 64, 128, 256 and 512. A program of 8 warps has 255 registers a thread and one place on a
# multiprocessor: two float32 accumulators of 128 x 128 leave the forward half of them.
DEFAULTS = {
    "forward": {
        "sm_80": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
        "sm_90": ((128, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)),
        "sm_100": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "gfx": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
    },
    "split": {
        "sm_80": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 8, 2)),
        "sm_90": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 8, 2)),
        "sm_100": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 16, 8, 2)),
        "gfx": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
    },
    "one_pass": {
        "sm_80": ((64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (16, 16, 8, 2)),
        "sm_90": ((64, 32, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2), (16, 32, 8, 1)),
        "sm_100": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 16, 8, 2), (16, 32, 8, 1)),
        "gfx": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    },
    "keys": {
        "sm_80": ((64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2)),
        "sm_90": ((64, 32, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2)),
        "sm_100": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2)),
        "gfx": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    },
    "queries": {
        "sm_80": ((32, 64, 4, 2), (32, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
        "sm_90": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "sm_100": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
        "gfx": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    },
}
WIDTHS = (64, 128, 256, 512)

# Up to this many rows (queries times the heads of a group) and from this many keys on, keys are
# split among programs when no gradient is needed: a part has at least half that many, and there
# are no more parts than fill the GPU twice.
MAX_DECODED_ROWS = 64
MIN_SPLIT_KEYS = 512
MAX_SPLITS = 64
# Rows of a program of the kernel that combines the parts.
COMBINED_ROWS = 4


def triton_reason(arguments: Mapping[str, Any] | None) -> str | None:
    """Why the Triton implementation cannot run for these arguments (None: anywhere), or None."""
    if arguments is None:
        return device_reason(None)
    q, v, attn_mask = arguments["q1"], arguments["v"], arguments.get("attn_mask")
    reason = device_reason(q.device)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"computes in float32, inputs are {q.dtype}"
    dims = (q.shape[-1], dim_of_values(v))
    if dims[0] > MAX_HEAD_DIM or dims[1] > MAX_VALUE_DIM:
        return (
            f"takes head dims up to {MAX_HEAD_DIM} and value dims up to {MAX_VALUE_DIM}, "
            f"got {dims[0]} and {dims[1]}"
        )
    name = architecture(q.device)
    if not fits(*dims, q.dtype, name):
        return f"{name} has too little shared memory for {q.dtype} of these head dims"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient"
    return None


def tiles(
    kernel: str, head_dim: int, value_dim: int, dtype: torch.dtype, architecture: str
) -> Tiles:
    """Launch configuration of a kernel (a key of DEFAULTS) for padded widths of the tiles."""
    width = max(2 * head_dim, value_dim)
    at = next(at for at, most in enumerate(WIDTHS) if width <= most)
    chosen = Tiles(*DEFAULTS[kernel][_generation(architecture)][at])
    if dtype == torch.float32:
        # What is twice as long gets half as many rows and keys.
        chosen = replace(
            chosen, block_m=max(16, chosen.block_m // 2), block_n=max(16, chosen.block_n // 2)
        )
    limit = shared_bytes(architecture)
    while needed_bytes(kernel, chosen, head_dim, value_dim, dtype, architecture) > limit:
        if chosen.num_stages > 1:
            chosen = replace(chosen, num_stages=chosen.num_stages - 1)
        elif chosen.block_n > 16:
            chosen = replace(chosen, block_n=chosen.block_n // 2)
        elif chosen.block_m > 16:
            chosen = replace(chosen, block_m=chosen.block_m // 2)
        else:
            break
    return chosen


def candidates(
    kernel: str, chosen: Tiles, head_dim: int, value_dim: int, dtype: torch.dtype, architecture: str
) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Launch options to measure: the chosen tiles first, then half, twice and other pipelines."""
    variants = [chosen]
    for rows in (chosen.block_m, chosen.block_m // 2, chosen.block_m * 2):
        for keys in (chosen.block_n, chosen.block_n // 2, chosen.block_n * 2):
            for warps in (4, 8):
                for stages in (1, 2, 3):
                    variants.append(Tiles(rows, keys, warps, stages))
    limit = shared_bytes(architecture)
    return tuple(
        tuple(tiles.launch_options().items())
        for tiles in dict.fromkeys(variants)
        if min(tiles.block_m, tiles.block_n) >= 16
        and max(tiles.block_m, tiles.block_n) <= 128
        and needed_bytes(kernel, tiles, head_dim, value_dim, dtype, architecture) <= limit
    )


def fits(head_dim: int, value_dim: int, dtype: torch.dtype, architecture: str) -> bool:
    """Whether all kernels find tiles for these widths that an architecture has the memory for."""
    widths = tuple(max(16, 1 << (d - 1).bit_length()) for d in (head_dim, value_dim))
    return all(
        needed_bytes(
            kernel, tiles(kernel, *widths, dtype, architecture), *widths, dtype, architecture
        )
        <= shared_bytes(architecture)
        for kernel in DEFAULTS
    )


def splits(programs: int, keys: int, multiprocessors: int) -> int:
    """Into how many parts the keys of each of so many programs are split."""
    parts = min(-(-2 * multiprocessors // programs), 2 * keys // MIN_SPLIT_KEYS, MAX_SPLITS)
    return max(1, parts)


def row_block(value_dim: int) -> int:
    """Rows of a program of the kernel that prepares the backward pass: 16 KiB of float32."""
    return max(8, min(64, 4096 // value_dim))


def _generation(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx"
    major = int(architecture[3:]) // 10
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def needed_bytes(
    kernel: str,
    tiles: Tiles,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    architecture: str,
) -> int:
    """Shared memory of the operands: what stays for a whole program, and the pipeline's stages."""
    size = dtype.itemsize
    row = (2 * head_dim + value_dim) * size
    generation = _generation(architecture)
    # Only wgmma and tcgen05 read a stage while the next ones are being filled.
    overlap = generation in ("sm_90", "sm_100")
    stages = max(1, tiles.num_stages if overlap else tiles.num_stages - 1)
    weights = 2 * tiles.block_m * tiles.block_n * size
    if kernel in ("forward", "split"):
        resident, streamed = 2 * head_dim * size * tiles.block_m, tiles.block_n * row
    elif kernel == "queries":
        resident, streamed = tiles.block_m * row, tiles.block_n * row
    else:
        resident, streamed = tiles.block_n * row, tiles.block_m * row
        weights += 4 * tiles.block_m * head_dim
    # AMD's compilers keep in registers what stays.
    return (0 if generation == "gfx" else resident) + stages * streamed + weights
