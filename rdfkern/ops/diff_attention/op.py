"""Differential attention as registered operators, one per direction, and their autograd function.

`rdfkern::diff_attn_fwd` and `rdfkern::diff_attn_bwd` are what torch.compile and torch.export see.
They choose the kernel inside, by name. A kernel module holds `forward`, which fills outputs made
here, and `backward`, with the arguments below, and never sees an empty problem. Packed tensors are
(T, H, D) for the operators, so that autograd records no views, and shown as (1, H, T, D) to kernels
that do not take them as they are. `forward` also gets values in parts, (B, Hkv, Lk, P, Dv / P); for
autograd they are joined.

Without q2, k2 and lam there is one map, out = norm(alpha softmax(q1 k1ᵀ) v). Then o2 and the
gradients of the three are empty for the operators, and None for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..._backends.autograd import is_recorded, record
from ..._backends.dispatch import kernel_module
from .flops import register_when_counted
from .formula import Coefficient, compute_dtype, dim_of_values
from .native_arguments import backward_chunks, kv_tasks

KERNELS = {"triton": ".triton", "cuda": ".cuda", "cpu": ".native"}
# Kernels that take packed tensors as they are.
PACKED = ("cpu",)
# Kernels whose O is that of the first map, with a norm or without.
MAP_ROWS = ("triton",)
# How many keys the backward of a kernel takes at once. Of sequences that have no more it computes
# both maps anew, by which it needs no o2, unless it cuts the keys of one head for several threads.
WHOLE_KEYS = {"cpu": 4096}

INPUTS = "Tensor q1, Tensor k1, Tensor? q2, Tensor? k2, Tensor v, Tensor? lam, Tensor alpha"
OPTIONS = (
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? norm_weight, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seed, SymInt? max_seqlen_q, SymInt? max_seqlen_k, int left, "
    "int right, float dropout_p, float scale, float? norm_eps, float out_scale, str impl"
)
OPTION_NAMES = [part.split()[-1] for part in OPTIONS.split(", ")]
torch.library.define(
    "rdfkern::diff_attn_fwd",
    f"({INPUTS}, {OPTIONS}, *, bool needs_grad=True, bool keeps_o2=True) -> "
    "(Tensor out, Tensor lse, Tensor o2, Tensor o)",
)
torch.library.define(
    "rdfkern::diff_attn_bwd",
    f"(Tensor grad_out, {INPUTS}, Tensor out, Tensor lse, Tensor o2, Tensor o, {OPTIONS}, "
    "bool deterministic) -> (Tensor dq1, Tensor dk1, Tensor dq2, Tensor dk2, Tensor dv, "
    "Tensor dlam, Tensor dalpha, Tensor dnorm_weight)",
)
register_when_counted()


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Coefficient | None,
    *,
    alpha: Coefficient,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    return_lse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The canonical arguments of `diff_attention`, computed by the kernel named `impl`."""
    rows = q1.shape[:3]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*rows, k1.shape[2])
    out, lse = _attend(
        q1,
        k1,
        q2,
        k2,
        v,
        None if lam is None else _per_row(lam, rows, q1),
        _per_row(alpha, rows, q1),
        attn_mask,
        key_padding_mask,
        norm_weight,
        None,
        None,
        None,
        None,
        is_causal,
        window,
        dropout_p,
        scale,
        norm_eps,
        out_scale,
        impl,
    )
    return (out, lse) if return_lse else out


