"""Attention diffusion beside eager torch and SDPA."""

from bench.shapes import DIFFUSION_SHAPES as SHAPES

__all__ = ["SHAPES", "test_diffusion_attention"]


def test_diffusion_attention(benchmark, record, shape, direction, candidate):
    record(benchmark, shape, direction, candidate)
