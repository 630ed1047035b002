"""The tensor-parallel process group: collectives over torch.distributed's gloo.

Ranks of one group hold shards of one model and run the same steps in the same order.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import ProcessGroupGloo

# How long a collective waits for a rank that is alive but silent. Ranks enter a collective
# within a layer's time of each other; one that died is noticed at once, by its closed socket.
COLLECTIVE_TIMEOUT = timedelta(seconds=20)
_HOST = "127.0.0.1"


class TpGroup(Protocol):
    """Collectives among `size` ranks, of which this process is `rank`."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; may overwrite and return `tensor`. Identical on all ranks."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, concatenated along the last dimension in rank order."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with rank 0's."""

    def close(self) -> None:
        """Leave the group."""


class SoloGroup:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        return None

    def close(self) -> None:
        return None


class GlooGroup:
    """Ranks on one host's CPUs, connected over the loopback interface.

    A dead or silent rank makes the collective raise RuntimeError. It is a process group object of
    its own, not torch.distributed's global one, so that a process can hold several.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=_HOST)]
        options._timeout = COLLECTIVE_TIMEOUT
        self._group: Any = gloo(store, rank, size, options)
        # Keeps rank 0's server alive as long as the group.
        self._store = store

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self._open().allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._open().allgather([parts], [tensor]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._open().broadcast(tensor, 0).wait()

    def close(self) -> None:
        self._group = None

    def _open(self) -> Any:
        assert self._group is not None, "no collective after close()"
        return self._group


def create_store(size: int) -> tuple[TCPStore, int]:
    """Rank 0's rendezvous server on a free port of this host, and the port."""
    store = TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False)
    return store, store.port


def join_store(port: int, size: int) -> TCPStore:
    """Another rank's connection to rank 0's rendezvous server."""
    return TCPStore(_HOST, port, size, is_master=False, wait_for_workers=False)
