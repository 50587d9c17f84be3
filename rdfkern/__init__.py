"""Differential attention, relation message passing and attention diffusion for PyTorch."""

from ._backends.dispatch import (
    BackendUnavailableError,
    available_backends,
    explain,
    use_backend,
)

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "available_backends",
    "explain",
    "use_backend",
]
