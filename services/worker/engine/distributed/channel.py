"""Framed messages between rank 0 and another rank, over one stream socket.

A frame is a one-byte kind, a four-byte little-endian length and the payload. The other side's
death shows as the end of the stream; a host's death as a connection that keep-alives find broken.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from enum import IntEnum

_HEADER = struct.Struct("<BI")

# A silent host is given up after this time: first probe, then one every second.
_KEEPALIVE_IDLE_S = 2
_KEEPALIVE_PROBES = 6
_UNACKNOWLEDGED_MS = 8000


class RankLostError(RuntimeError):
    """A rank of the group died or does not answer."""


class Kind(IntEnum):
    """What a frame says; the payload is in parentheses."""

    # From the other rank: it is up (RankHello); it starts as told; its shard is loaded
    # (RankLoaded); it cannot go on (RankFailed); its process runs.
    HELLO = 1
    STARTED = 2
    LOADED = 3
    FAILED = 4
    ALIVE = 5
    # From rank 0: how to start (RankStart); what was decided (EnginePlan); then Runner's calls.
    START = 6
    READY = 7
    FORWARD = 8
    SAMPLE = 9
    STOP = 10


class Channel:
    """Owns one end of the socket. Calls block; a closed peer raises RankLostError.

    So does a peer that lets one read or write wait longer than `timeout_s`. Threads may send at
    the same time; one receives.
    """

    def __init__(self, end: socket.socket, timeout_s: float | None = None) -> None:
        end.settimeout(timeout_s)
        if end.family != socket.AF_UNIX:
            _tune(end)
        self._socket = end
        self._sending = threading.Lock()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        try:
            with self._sending:
                self._socket.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise RankLostError(f"cannot send to a rank: {error}") from error

    def receive(self) -> tuple[Kind, bytes]:
        kind, length = _HEADER.unpack(self._read(_HEADER.size))
        return Kind(kind), self._read(length)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether `receive` can go on: a frame or the end of the stream arrived in time."""
        readable, _, _ = select.select([self._socket], [], [], timeout_s)
        return bool(readable)

    def is_broken(self) -> bool:
        """Whether the peer closed or was lost, whatever waits to be received."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        received = 0
        while received < length:
            try:
                count = self._socket.recv_into(view[received:])
            except OSError as error:
                raise RankLostError(f"cannot hear from a rank: {error}") from error
            if count == 0:
                raise RankLostError("a rank closed its connection")
            received += count
        return bytes(buffer)


def _tune(end: socket.socket) -> None:
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
