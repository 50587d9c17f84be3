"""Attention diffusion in C++ on the CPU: what the dispatcher looks for by name."""

from functools import partial

from . import fused

diffusion_attention = partial(fused.diffusion_attention, impl="cpu")
