"""ReDiFu's temporal differential attention beside eager torch and SDPA."""

from bench.shapes import TEMPORAL_SHAPES as SHAPES

__all__ = ["SHAPES", "test_temporal_diff_attention"]


def test_temporal_diff_attention(benchmark, record, shape, direction, candidate):
    record(benchmark, shape, direction, candidate)
