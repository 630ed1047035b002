"""Framed messages between rank 0 and another rank, over one stream socket.

A frame is a one-byte kind, a four-byte little-endian length and the payload. The other side's
death shows as the end of the stream.
"""

from __future__ import annotations

import select
import socket
import struct
from enum import IntEnum

_HEADER = struct.Struct("<BI")


class RankLostError(RuntimeError):
    """A rank of the group died or does not answer."""


class Kind(IntEnum):
    """What a frame says; the payload is in parentheses."""

    # From the other rank: it is up; its shard is loaded (RankLoaded); it cannot go on (reason).
    HELLO = 1
    LOADED = 2
    FAILED = 3
    # From rank 0: how to start (RankStart); what was decided (EnginePlan); then Runner's calls.
    START = 4
    READY = 5
    FORWARD = 6
    SAMPLE = 7
    STOP = 8


class Channel:
    """Owns one end of the socket. Calls block; a closed peer raises RankLostError.

    So does a peer that lets one read or write wait longer than `timeout_s`.
    """

    def __init__(self, end: socket.socket, timeout_s: float | None = None) -> None:
        end.settimeout(timeout_s)
        self._socket = end

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        try:
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
