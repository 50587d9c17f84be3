"""Differential attention as registered operators, one per direction, and their autograd function.

`rdfkern::diff_attn_fwd` and `rdfkern::diff_attn_bwd` are what torch.compile and torch.export see.
They choose the kernel inside, by name. A kernel module holds `forward` and `backward` with the
arguments below, packed tensors viewed as (1, H, T, D), and never sees an empty problem.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .flops import register_when_counted
from .formula import Coefficient, compute_dtype
from .native_arguments import backward_chunks, kv_tasks

KERNELS = {"triton": ".triton", "cuda": ".cuda", "cpu": ".native"}
# Kernels whose O is that of the first map, with a norm or without.
MAP_ROWS = ("triton",)
# How many keys the backward of a kernel takes at once. Of sequences that have no more it computes
# both maps anew, by which it needs no o2, unless it cuts the keys of one head for several threads.
WHOLE_KEYS = {"cpu": 4096}

INPUTS = "Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, Tensor alpha"
OPTIONS = (
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? norm_weight, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seed, SymInt? max_seqlen_q, SymInt? max_seqlen_k, int left, "
    "int right, float dropout_p, float scale, float? norm_eps, float out_scale, str impl"
)
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
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Coefficient,
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
        _per_row(lam, rows, q1),
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
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Coefficient,
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
    out, lse = _attend(
        *(packed.transpose(0, 1)[None] for packed in (q1, k1, q2, k2, v)),  # [1, H, T, D]
        _per_row(lam, rows, q1).mT[None],
        _per_row(alpha, rows, q1).mT[None],
        None,
        key_padding_mask,
        norm_weight,
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
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
    out = out[0].transpose(0, 1)
    return (out, lse[:, 0].mT) if return_lse else out


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
    needs_grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in tensors if isinstance(x, Tensor)
    )
    longest = tensors[1].shape[2] if tensors[13] is None else tensors[13]
    return _DiffAttention.apply(
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
        needs_grad,
        _keeps_o2(impl, tensors[1], tensors[11], longest),
    )


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
        *arguments, needs_grad, keeps_o2 = arguments
        out, lse, o2, o = torch.ops.rdfkern.diff_attn_fwd(
            *arguments, needs_grad=needs_grad, keeps_o2=keeps_o2
        )
        tensors, ctx.options = arguments[:13], arguments[13:]
        ctx.save_for_backward(*tensors, out, lse, o2, o)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 24
        inputs, masks, saved = (
            ctx.saved_tensors[:7],
            ctx.saved_tensors[7:13],
            ctx.saved_tensors[13:],
        )
        *gradients, dnorm_weight = torch.ops.rdfkern.diff_attn_bwd(
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
            *gradients,
            None,
            None,
            None if norm_weight is None else dnorm_weight,
            *(None,) * 14,
        )


@torch.library.impl("rdfkern::diff_attn_fwd", ("cpu", "cuda"))
def _forward(*arguments: Any, needs_grad: bool = True, keeps_o2: bool = True) -> tuple[Tensor, ...]:
    inputs, rest = arguments[:7], arguments[7:]
    q1, v = inputs[0], inputs[4]
    if q1.numel() == 0 or v.numel() == 0:
        out, lse, o2, o = _fake_forward(*arguments, needs_grad=needs_grad, keeps_o2=keeps_o2)
        return out.zero_(), lse.fill_(float("-inf")), o2.zero_(), o.zero_()
    kernels, options = _chosen(rest)
    if not keeps_o2:
        options["keeps_o2"] = False
    return kernels.forward(*inputs, **options, needs_grad=needs_grad)


@torch.library.impl("rdfkern::diff_attn_bwd", ("cpu", "cuda"))
def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved, rest = arguments[:7], arguments[7:11], arguments[11:-1]
    q1, v = inputs[0], inputs[4]
    if q1.numel() == 0 or v.numel() == 0:
        return tuple(gradient.zero_() for gradient in _fake_backward(grad_out, *arguments))
    kernels, options = _chosen(rest)
    gradients = kernels.backward(grad_out, *inputs, *saved, **options, deterministic=arguments[-1])
    return tuple(v.new_empty(0, dtype=lse_dtype(v)) if g is None else g for g in gradients)


@torch.library.register_fake("rdfkern::diff_attn_fwd")
def _fake_forward(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    *arguments: Any,
    needs_grad: bool = True,
    keeps_o2: bool = True,
):
    options = _options(arguments[2:])
    names = ("norm_eps", "cu_seqlens_q", "impl")
    return empty_outputs(q1, v, *(options[name] for name in names), needs_grad, keeps_o2)


@torch.library.register_fake("rdfkern::diff_attn_bwd")
def _fake_backward(grad_out: Tensor, *arguments: Any):
    options = _options(arguments[11:-1])
    return _empty_gradients(arguments[:7], options["norm_weight"], options["cu_seqlens_q"])


def lse_dtype(v: Tensor) -> torch.dtype:
    """dtype of what stays wide: the normalisers and the gradients of lam, alpha, norm_weight."""
    return compute_dtype(v.dtype)


def empty_like_rows(x: Tensor, width: int, packed: bool, dtype: torch.dtype) -> Tensor:
    """(B, H, L, width) for rows like those of x: contiguous, or packed as (L, H, width)."""
    batch, heads, length = x.shape[:3]
    if packed:
        return x.new_empty((length, heads, width), dtype=dtype).transpose(0, 1)[None]
    return x.new_empty((batch, heads, length, width), dtype=dtype)


def empty_outputs(
    q1: Tensor,
    v: Tensor,
    norm_eps: float | None,
    cu_seqlens_q: Tensor | None,
    impl: str,
    needs_grad: bool,
    keeps_o2: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for (out, lse, o2, o); o2 and o are empty where no gradient is needed.

    Without keeps_o2 (see WHOLE_KEYS), o2 is always empty, and so is o but for a norm.

    They are wide: rounded to half, they would leave dlam, dalpha and dnorm_weight, which are wide
    themselves, with errors of half. o, the rows before the norm, is empty too where out is the
    same, and the first map's rows for kernels in MAP_ROWS.
    """
    packed, width, wide = cu_seqlens_q is not None, v.shape[-1], lse_dtype(v)
    out = empty_like_rows(q1, width, packed, v.dtype)
    lse = q1.new_empty((2, *q1.shape[:3]), dtype=wide)
    nothing = v.new_empty(0, dtype=wide)
    if not needs_grad:
        return out, lse, nothing, torch.empty_like(nothing)
    same = norm_eps is None and (not keeps_o2 or wide == v.dtype) and impl not in MAP_ROWS
    o2, o = (
        empty_like_rows(q1, width, packed, wide) if kept else torch.empty_like(nothing)
        for kept in (keeps_o2, not same)
    )
    return out, lse, o2, o


def _empty_gradients(
    inputs: tuple[Tensor, ...], norm_weight: Tensor | None, cu_seqlens_q: Tensor | None
) -> tuple[Tensor, ...]:
    *rows, lam, alpha = inputs
    packed, wide = cu_seqlens_q is not None, lse_dtype(rows[0])
    gradients = [empty_like_rows(x, x.shape[-1], packed, x.dtype) for x in rows]
    coefficients = [x.new_empty(x.shape, dtype=wide) for x in (lam, alpha)]
    size = 0 if norm_weight is None else norm_weight.shape[0]
    return *gradients, *coefficients, rows[0].new_empty(size, dtype=wide)


def _options(values: tuple[Any, ...]) -> dict[str, Any]:
    names = [part.split()[-1] for part in OPTIONS.split(", ")]
    return dict(zip(names, values, strict=True))


def _chosen(values: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """(kernel module, its options with the seed as a number)."""
    options = _options(values)
    module = importlib.import_module(KERNELS[options.pop("impl")], package=__package__)
    if options["seed"] is not None:
        options["seed"] = int(options["seed"])
    return module, options
