"""Memory of one GPU that kernels on the host's other GPUs write, through interprocess handles.

Source: CUDA runtime API, "Device Management" (cudaIpc*) and "Peer Device Memory Access".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import Store

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_ANY_TO_ANY = 4
_PATTERN_BYTES = 4096
# cudaDeviceP2PAttr: the device can do atomics on the other's memory, as over NVLink.
_NATIVE_ATOMICS = 3


class PeerMemoryError(RuntimeError):
    """These GPUs cannot write each other's memory."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class PeerMemory:
    """`num_bytes` zeroed bytes on the current device, and those of every other rank.

    `addresses` are by rank, this rank's own among them. All ranks construct it at the same time;
    it raises PeerMemoryError on all of them when it cannot be had on one. `checked` verifies by
    writing to every peer what the driver says about them. The memory is kept to the process's
    end: until all ranks have ended, a peer may still write it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        gpu_ids: list[int],
        num_bytes: int,
        *,
        checked: bool = False,
    ) -> None:
        self._runtime = _runtime()
        self._exchange = _Exchange(store, rank, len(gpu_ids))
        self._rank = rank
        self._own = ctypes.c_void_p()
        self.addresses: list[int] = []
        packed = self._together(lambda: self._export(gpu_ids, num_bytes))
        # Nobody writes before all have zeroed and mapped.
        self._together(lambda: self._map([bytes.fromhex(each) for each in packed]))
        if checked:
            self._together(self._write_to_peers)
            self._together(self._verify)
            self._together(lambda: self._zero(len(gpu_ids) * _PATTERN_BYTES))

    def _together(self, act: Callable[[], str]) -> list[str]:
        """Every rank's result of `act`. Raises PeerMemoryError when it failed on any rank."""
        try:
            said = "+" + act()
        except PeerMemoryError as error:
            said = f"-rank {self._rank}: {error}"
        answers = self._exchange.all(said)
        for answer in answers:
            if answer.startswith("-"):
                raise PeerMemoryError(answer[1:])
        return [answer[1:] for answer in answers]

    def _export(self, gpu_ids: list[int], num_bytes: int) -> str:
        self._check_atomics(gpu_ids)
        self._call("cudaMalloc", ctypes.byref(self._own), ctypes.c_size_t(num_bytes))
        self._zero(num_bytes)
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), self._own)
        return bytes(handle).hex()

    def _check_atomics(self, gpu_ids: list[int]) -> None:
        own = gpu_ids[self._rank]
        for gpu_id in gpu_ids:
            supported = ctypes.c_int(1)
            if gpu_id != own:
                self._call(
                    "cudaDeviceGetP2PAttribute",
                    ctypes.byref(supported),
                    _NATIVE_ATOMICS,
                    own,
                    gpu_id,
                )
            if not supported.value:
                raise PeerMemoryError(f"no link with atomics between GPUs {own} and {gpu_id}")

    def _map(self, handles: list[bytes]) -> str:
        for other, packed in enumerate(handles):
            pointer = self._own
            if other != self._rank:
                pointer = ctypes.c_void_p()
                self._call(
                    "cudaIpcOpenMemHandle",
                    ctypes.byref(pointer),
                    _Handle.from_buffer_copy(packed),
                    _LAZY_PEER_ACCESS,
                )
            assert pointer.value is not None, "the runtime gives an address or an error"
            self.addresses.append(pointer.value)
        return ""

    def _write_to_peers(self) -> str:
        pattern = _pattern(self._rank)
        for address in self.addresses:
            target = ctypes.c_void_p(address + self._rank * _PATTERN_BYTES)
            self._copy(target, pattern)
        return ""

    def _verify(self) -> str:
        received = ctypes.create_string_buffer(_PATTERN_BYTES)
        for other, address in enumerate(self.addresses):
            own = self.addresses[self._rank] + other * _PATTERN_BYTES
            self._copy(received, ctypes.c_void_p(own))
            if received.raw != _pattern(other).raw:
                raise PeerMemoryError(f"what rank {other} wrote did not arrive ({address:#x})")
        return ""

    def _zero(self, num_bytes: int) -> str:
        self._call("cudaMemset", self._own, 0, ctypes.c_size_t(num_bytes))
        self._call("cudaDeviceSynchronize")
        return ""

    def _copy(self, target: Any, source: Any) -> None:
        self._call("cudaMemcpy", target, source, ctypes.c_size_t(_PATTERN_BYTES), _ANY_TO_ANY)
        self._call("cudaDeviceSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._runtime, name)(*arguments)
        if status != 0:
            # Reading the error clears it, so that torch does not come upon it.
            self._runtime.cudaGetLastError()
            reason = self._runtime.cudaGetErrorString(status).decode()
            raise PeerMemoryError(f"{name} failed: {reason}")


class _Exchange:
    """Texts of all ranks, over and over."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._round = 0

    def all(self, text: str) -> list[str]:
        """Every rank's text of this round, in rank order."""
        self._round += 1
        keys = [f"rhizome/peer_memory/{self._round}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], text)
        return [self._store.get(key).decode() for key in keys]


def _pattern(rank: int) -> Any:
    values = bytes((rank * 31 + index * 7) % 251 for index in range(_PATTERN_BYTES))
    return ctypes.create_string_buffer(values, _PATTERN_BYTES)


def _runtime() -> Any:
    """The CUDA runtime that torch loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    library = ctypes.CDLL(f"libcudart.so.{major}")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
