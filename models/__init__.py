"""The ReDiFu network for emotion recognition in conversations, its data and its training."""

from .config import NetworkConfig
from .data import Batch, Corpus, DataError, Dialogue, collate
from .network import ReDiFu, build_network
from .outputs import Outputs

__all__ = [
    "Batch",
    "Corpus",
    "DataError",
    "Dialogue",
    "NetworkConfig",
    "Outputs",
    "ReDiFu",
    "build_network",
    "collate",
]
