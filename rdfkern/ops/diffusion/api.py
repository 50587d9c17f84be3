"""Attention diffusion: K steps of a random walk with restart over a softmax map."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._backends.autocast import autocast_inputs, without_autocast
from ..._backends.checks import (
    check_cu_seqlens,
    check_device,
    check_floating,
    check_max_seqlen,
    check_number,
    check_padding_mask,
    check_shape,
    check_window,
)
from ..._backends.dispatch import Implementation, Operation, register, translated
from ..diff_attention.api import FUSED
from .fused import kernel_arguments


def diffusion_attention(
    q: Tensor,
    k: Tensor,
    z0: Tensor,
    *,
    steps: int,
    restart: float,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Diffuse z0 along an attention map: Z_{t+1} = (1 - restart) P Z_t + restart Z_0.

    P = softmax(q kᵀ · scale) over the visible keys, the same in every step (personalised
    PageRank as in APPNP, Gasteiger et al. 2019, with attention as the graph). A position that sees
    no key at all has a zero row in P, so there Z = restart · Z_0 after one step and every later
    one. Padding only hides a position as a key: its own row is diffused like every other.

    Args:
        q: (B, H, L, D), or packed (T, H, D) with `cu_seqlens`. float16, bfloat16, float32 or
            float64; half types accumulate in float32. Under autocast q, k and z0 are cast to its
            dtype first.
        k: the shape, dtype and device of q.
        z0: (B, H, L, Dz) or (T, H, Dz), the features to diffuse and to restart from.
        steps: K >= 0; 0 returns z0, on which q and k then have no influence.
        restart: in [0, 1]; 0 is pure diffusion, 1 returns z0 for any K.
        key_padding_mask: (B, L) bool, packed (T,); True is padding, which no position sees.
        cu_seqlens: (B+1,) int32 or int64, where each packed sequence starts, and T. Sequences do
            not see each other.
        max_seqlen: at least the longest sequence; needed with `cu_seqlens`, refused without.
        window: (left, right) keys on each side that a position sees, inclusive; -1 is unlimited.
        scale: factor of the scores, default 1/sqrt(D).
        impl: `auto`, `triton`, `cuda`, `cpu`, `torch` or `reference`.

    Returns:
        Z_K, of z0's shape and dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.
    """
    arguments = _validate(
        q,
        k,
        z0,
        steps=steps,
        restart=restart,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        window=window,
        scale=scale,
    )
    with without_autocast(q.device.type):
        return OPERATION.run(arguments, impl)


def _validate(
    q: Tensor,
    k: Tensor,
    z0: Tensor,
    *,
    steps: int,
    restart: float,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    q, k, z0 = autocast_inputs(q, k, z0)
    check_floating({"q": q, "k": k, "z0": z0})
    packed = cu_seqlens is not None
    _check_shapes(q, k, z0, packed)
    if packed:
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0])
        check_device("cu_seqlens", cu_seqlens, "q", q)
        check_max_seqlen("max_seqlen", max_seqlen, "cu_seqlens", cu_seqlens)
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen needs cu_seqlens (packed inputs), got {max_seqlen} alone")
    if key_padding_mask is not None:
        shape, spelled = (q.shape[:1], "(T,)") if packed else ((q.shape[0], q.shape[2]), "(B, L)")
        check_padding_mask(key_padding_mask, tuple(shape), spelled, "q", q)
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an integer, got {steps!r}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    check_number("restart", restart)
    if not 0.0 <= restart <= 1.0:
        raise ValueError(f"restart must be in [0, 1], got {restart}")
    if scale is not None:
        check_number("scale", scale)
    return {
        "q": q,
        "k": k,
        "z0": z0,
        "steps": steps,
        "restart": float(restart),
        "key_padding_mask": key_padding_mask,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "window": check_window(window),
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
    }


def _check_shapes(q: Tensor, k: Tensor, z0: Tensor, packed: bool) -> None:
    rank, spelled = (3, "(T, H, D)") if packed else (4, "(B, H, L, D)")
    if q.dim() != rank:
        where = "with cu_seqlens" if packed else "without cu_seqlens"
        raise ValueError(f"q must have shape {spelled} {where}, got {tuple(q.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head dim D of at least 1, got {tuple(q.shape)}")
    check_shape("k", k, tuple(q.shape), f"{spelled} of q")
    check_shape("z0", z0, (*q.shape[:-1], None), spelled.replace("D", "Dz"))


MODULES = {"triton": "triton", "cuda": "cuda", "cpu": "native"}
KERNELS = {
    name: Implementation(
        f".ops.diffusion.{module}", translated(FUSED[name].can_run, kernel_arguments)
    )
    for name, module in MODULES.items()
}
OPERATION = register(
    Operation(
        name="diffusion_attention",
        validate=_validate,
        implementations={
            **KERNELS,
            "torch": Implementation(".ops.diffusion.composed"),
            "reference": Implementation(".ops.diffusion.reference"),
        },
    )
)
