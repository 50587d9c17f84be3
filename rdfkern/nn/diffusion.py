"""Diffusion of audio or visual features along the attention of the text."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.diffusion.api import diffusion_attention


class TextGuidedDiffusion(nn.Module):
    """Features diffused over text self-attention: queries and keys from text, values from them.

    Per head, Z_{t+1} = (1 - restart) P Z_t + restart Z_0 with P the softmax map of the projected
    text and Z_0 the head's slice of the features (`rdfkern.diffusion_attention`); the heads are
    then joined by an output projection.

    Args:
        text_dim: width of the text; a multiple of `num_heads`.
        feature_dim: width of the features, for one modality or several side by side (they share
            P); a multiple of `num_heads`.
        num_heads: attention heads.
        steps: diffusion steps K >= 0.
        restart: restart probability in [0, 1].
        bias: whether the projections have a bias.
        window: (left, right) neighbours that a position sees, inclusive; -1 or None is unlimited.
        impl: implementation of the diffusion, as in `rdfkern.diffusion_attention`.

    Raises:
        ValueError: a width is not a positive multiple of `num_heads`, or `num_heads` is below 1.
            `steps`, `restart`, `window` and `impl` are checked by the operation when it is called.
    """

    def __init__(
        self,
        text_dim: int,
        feature_dim: int,
        num_heads: int,
        steps: int,
        restart: float,
        bias: bool = True,
        window: tuple[int, int] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        for name, width in {"text_dim": text_dim, "feature_dim": feature_dim}.items():
            if width < 1 or width % num_heads:
                raise ValueError(
                    f"{name} must be a positive multiple of num_heads ({num_heads}), got {width}"
                )
        self.text_dim = text_dim
        self.feature_dim = feature_dim
        self.num_heads = num_heads
        self.steps = steps
        self.restart = restart
        self.window = window
        self.impl = impl
        self.q_proj = nn.Linear(text_dim, text_dim, bias=bias)
        self.k_proj = nn.Linear(text_dim, text_dim, bias=bias)
        self.out_proj = nn.Linear(feature_dim, feature_dim, bias=bias)

    def forward(
        self,
        text: Tensor,
        features: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Diffuse `features` along the attention of `text`.

        Args:
            text: (B, L, text_dim), or packed (T, text_dim) with `cu_seqlens`.
            features: (B, L, feature_dim) or (T, feature_dim).
            key_padding_mask: (B, L) or (T,) bool, True is padding.
            cu_seqlens: (B+1,) int32 or int64, where each packed sequence starts, and T.
            max_seqlen: at least the longest sequence; needed with `cu_seqlens`.

        Returns:
            The shape of `features`.

        Raises:
            ValueError: text and features have wrong widths or differ in the other dimensions.
        """
        rank = 2 if cu_seqlens is not None else 3
        for name, tensor, width in (
            ("text", text, self.text_dim),
            ("features", features, self.feature_dim),
        ):
            if tensor.dim() != rank or tensor.shape[-1] != width:
                spelled = "(T, {})" if rank == 2 else "(B, L, {})"
                where = "with" if rank == 2 else "without"
                raise ValueError(
                    f"{name} must have shape {spelled.format(width)} {where} cu_seqlens, "
                    f"got {tuple(tensor.shape)}"
                )
        if text.shape[:-1] != features.shape[:-1]:
            raise ValueError(
                f"features must have the leading dimensions of text {tuple(text.shape[:-1])}, "
                f"got {tuple(features.shape[:-1])}"
            )
        diffused = diffusion_attention(
            self._split(self.q_proj(text)),
            self._split(self.k_proj(text)),
            self._split(features),
            steps=self.steps,
            restart=self.restart,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            window=self.window,
            impl=self.impl,
        )
        return self.out_proj(self._join(diffused))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, steps={self.steps}, restart={self.restart}"

    def _split(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, -1))  # [..., H, d]
        return heads if x.dim() == 2 else heads.transpose(1, 2)

    @staticmethod
    def _join(x: Tensor) -> Tensor:
        return (x if x.dim() == 3 else x.transpose(1, 2)).flatten(-2)
