"""How a layer states the checkpoint tensors it is made of and takes its shard of each."""

from __future__ import annotations

from types import EllipsisType
from typing import TYPE_CHECKING, Protocol

import torch

from services.worker.engine.distributed.group import TpGroup
from services.worker.engine.layers.fused import FusedKernels

if TYPE_CHECKING:
    from services.worker.engine.layers.fp8 import Fp8Scheme

# Fewest rows of a linear layer's input on a CPU: one row alone takes another path through MKL.
MIN_CPU_ROWS = 2
_MAX_COLUMN_FEATURES = 768


class Placement:
    """Where a layer's tensors live, and which shard of them this rank holds.

    Counts the bytes of the tensors that it makes.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        group: TpGroup,
        fp8: Fp8Scheme | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.group = group
        # How linear layers are kept in FP8; None keeps all in `dtype`.
        self.fp8 = fp8
        # Stands in where a device and type have no fused kernels; None leaves that to torch.
        self.compiled: FusedKernels | None = None
        self.num_bytes = 0

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised parameter, of the model's type unless another is named."""
        tensor = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        self.num_bytes += tensor.nbytes
        return tensor

    def empty_matrix(self, out_features: int, in_features: int) -> torch.Tensor:
        """An uninitialised [out_features, in_features] weight of a linear layer."""
        if self.stores_columns(in_features):
            return self.empty(in_features, out_features).t()
        return self.empty(out_features, in_features)

    def stores_columns(self, in_features: int) -> bool:
        """Whether a linear layer's weight is laid out by columns.

        Up to so many input features, MKL's float32 product then takes a quarter less time, and
        a row's bits do not depend on how many rows there are, if at least MIN_CPU_ROWS.
        """
        is_narrow = in_features <= _MAX_COLUMN_FEATURES
        return self.device.type == "cpu" and self.dtype == torch.float32 and is_narrow


class StoredTensor(Protocol):
    """A checkpoint's tensor, which may be read only where it is indexed (as torch's are)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: slice | EllipsisType | tuple[slice, slice]) -> torch.Tensor: ...


class Layer(Protocol):
    """A layer with parameters."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every checkpoint tensor of this layer, by name within the layer."""

    def load(self, name: str, tensor: StoredTensor) -> None:
        """Take this rank's shard of a full tensor named by `tensors`.

        Different tensors are loaded by several threads at a time.
        """


def shard_size(total: int, group: TpGroup, what: str) -> int:
    """`total` divided among the ranks. Raises ValueError when it does not divide."""
    if total % group.size:
        raise ValueError(f"{what} ({total}) does not divide by tp_size {group.size}")
    return total // group.size
