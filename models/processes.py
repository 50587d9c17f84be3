"""The processes of a run: one, or several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class OtherProcessError(ValueError):
    """The first process failed; it reports the reason."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: index of this process; process 0 alone writes files.
        size: number of processes.
        device: device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Processes:
        """Join the group that torchrun describes in the environment; without one, be alone.

        Processes talk through NCCL on CUDA and through gloo on the CPU.

        Args:
            device: `auto`, `cpu` or `cuda`.

        Raises:
            ValueError: CUDA was asked for and there is none.
        """
        chosen = choose_device(device)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1, chosen)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), chosen)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def add_up(self, value: Tensor) -> None:
        """Add a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, decide: Callable[[], Value]) -> Value:
        """What `decide` returns in the first process, in all of them.

        Raises:
            OtherProcessError: in the others, where `decide` raised ValueError in the first.
        """
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None, False]
        failure = None
        if self.first:
            try:
                outcome[0] = decide()
            except ValueError as error:
                outcome[1], failure = True, error
        dist.broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1]:
            raise OtherProcessError("process 0 failed")
        return outcome[0]

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