def diff_attention_varlen(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Coefficient | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alpha: Coefficient,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    out_scale: float,
    return_lse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The canonical arguments of `diff_attention_varlen`, computed by the kernel named `impl`."""
    rows = q1.shape[:2]
    starts_q = cu_seqlens_q.to(torch.int32)
    starts_k = starts_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.to(torch.int32)
    out, lse = _attend(
        q1,
        k1,
        q2,
        k2,
        v,
        None if lam is None else _per_row(lam, rows, q1),
        _per_row(alpha, rows, q1),
        None,
        key_padding_mask,
        norm_weight,
        starts_q,
        starts_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        window,
        dropout_p,
        scale,
        norm_eps,
        out_scale,
        impl,
    )
    return (out, lse[:, 0].mT) if return_lse else out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_padding_mask: Tensor | None,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
    impl: str,
) -> Tensor:
    """norm(softmax(q kᵀ) v) alone: one map of dense (B, H, L, D) or packed (T, H, D)."""
    options = {
        "alpha": 1.0,
        "key_padding_mask": key_padding_mask,
        "is_causal": False,
        "window": window,
        "dropout_p": dropout_p,
        "scale": scale,
        "norm_weight": norm_weight,
        "norm_eps": norm_eps,
        "out_scale": out_scale,
        "return_lse": False,
        "impl": impl,
    }
    if cu_seqlens is None:
        return diff_attention(q, k, None, None, v, None, attn_mask=None, **options)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return diff_attention_varlen(q, k, None, None, v, None, *lengths, **options)


def _per_row(coefficient: Coefficient, rows: torch.Size, like: Tensor) -> Tensor:
    dtype = compute_dtype(like.dtype)
    if not isinstance(coefficient, Tensor):
        coefficient = like.new_full((), coefficient, dtype=dtype)
    return coefficient.to(dtype).expand(rows)


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, is_causal, window, dropout_p, scale, norm_eps, out_scale, impl = arguments
    left, right = (-1, -1) if window is None else window
    # A tensor, so that compiled code draws a new one in every call; on the CPU, where reading it
    # does not wait for an accelerator.
    seed = torch.randint(2**62, (), device="cpu") if dropout_p > 0.0 else None
    arguments = (
        *tensors[:12],
        seed,
        *tensors[12:],
        left,
        0 if is_causal else right,
        float(dropout_p),
        float(scale),
        None if norm_eps is None else float(norm_eps),
        float(out_scale),
        impl,
    )
    if not is_recorded(*tensors):
        return torch.ops.rdfkern.diff_attn_fwd.default(*arguments, needs_grad=False)[:2]
    if tensors[4].dim() == 5:
        arguments = (*arguments[:4], tensors[4].flatten(3), *arguments[5:])
    longest = tensors[1].shape[2] if tensors[13] is None else tensors[13]
    keeps_o2 = _keeps_o2(impl, tensors[1], tensors[11], longest)
    return record(_DiffAttention, *arguments, keeps_o2)


def _keeps_o2(impl: str, k: Tensor, cu_seqlens_k: Tensor | None, longest: int) -> bool:
    tasks = kv_tasks(k, cu_seqlens_k)
    # A number that is only known when an exported program runs decides nothing here.
    if not (type(longest) is int and type(tasks) is int and longest <= WHOLE_KEYS.get(impl, 0)):
        return True
    return backward_chunks(tasks, longest, cu_seqlens_k is not None, _num_threads()) > 1


def _num_threads() -> int:
    return torch.get_num_threads()


# What torch.compiler.assume_constant_result does; that would import torch._dynamo with this module.
_num_threads._dynamo_marked_constant = True


class _DiffAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Any) -> tuple[Tensor, Tensor]:
        *arguments, keeps_o2 = arguments
        out, lse, o2, o = torch.ops.rdfkern.diff_attn_fwd.default(*arguments, keeps_o2=keeps_o2)
        tensors, ctx.options = arguments[:13], arguments[13:]
        ctx.save_for_backward(*tensors, out, lse, o2, o)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 23
        tensors = ctx.saved_tensors
        inputs, masks, saved = tensors[:7], tensors[7:13], tensors[13:]
        *gradients, dnorm_weight = torch.ops.rdfkern.diff_attn_bwd.default(
            grad_out,
            *inputs,
            *saved,
            *masks,
            *ctx.options,
            torch.are_deterministic_algorithms_enabled(),
        )
        norm_weight = masks[2]
        if norm_weight is not None:
            dnorm_weight = dnorm_weight.to(norm_weight.dtype)
        return (
            *(None if x is None else dx for x, dx in zip(inputs, gradients, strict=True)),
            None,
            None,
            None if norm_weight is None else dnorm_weight,
            *(None,) * 13,
        )


@torch.library.impl("rdfkern::diff_attn_fwd", ("cpu", "cuda"))
def _forward(*arguments: Any, needs_grad: bool = True, keeps_o2: bool = True) -> tuple[Tensor, ...]:
    inputs, rest = arguments[:7], arguments[7:]
    q1, v = inputs[0], inputs[4]
    outputs = _fake_forward(*arguments, needs_grad=needs_grad, keeps_o2=keeps_o2)
    if q1.numel() == 0 or v.numel() == 0:
        out, lse, o2, o = outputs
        return out.zero_(), lse.fill_(float("-inf")), o2.zero_(), o.zero_()
    kernels, options, view = _chosen(rest)
    kernels.forward(*_viewed((*inputs, *outputs), view), **options)
    return outputs


@torch.library.impl("rdfkern::diff_attn_bwd", ("cpu", "cuda"))
def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved, rest = arguments[:7], arguments[7:11], arguments[11:-1]
    q1, v = inputs[0], inputs[4]
    if q1.numel() == 0 or v.numel() == 0:
        return tuple(gradient.zero_() for gradient in _fake_backward(grad_out, *arguments))
    kernels, options, view = _chosen(rest)
    tensors = _viewed((grad_out, *inputs, *saved), view)
    *gradients, dnorm_weight = kernels.backward(*tensors, **options, deterministic=arguments[-1])
    if view:
        gradients = [
            x if x is None else x.squeeze(0).transpose(0, 1).contiguous() for x in gradients
        ]
    gradients.append(dnorm_weight)
    return tuple(
        v.new_empty(0, dtype=dtype) if x is None else x
        for x, dtype in zip(gradients, _gradient_dtypes(v), strict=True)
    )


@torch.library.register_fake("rdfkern::diff_attn_fwd")
def _fake_forward(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    *arguments: Any,
    needs_grad: bool = True,
    keeps_o2: bool = True,
):
    options, maps = _options(arguments[2:]), 1 if q2 is None else 2
    packed, norm_eps = options["cu_seqlens_q"] is not None, options["norm_eps"]
    return _empty_outputs(q1, v, maps, packed, norm_eps, options["impl"], needs_grad, keeps_o2)


@torch.library.register_fake("rdfkern::diff_attn_bwd")
def _fake_backward(grad_out: Tensor, *arguments: Any):
    return _empty_gradients(arguments[:7], _options(arguments[11:-1])["norm_weight"])


def _viewed(tensors: Sequence[Tensor | None], view: bool) -> Sequence[Tensor | None]:
    """Packed (T, H) and (T, H, D) as (1, H, T) and (1, H, T, D), all else as it is."""
    if not view:
        return tensors
    return [
        x if x is None or x.dim() not in (2, 3) else x.transpose(0, 1).unsqueeze(0) for x in tensors
    ]


def lse_dtype(v: Tensor) -> torch.dtype:
    """dtype of what stays wide: the normalisers and the gradients of lam, alpha, norm_weight."""
    return compute_dtype(v.dtype)


def empty_like_rows(x: Tensor, width: int, packed: bool, dtype: torch.dtype) -> Tensor:
    """(B, H, L, width) for rows like those of x: contiguous, or packed as (L, H, width)."""
    batch, heads, length = x.shape[:3]
    if packed:
        return x.new_empty((length, heads, width), dtype=dtype).transpose(0, 1)[None]
    return x.new_empty((batch, heads, length, width), dtype=dtype)


def _empty_outputs(
    q1: Tensor,
    v: Tensor,
    maps: int,
    packed: bool,
    norm_eps: float | None,
    impl: str,
    needs_grad: bool,
    keeps_o2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for (out, lse, o2, o), packed like q1 or not; lse is (maps, B, H, L) in either case.

    o2 and o are empty where no gradient is needed; with one map, o2 always is.

    Without keeps_o2 (see WHOLE_KEYS), o2 is always empty, and so is o but for a norm.

    They are wide: rounded to half, they would leave dlam, dalpha and dnorm_weight, which are wide
    themselves, with errors of half. o, the rows before the norm, is empty too where out is the
    same, and the first map's rows for kernels in MAP_ROWS.
    """
    *rows, _ = q1.shape
    size, wide = (*rows, dim_of_values(v)), lse_dtype(v)
    out = v.new_empty(size)
    lse = v.new_empty((maps, *((1, *reversed(rows)) if packed else rows)), dtype=wide)
    nothing = v.new_empty(0, dtype=wide)
    if not needs_grad:
        return out, lse, nothing, torch.empty_like(nothing)
    same = norm_eps is None and (not keeps_o2 or wide == v.dtype) and impl not in MAP_ROWS
    o2, o = (
        v.new_empty(size, dtype=wide) if kept else torch.empty_like(nothing)
        for kept in (keeps_o2 and maps == 2, not same)
    )
    return out, lse, o2, o


def _gradient_dtypes(v: Tensor) -> list[torch.dtype]:
    """Of the gradients of q1, k1, q2, k2, v, and then of lam, alpha and norm_weight."""
    return [v.dtype] * 5 + [lse_dtype(v)] * 3


def _empty_gradients(
    inputs: Sequence[Tensor | None], norm_weight: Tensor | None
) -> tuple[Tensor, ...]:
    v = inputs[4]
    return tuple(
        v.new_empty(0 if x is None else x.shape, dtype=dtype)
        for x, dtype in zip((*inputs, norm_weight), _gradient_dtypes(v), strict=True)
    )


def _options(values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(OPTION_NAMES, values, strict=True))


def _chosen(values: tuple[Any, ...]) -> tuple[Any, dict[str, Any], bool]:
    """(kernel module, its options with the seed as a number, whether it needs a view)."""
    options = _options(values)
    impl = options.pop("impl")
    if options["seed"] is not None:
        options["seed"] = int(options["seed"])
    kernels = kernel_module(KERNELS[impl], __package__)
    return kernels, options, options["cu_seqlens_q"] is not None and impl not in PACKED
