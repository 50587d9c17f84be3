"""Attention diffusion in CUDA C++: what the dispatcher looks for by name."""

from functools import partial

from . import fused

diffusion_attention = partial(fused.diffusion_attention, impl="cuda")
