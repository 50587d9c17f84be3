"""Modules around the operations."""

from .diffusion import TextGuidedDiffusion

__all__ = ["TextGuidedDiffusion"]
