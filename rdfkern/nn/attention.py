"""Differential attention with the interface of torch.nn.MultiheadAttention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.diff_attention.api import diff_attention, diff_attention_varlen
from ..ops.diff_attention.formula import compute_dtype, difference_of_maps
from ..ops.packing import Packing
from .attention_masks import translate_masks


class MultiheadDiffAttention(nn.Module):
    """torch.nn.MultiheadAttention with differential heads (Ye et al. 2024, arXiv 2410.05258).

    A head is (1 - lambda_init) · RMSNorm((A1 - lam · A2) V), its two maps from queries and keys of
    width head_dim = embed_dim / num_heads / 2 and V of width 2 · head_dim, so that a module of
    half the heads has the parameters of an ordinary one. The query and key heads 2h and 2h + 1 are
    the maps of head h. lam = exp(lambda_q1 · lambda_k1) - exp(lambda_q2 · lambda_k2) + lambda_init
    is computed in float32. Parameter names are those of the paper's code (multihead_diffattn.py),
    whose weights load with bias=False as long as it has as many key as query heads; rotary
    positions, which it applies to queries and keys, are not part of this module.

    Args:
        embed_dim: width of queries and of the output, a multiple of 2 · num_heads.
        num_heads: differential heads.
        dropout: probability of dropping an entry of a map while training, independently for each
            of the two.
        bias: whether the projections have a bias.
        add_bias_kv: append a learned key and value, which every query sees.
        add_zero_attn: append a key and a value of zeros, which every query sees.
        kdim, vdim: widths of keys and values, default embed_dim.
        batch_first: (B, L, E) instead of (L, B, E).
        device, dtype: of the parameters.
        depth: index of the layer from 0; sets lambda_init = 0.8 - 0.6 · exp(-0.3 · depth).
        lambda_init: replaces what depth gives.
        norm: False leaves out the norm and the factor 1 - lambda_init.
        impl: implementation, as in `rdfkern.diff_attention`.

    Raises:
        ValueError: embed_dim is no positive multiple of 2 · num_heads, dropout is not in [0, 1), or
            depth is negative.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        depth: int = 0,
        lambda_init: float | None = None,
        norm: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % (2 * num_heads):
            raise ValueError(
                f"embed_dim must be a positive multiple of 2 * num_heads with num_heads >= 1, "
                f"got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if depth < 0:
            raise ValueError(f"depth must be at least 0, the first layer, got {depth}")
        factory = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads // 2
        self.dropout = dropout
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.lambda_init = (
            0.8 - 0.6 * math.exp(-0.3 * depth) if lambda_init is None else lambda_init
        )
        self.impl = impl
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.bias_k = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if add_bias_kv else None
        self.lambda_q1 = nn.Parameter(torch.empty(self.head_dim, **factory))
        self.lambda_k1 = nn.Parameter(torch.empty(self.head_dim, **factory))
        self.lambda_q2 = nn.Parameter(torch.empty(self.head_dim, **factory))
        self.lambda_k2 = nn.Parameter(torch.empty(self.head_dim, **factory))
        self.subln = nn.RMSNorm(2 * self.head_dim, eps=1e-5, **factory) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: projections as in torch.nn.MultiheadAttention, lambda vectors N(0, 0.1)."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for appended in (self.bias_k, self.bias_v):
            if appended is not None:
                nn.init.xavier_normal_(appended)
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)
        if self.subln is not None:
            self.subln.reset_parameters()

    def lam(self) -> Tensor:
        """Factor of the second map, a scalar in float32 (float64 for float64 parameters)."""
        dtype = compute_dtype(self.lambda_q1.dtype)
        q1, k1, q2, k2 = (
            vector.to(dtype)
            for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        window: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (L, B, E), (B, L, E) with `batch_first`, (L, E) without a batch, or packed
                (T, E) with `cu_seqlens`.
            key: (S, B, kdim), (B, S, kdim), (S, kdim), or (T, kdim).
            value: (S, B, vdim), (B, S, vdim), (S, vdim), or (T, vdim).
            key_padding_mask: (B, S), unbatched (S,), packed (T,). bool: True is padding; floating
                (not packed): added to the scores.
            need_weights: also return the maps, at the price of L x S memory.
            attn_mask: (L, S) or (B·num_heads, L, S), not packed. bool: True is masked *out*, as in
                torch.nn.MultiheadAttention; floating: added to the scaled scores of both maps.
            average_attn_weights: return the mean of the maps over the heads.
            is_causal: a query sees no later key, aligned to the bottom right. It means what it says
                and needs no attn_mask beside it; if there is one, both apply.
            cu_seqlens: (B+1,) int32 or int64, where each packed sequence starts, and T.
            max_seqlen: at least the longest sequence; needed with `cu_seqlens`.
            window: (left, right) keys on each side that a query sees, inclusive; -1 is unlimited.

        Returns:
            The output, in the layout of `query`, and None or the combined map A1 - lam · A2,
            without dropout, norm and (1 - lambda_init): (B, L, S), or (B, num_heads, L, S) without
            `average_attn_weights`; no B if unbatched; S counts appended keys. Packed, L and S are
            max_seqlen, with zeros in the free places.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        self._check_inputs(query, key, value, cu_seqlens)
        if cu_seqlens is not None:
            return self._forward_packed(
                query,
                key,
                value,
                key_padding_mask,
                attn_mask,
                cu_seqlens,
                max_seqlen,
                is_causal,
                window,
                need_weights,
                average_attn_weights,
            )
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen needs cu_seqlens (packed inputs), got {max_seqlen} alone")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        k, v = self._append(self.k_proj(key), self.v_proj(value))  # [B, S + extra, E]
        (q1, q2), (k1, k2) = self._pairs(self.q_proj(query)), self._pairs(k)
        masks = translate_masks(
            attn_mask,
            key_padding_mask,
            is_causal=is_causal,
            window=window,
            q=q1,
            lk=key.shape[1],
            extra=k.shape[1] - key.shape[1],
        )
        lam = self.lam()
        heads = diff_attention(
            q1,
            k1,
            q2,
            k2,
            v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2),
            lam,
            **masks._asdict(),
            **self._epilogue(),
        )
        out = self.out_proj(heads.transpose(1, 2).flatten(-2))  # [B, L, E]
        weights = None
        if need_weights:
            weights = difference_of_maps(q1, k1, q2, k2, lam, **masks._asdict())
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"lambda_init={self.lambda_init:.3g}"
        )

    def _forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        is_causal: bool,
        window: tuple[int, int] | None,
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1))  # [T, H, 2 d]
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        lam = self.lam()
        heads = diff_attention_varlen(
            q1,
            k1,
            q2,
            k2,
            v,
            lam,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            window=window,
            **self._epilogue(),
        )
        out = self.out_proj(heads.flatten(-2))
        if not need_weights:
            return out, None
        packing = Packing.from_cu_seqlens(cu_seqlens, q.shape[0], max_seqlen)
        present = packing.valid if key_padding_mask is None else packing.pad(~key_padding_mask)
        weights = difference_of_maps(
            *(packing.pad(x).transpose(1, 2) for x in (q1, k1, q2, k2)),
            lam,
            attn_mask=None,
            key_padding_mask=~present,
            is_causal=is_causal,
            window=window,
        )
        weights = weights * packing.valid[:, None, :, None]
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        ranks = (2,) if cu_seqlens is not None else (2, 3)
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if x.dim() not in ranks or x.dim() != query.dim() or x.shape[-1] != width:
                rank = " or ".join(str(rank) for rank in ranks)
                raise ValueError(
                    f"{name} must have {rank} dimensions, as many as query, and width {width}, "
                    f"got {tuple(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have the leading dimensions of key {tuple(key.shape[:-1])}, "
                f"got {tuple(value.shape[:-1])}"
            )
        batch_at = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_at] != key.shape[batch_at]:
            raise ValueError(
                f"key must have the batch size of query ({query.shape[batch_at]}), "
                f"got {key.shape[batch_at]}"
            )
        if cu_seqlens is not None:
            if key.shape[0] != query.shape[0]:
                raise ValueError(
                    f"key must have the {query.shape[0]} packed rows of query, got {key.shape[0]}"
                )
            if self.bias_k is not None or self.add_zero_attn:
                raise ValueError(
                    "cu_seqlens must be None with add_bias_kv or add_zero_attn, whose keys have no "
                    "place in packed sequences; pass a padded batch instead"
                )

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, E) to the heads of both maps, each (B, H, L, d)."""
        pairs = x.unflatten(-1, (self.num_heads, 2, self.head_dim)).transpose(1, 2)
        return pairs[..., 0, :], pairs[..., 1, :]

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shape = (k.shape[0], 1, self.embed_dim)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(shape)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(shape)], dim=1)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(shape)], dim=1)
            v = torch.cat([v, v.new_zeros(shape)], dim=1)
        return k, v

    def _epilogue(self) -> dict[str, object]:
        options = {"dropout_p": self.dropout if self.training else 0.0, "impl": self.impl}
        if self.subln is None:
            return options
        return options | {
            "norm_weight": self.subln.weight,
            "norm_eps": self.subln.eps,
            "out_scale": 1.0 - self.lambda_init,
        }
