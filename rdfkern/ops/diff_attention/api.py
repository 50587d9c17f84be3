"""Differential attention: the weighted difference of two softmax maps, applied to one value."""

from __future__ import annotations

from torch import Tensor

from ..._backends.autocast import without_autocast
from ..._backends.dispatch import Implementation, Operation, register, translated
from .arguments import dense_arguments, temporal_arguments, varlen_arguments
from .config import triton_reason
from .cuda import can_run as cuda_reason
from .native import can_run as cpu_reason
from .temporal import kernel_arguments


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: float | Tensor,
    *,
    alpha: float | Tensor = 1.0,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """(alpha · A1 - lam · A2) V with A_i = softmax(q_i k_iᵀ · scale, masked).

    Differential attention of Ye et al. 2024 (arXiv 2410.05258); with k1 = k2 also its second
    version. The subtraction and the norm are computed in float32 (float64 for float64 inputs) and
    rounded to the dtype of v at the end. All masks combine. A query that no key is left for gives
    exactly 0 and has zero gradients.

    Under autocast, q1, k1, q2, k2, v and a floating attn_mask are cast to its dtype; lam, alpha and
    norm_weight are not.

    Args:
        q1, q2: (B, H, Lq, D), queries of the two maps. float16, bfloat16, float32 or float64.
        k1, k2: (B, Hkv, Lk, D), keys of the two maps, of q1's dtype. H is a multiple of Hkv; query
            head h uses kv head h // (H / Hkv).
        v: (B, Hkv, Lk, Dv), of q1's dtype; D and Dv may differ. Or (B, Hkv, Lk, P, Dv / P), whose P
            parts count as side by side and may lie apart in memory: without gradients `cpu`, and
            `triton` for few queries of many keys, read them where they are; else they are joined.
        lam: factor of the second map: a number, or a tensor that broadcasts to (B, H, Lq), so one
            value per head is (H, 1). float32 is welcome beside half inputs: it is not rounded.
        alpha: factor of the first map, as lam.
        attn_mask: broadcasts to (B, H, Lq, Lk). bool: True takes part; of q1's dtype: added to the
            scaled scores of both maps, and differentiable; -1e30 or less hides the key, as -inf.
        key_padding_mask: (B, Lk) bool, True is padding, which no query sees.
        is_causal: a query sees no later key. Query i stands at key i + Lk - Lq, so that the last
            query sees the last key; SDPA lets the first query see the first key instead.
        window: (left, right) keys on each side of a query's place that it sees, inclusive; -1 is
            unlimited.
        dropout_p: in [0, 1), applied whenever it is above 0. Each map drops its entries
            independently of the other one, after the softmax, and scales the kept ones by
            1 / (1 - dropout_p). A dropped entry is dropped for all of Dv. Implementations draw
            different random numbers.
        scale: factor of q_i k_iᵀ, default 1/sqrt(D).
        norm_weight: (Dv,) weight of the norm, shared by all heads, or None.
        norm_eps: None leaves the norm out. Otherwise the result is
            out_scale · O / sqrt(mean(O², over Dv) + norm_eps) · norm_weight for each head.
        out_scale: factor of the norm, 1 - lambda_init in the paper. Only with norm_eps.
        return_lse: also return the logarithms of the two normalisers.
        impl: `auto`, `triton`, `cuda`, `cpu`, `torch` or `reference`.

    Returns:
        (B, H, Lq, Dv), of v's dtype. With `return_lse` also (2, B, H, Lq) in float32 (float64 for
        float64 inputs): log sum_j exp(score_ij) of the two maps over the keys that take part,
        without dropout, -inf where there is none. It is not differentiable.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.
    """
    arguments = dense_arguments(
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        alpha=alpha,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        window=window,
        dropout_p=dropout_p,
        scale=scale,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        return_lse=return_lse,
    )
    with without_autocast(q1.device.type):
        return DENSE.run(arguments, impl)


