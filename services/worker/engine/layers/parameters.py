"""How a layer states the checkpoint tensors it is made of and takes its shard of each."""

from __future__ import annotations

from typing import Protocol

import torch

from services.worker.engine.distributed.group import TpGroup


class Placement:
    """Where a layer's tensors live, and which shard of them this rank holds.

    Counts the bytes of the tensors that it makes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, group: TpGroup) -> None:
        self.device = device
        self.dtype = dtype
        self.group = group
        self.num_bytes = 0

    def empty(self, *shape: int) -> torch.Tensor:
        """An uninitialised parameter."""
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        self.num_bytes += tensor.nbytes
        return tensor


class Layer(Protocol):
    """A layer with parameters."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every checkpoint tensor of this layer, by name within the layer."""

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take this rank's shard of a full tensor named by `tensors`."""


def shard_size(total: int, group: TpGroup, what: str) -> int:
    """`total` divided among the ranks. Raises ValueError when it does not divide."""
    if total % group.size:
        raise ValueError(f"{what} ({total}) does not divide by tp_size {group.size}")
    return total // group.size
