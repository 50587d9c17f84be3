"""Where the native sources stand, installed or in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parent
"""Folder of the C++ and CUDA sources: `cpu/` and `cuda/`."""