def diff_attention_varlen(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alpha: float | Tensor = 1.0,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`diff_attention` of packed sequences, none of which sees another.

    Queries of sequence b are rows cu_seqlens_q[b] to cu_seqlens_q[b + 1], keys and values likewise.
    is_causal and window align to the bottom right of each sequence by itself. What is not listed
    is as in `diff_attention`.

    Args:
        q1, q2: (Tq, H, D).
        k1, k2: (Tk, Hkv, D).
        v: (Tk, Hkv, Dv).
        lam: a number, or a tensor that broadcasts to (Tq, H), so one value per head is (H,).
        cu_seqlens_q: (B+1,) int32 or int64: 0, where each following sequence starts, and Tq. A
            sequence may be empty.
        cu_seqlens_k: the same for keys and values, ending at Tk.
        max_seqlen_q: at least the longest sequence of queries. On the CPU a smaller one raises;
            on an accelerator it is asserted on the device, without a host sync.
        max_seqlen_k: at least the longest sequence of keys.
        alpha: as lam.
        attn_mask: must be None: call `diff_attention` once per sequence instead.
        key_padding_mask: (Tk,) bool, True is padding.

    Returns:
        (Tq, H, Dv); with `return_lse` also (2, Tq, H).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.
    """
    arguments = varlen_arguments(
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        alpha=alpha,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        window=window,
        dropout_p=dropout_p,
        scale=scale,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        return_lse=return_lse,
    )
    with without_autocast(q1.device.type):
        return VARLEN.run(arguments, impl)


def temporal_diff_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: float | Tensor,
    *,
    alpha: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    out_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """(alpha · A1 - lam · A2) V, where the second map attends with the keys of one step earlier.

    The differential attention of ReDiFu (arXiv 2603.25752): A1 = softmax(q kᵀ · scale) and
    A2 = softmax(q k'ᵀ · scale), where k'_j is the key of the step before j in the same dialogue,
    and that of the dialogue's last step for its first one. Steps that `key_padding_mask` hides are
    left out as if the dialogue did not have them, so that results do not depend on padding.
    ReDiFu's released network has alpha = lam.

    A2 is A1 with its columns shifted by one step, so that one softmax serves both maps, and where
    lam and alpha are the same for all queries of a head, one product with the values. There are no
    is_causal and window: the wrap-around would show the first steps the last key, the future.

    Args:
        q: (B, H, L, D), or packed (T, H, D) with `cu_seqlens`. float16, bfloat16, float32 or
            float64.
        k: (B, Hkv, L, D) or (T, Hkv, D), of q's dtype; H is a multiple of Hkv.
        v: (B, Hkv, L, Dv) or (T, Hkv, Dv), of q's dtype.
        lam: factor of the second map: a number, or a tensor that broadcasts to (B, H, L), so one
            value per head is (H, 1); packed: to (T, H), so one value per head is (H,).
        alpha: factor of the first map, as lam.
        cu_seqlens: (B+1,) int32 or int64: 0, where each following dialogue starts, and T.
        max_seqlen: at least the longest dialogue; needed with `cu_seqlens`, refused without.
        key_padding_mask: (B, L) or (T,) bool; True is padding, which no query sees. The row of a
            padded query is computed like every other.
        dropout_p: in [0, 1), applied whenever it is above 0, to A1; kept entries are scaled by
            1 / (1 - dropout_p). A2, which is A1 shifted, drops the shifted entries.
        scale, norm_weight, norm_eps, out_scale, impl: as in `diff_attention`.

    Returns:
        (B, H, L, Dv) or (T, H, Dv), of v's dtype. A query that no key is left for gives 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendUnavailableError: `impl` was chosen explicitly and cannot run.
    """
    arguments = temporal_arguments(
        q,
        k,
        v,
        lam,
        alpha=alpha,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        scale=scale,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
    )
    with without_autocast(q.device.type):
        return TEMPORAL.run(arguments, impl)


IMPLEMENTATIONS = {
    "torch": Implementation(".ops.diff_attention.composed"),
    "reference": Implementation(".ops.diff_attention.reference"),
}
FUSED = {
    "triton": Implementation(".ops.diff_attention.triton", triton_reason),
    "cuda": Implementation(".ops.diff_attention.cuda", cuda_reason),
    "cpu": Implementation(".ops.diff_attention.native", cpu_reason),
}
DENSE = register(Operation("diff_attention", dense_arguments, FUSED | IMPLEMENTATIONS))
VARLEN = register(Operation("diff_attention_varlen", varlen_arguments, FUSED | IMPLEMENTATIONS))
SHIFTED = {
    name: Implementation(fused.module, translated(fused.can_run, kernel_arguments))
    for name, fused in FUSED.items()
}
TEMPORAL = register(
    Operation("temporal_diff_attention", temporal_arguments, SHIFTED | IMPLEMENTATIONS)
)
