"""Host arrays to the device without waiting for it.

Pinned memory comes from torch's host allocator, which gives a block out again only after the
copies that read it have finished, so steps in flight never share one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def upload(device: torch.device, *arrays: npt.NDArray[np.integer]) -> tuple[torch.Tensor, ...]:
    """One-dimensional arrays -> int64 tensors on `device`, in a single copy."""
    packed = torch.from_numpy(np.concatenate(arrays, dtype=np.int64))
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return torch.split(packed, [len(array) for array in arrays])


def upload_array(device: torch.device, array: npt.NDArray[np.integer]) -> torch.Tensor:
    """An array -> a tensor of its shape and type on `device`."""
    values = torch.from_numpy(array)
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def upload_into(target: torch.Tensor, values: npt.NDArray[np.integer]) -> None:
    """Overwrite `target`, of the same shape and type."""
    source = torch.from_numpy(values)
    if target.device.type != "cpu":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
