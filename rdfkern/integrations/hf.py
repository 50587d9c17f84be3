"""Hugging Face transformers: DiffLlama's attention in rdfkern's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.models.diffllama import modeling_diffllama

from ..ops.diff_attention.api import diff_attention
from .applied import Applied
from .hf_attention import NAME, attention_forward, attention_mask, is_flash, lambda_of, masks_for

DiffLlamaAttention = modeling_diffllama.DiffLlamaAttention


def apply_rdfkern_to_diffllama(model: nn.Module | None = None) -> Applied:
    """Let DiffLlama attend with `rdfkern.diff_attention`, forward and backward.

    Weights, state_dict, config and caches stay what they are. Masks mean what they mean to the
    attention implementation that the config names: `eager`, `sdpa`, `rdfkern` (see
    `register_attention`) or one of the flash names, whose own package is then not needed.

    The untouched forward still runs where it alone can answer: with output_attentions, with another
    implementation's name (flex_attention, paged ones), with a paged cache, with packed sequences
    under a flash name, and while training with attention_dropout.

    lambda is used in float32, where transformers rounds it to the dtype of the activations. Queries
    that every key is hidden from, as left padding has them, give 0.

    Args:
        model: changes this model's layers only. None changes the class, and with it every DiffLlama
            of the process that exists or will exist.

    Returns:
        `Applied`, whose `undo()` restores what was there. What is changed already is left as it
        is, so that the handle of a repeated call has nothing to undo. A layer whose forward is not
        that of transformers is in its `left_alone`.

    Raises:
        ValueError: `model` has no DiffLlama attention layer.
    """
    applied = Applied()
    current = DiffLlamaAttention.forward
    original = _original(current) or current
    if model is None:
        if current is original:
            DiffLlamaAttention.forward = _fused_forward(original)
            applied.add(
                "DiffLlamaAttention", partial(setattr, DiffLlamaAttention, "forward", original)
            )
        return applied
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DiffLlamaAttention)
    }
    if not layers:
        raise ValueError(
            f"model must have DiffLlamaAttention layers, {type(model).__name__} has none"
        )
    for name, layer in layers.items():
        # accelerate's hooks replace `forward` of an instance and keep what they call in this one.
        attribute = "_old_forward" if hasattr(layer, "_old_forward") else "forward"
        bound = getattr(layer, attribute)
        is_own = attribute in vars(layer)
        if is_own and _original(bound) is not None:
            continue
        function = getattr(bound, "__func__", None)
        if function not in (current, original) or (is_own and attribute == "forward"):
            applied.left_alone[name] = "its forward is not that of transformers' DiffLlamaAttention"
            continue
        setattr(layer, attribute, MethodType(_fused_forward(original), layer))
        undo = partial(setattr, layer, attribute, bound) if is_own else None
        applied.add(name, undo or partial(delattr, layer, attribute))
    return applied


def register_attention() -> None:
    """Make `attn_implementation="rdfkern"` known to transformers, with its mask function.

    It serves `DiffLlamaConfig(attn_implementation="rdfkern")`, `from_pretrained` and
    `model.set_attn_implementation("rdfkern")`, and changes no class. DiffLlama asks an attention
    function for each half of the values and subtracts and normalises what it returned by itself, so
    this takes two calls of the kernel and 8 units of work where the one call after
    `apply_rdfkern_to_diffllama` takes 6. Both can be combined: the model then attends in one call
    and padding reaches the kernel as a row of keys, not as a square mask.

    Calling it again changes nothing; transformers has no way to take a name back.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def _original(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The transformers function behind one of ours; None if `forward` is not ours."""
    return getattr(forward, "_rdfkern_original", None)


def _needs_the_original(
    layer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    options: dict[str, Any],
) -> bool:
    if attention_mask is not None and not _serves_both_maps(attention_mask):
        return True
    implementation = layer.config._attn_implementation or "eager"
    known = implementation in ("eager", "sdpa", NAME) or is_flash(implementation)
    output_attentions = options.get("output_attentions")
    if output_attentions is None:
        output_attentions = getattr(layer.config, "output_attentions", False)
    if (
        not known
        or implementation.startswith("paged|")
        or output_attentions
        or not isinstance(cache, Cache | None)  # a paged one
        or (layer.training and layer.attention_dropout > 0.0)
    ):
        return True
    if not is_flash(implementation) or attention_mask is not None:
        return False
    position_ids = options.get("position_ids")
    if options.get("cu_seq_lens_q") is not None:
        return True
    if position_ids is None or hidden_states.shape[0] != 1 or position_ids.shape[-1] == 1:
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def _cache_of(positional: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The cache of a call: `cache` from transformers 5.24 on, `past_key_values` before, where
    `cache` was a paged one; or the fourth argument."""
    given = (*positional[:1], options.get("cache"), options.get("past_key_values"))
    return next((cache for cache in given if cache is not None), None)


def _serves_both_maps(attention_mask: Any) -> bool:
    is_tensor = isinstance(attention_mask, Tensor)
    return is_tensor and (attention_mask.dim() == 2 or attention_mask.shape[-3] == 1)


def _fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """forward of DiffLlamaAttention on one call of `diff_attention`."""

    @wraps(original)
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = _cache_of(positional, kwargs)
        if _needs_the_original(self, hidden_states, attention_mask, cache, kwargs):
            return original(
                self, hidden_states, position_embeddings, attention_mask, *positional, **kwargs
            )
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, 2H, Lq, d] and [B, 2Hkv, Lq, d]
        q, k = modeling_diffllama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        is_causal = kwargs.get("is_causal")
        masks = masks_for(
            attention_mask,
            self.config._attn_implementation or "eager",
            q.shape[2],
            k.shape[2],
            self.is_causal if is_causal is None else is_causal,
        )
        k, v = k[:, :, : masks.keys], v[:, :, : masks.keys]
        (q1, q2), (k1, k2) = q.chunk(2, dim=1), k.chunk(2, dim=1)
        heads = diff_attention(
            q1,
            k1,
            q2,
            k2,
            v.unflatten(1, (2, -1)).movedim(1, 3),  # [B, Hkv, Lk, 2, d]
            lambda_of(self),
            attn_mask=masks.attn_mask,
            key_padding_mask=masks.key_padding_mask,
            is_causal=masks.is_causal,
            scale=self.scaling,
            norm_eps=self.groupnorm.eps,
            out_scale=1.0 - self.lambda_init,
        )
        return self.o_proj(heads.transpose(1, 2).flatten(2)), None

    forward._rdfkern_original = original
    return forward
