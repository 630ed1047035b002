"""NCCL's collectives on the current stream, through its C interface.

torch.distributed's own NCCL group watches every collective with events from another thread, for
which each graph capture has to wait; this one adds nothing to the stream but the collective.
The library is the one that torch loads.

Source: NCCL's nccl.h (user guide, "API").
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from services.common.config import set_default_environment

# Multicast over NVLink needs a fabric manager that allows it, and can stall a host without.
_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}

_LIBRARY = "libnccl.so.2"
_ID_KEY = "rhizome/nccl_id"
_ID_BYTES = 128
_SUM = 0
# ncclDataType_t.
_TYPES = {
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}


class NcclError(RuntimeError):
    """NCCL refused a call."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


class Communicator:
    """Owns one NCCL communicator on the current device; the constructor waits for all ranks.

    Tensors are contiguous and on that device.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        # NCCL reads its environment when it is first used.
        set_default_environment(_ENVIRONMENT)
        self._library = _load()
        unique_id = _UniqueId()
        if rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique_id))
            store.set(_ID_KEY, bytes(unique_id).hex())
        else:
            packed = bytes.fromhex(store.get(_ID_KEY).decode())
            ctypes.memmove(ctypes.byref(unique_id), packed, _ID_BYTES)
        self._handle = ctypes.c_void_p()
        self._call("ncclCommInitRank", ctypes.byref(self._handle), size, unique_id, rank)
        # Connections are made by the first collective, which must not be a captured one.
        self.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over ranks, in place."""
        _check(tensor)
        self._call(
            "ncclAllReduce",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_size_t(tensor.numel()),
            _TYPES[tensor.dtype],
            _SUM,
            self._open(),
            _stream(),
        )

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] -> [size, ...]"""
        _check(tensor)
        parts = tensor.new_empty((self.size, *tensor.shape))
        self._call(
            "ncclAllGather",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_void_p(parts.data_ptr()),
            ctypes.c_size_t(tensor.numel()),
            _TYPES[tensor.dtype],
            self._open(),
            _stream(),
        )
        return parts

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite with rank 0's."""
        _check(tensor)
        self._call(
            "ncclBroadcast",
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_size_t(tensor.numel()),
            _TYPES[tensor.dtype],
            0,
            self._open(),
            _stream(),
        )

    def abort(self) -> None:
        """End it, and every collective that still waits for another rank."""
        if self._handle:
            self._call("ncclCommAbort", self._handle)
            self._handle = ctypes.c_void_p()

    def _open(self) -> ctypes.c_void_p:
        assert self._handle, "no collective after abort()"
        return self._handle

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            reason = self._library.ncclGetErrorString(status).decode()
            raise NcclError(f"{name} failed: {reason}")


def _load() -> ctypes.CDLL:
    """Raises ValueError where torch came without NCCL."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ValueError(f"tp_size > 1 on GPUs needs NCCL, which did not load: {error}") from error
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _check(tensor: torch.Tensor) -> None:
    assert tensor.is_contiguous(), "NCCL takes contiguous memory"


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
