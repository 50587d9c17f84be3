"""What the modules of differential attention share: masks, layouts, packing (private)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..ops.diff_attention.api import diff_attention, diff_attention_varlen
from ..ops.diff_attention.formula import difference_of_maps, per_row
from ..ops.heads import repeat_heads
from ..ops.packing import Packing
from .attention_masks import translate_masks


class DifferentialAttention(nn.Module):
    """Projections around `rdfkern.diff_attention`, with the forward of torch's module.

    A subclass says what lambda is, how projected keys become those of two maps, and what follows
    the difference.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_heads: int,
        q_width: int,
        k_width: int,
        v_width: int,
        dropout: float,
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        impl: str,
        factory: dict[str, torch.device | str | torch.dtype | None],
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kv_heads = kv_heads
        self.dropout = dropout
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.impl = impl
        self.q_proj = nn.Linear(embed_dim, q_width, bias=bias, **factory)
        self.k_proj = nn.Linear(self.kdim, k_width, bias=bias, **factory)
        self.v_proj = nn.Linear(self.vdim, v_width, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.bias_k = nn.Parameter(torch.empty(1, 1, k_width, **factory)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, v_width, **factory)) if add_bias_kv else None

    def reset_parameters(self) -> None:
        """Draw the projections as torch.nn.MultiheadAttention does."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for appended in (self.bias_k, self.bias_v):
            if appended is not None:
                nn.init.xavier_normal_(appended)

    @abstractmethod
    def _factor(self, query: Tensor) -> Tensor:
        """lambda for (..., L, E): a scalar, or (..., L, H)."""

    @abstractmethod
    def _key_pair(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys (..., S, width) to those of both maps, each (..., S, Hkv, d)."""

    @abstractmethod
    def _norm(self) -> dict[str, object]:
        """The options of `diff_attention` for what follows the difference."""

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
        k, v = self._append(self.k_proj(key), self.v_proj(value))  # [B, S + extra, width]
        q1, q2, k1, k2, v = (x.transpose(1, 2) for x in self._heads(self.q_proj(query), k, v))
        masks = translate_masks(
            attn_mask,
            key_padding_mask,
            is_causal=is_causal,
            window=window,
            q=q1,
            lk=key.shape[1],
            extra=k.shape[1] - key.shape[1],
        )
        lam = self._factor(query)
        lam = lam.transpose(1, 2) if lam.dim() else lam  # [] or [B, H, L]
        heads = diff_attention(
            q1,
            k1,
            q2,
            k2,
            v,
            lam,
            **masks._asdict(),
            **self._options(),
        )
        out = self.out_proj(heads.transpose(1, 2).flatten(-2))  # [B, L, E]
        weights = None
        if need_weights:
            weights = self._weights(q1, k1, q2, k2, lam, **masks._asdict())
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

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
        q1, q2, k1, k2, v = self._heads(
            self.q_proj(query), self.k_proj(key), self.v_proj(value)
        )  # [T, H, d] and [T, Hkv, .]
        lam = self._factor(query)  # [] or [T, H]
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
            **self._options(),
        )
        out = self.out_proj(heads.flatten(-2))
        if not need_weights:
            return out, None
        packing = Packing.from_cu_seqlens(cu_seqlens, query.shape[0], max_seqlen)
        present = packing.valid if key_padding_mask is None else packing.pad(~key_padding_mask)
        weights = self._weights(
            *(packing.pad(x).transpose(1, 2) for x in (q1, k1, q2, k2)),
            packing.pad(lam).transpose(1, 2) if lam.dim() else lam,
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

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Projected rows to q1, q2 (..., L, H, d), k1, k2 (..., S, Hkv, d), v (..., S, Hkv, .)."""
        q1, q2 = q.unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)
        return q1, q2, *self._key_pair(k), v.unflatten(-1, (self.kv_heads, -1))

    def _weights(
        self, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, lam: Tensor, **masks: object
    ) -> Tensor:
        k1, k2 = (repeat_heads(k, self.num_heads) for k in (k1, k2))
        return difference_of_maps(q1, k1, q2, k2, per_row(lam, lam.dtype), **masks)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch = k.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(batch, 1, -1)], dim=1)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros((batch, 1, k.shape[-1]))], dim=1)
            v = torch.cat([v, v.new_zeros((batch, 1, v.shape[-1]))], dim=1)
        return k, v

    def _options(self) -> dict[str, object]:
        dropout_p = self.dropout if self.training else 0.0
        return {"dropout_p": dropout_p, "impl": self.impl} | self._norm()
