"""The tensor-parallel process group: collectives among the ranks of one model.

Ranks of one group hold shards of one model and run the same steps in the same order.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroupGloo

from services.worker.engine.distributed.nccl import Communicator

logger = logging.getLogger(__name__)

# How long a collective waits for a rank that is alive but silent. Ranks enter a collective
# within a layer's time of each other; one that died is noticed at once, by its closed socket.
COLLECTIVE_TIMEOUT = timedelta(seconds=20)
_CLOSE_TIMEOUT_S = 3.0


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
        """Leave the group, also when a collective hangs."""


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
    """Ranks on CPUs; `address` is this host's, where the other ranks reach it.

    A dead or silent rank makes the collective raise RuntimeError. It is a process group object of
    its own, not torch.distributed's global one, so that a process can hold several.
    """

    def __init__(self, store: Store, rank: int, size: int, address: str) -> None:
        self.rank = rank
        self.size = size
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
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


class SmallAllReduce(Protocol):
    """All-reduce of small messages without NCCL."""

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether it is for this message: by its size and type alone, so alike on all ranks."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""


class NcclGroup:
    """Ranks on GPUs. Collectives run on the current stream and may be captured in CUDA graphs.

    They return at once: a dead or silent rank shows only as work that the device never ends.
    """

    def __init__(self, store: Store, communicator: Communicator) -> None:
        self.rank = communicator.rank
        self.size = communicator.size
        self._communicator = communicator
        self._small: SmallAllReduce | None = None
        # Keeps rank 0's server alive as long as the group.
        self._store = store

    def reduce_small_with(self, small: SmallAllReduce) -> None:
        """Leave to `small` what it takes. To be called on all ranks or on none."""
        self._small = small

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._small is not None and self._small.takes(tensor):
            return self._small.all_reduce(tensor)
        self._communicator.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._communicator.all_gather(tensor)
        return parts.movedim(0, -2).flatten(-2)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._communicator.broadcast(tensor)

    def close(self) -> None:
        """CUDA graphs with its collectives must be gone: NCCL waits for them."""
        # Not for ever, though: the process has to be able to end.
        leaving = threading.Thread(target=self._communicator.abort, daemon=True)
        leaving.start()
        leaving.join(_CLOSE_TIMEOUT_S)
        if leaving.is_alive():
            logger.warning("event=nccl_abort_hangs rank=%s", self.rank)
