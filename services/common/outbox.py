"""Messages waiting to be written to a multiplexed stream, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from grpc import aio

M = TypeVar("M")

# Ids take at most 5 bytes each; this keeps a message well under MAX_FRAME_BYTES.
MAX_MESSAGE_IDS = 40_000


class WritableStream(Protocol):
    """The writing half of a stream, on either side."""

    async def write(self, message: Any, /) -> None: ...


class Outbox(Generic[M]):
    """Gathers what callers add while the stream is busy into as few messages as fit.

    Adding never waits. One task at a time may `drain`.
    """

    def __init__(self, new_message: Callable[[], M]) -> None:
        self._new_message = new_message
        self._messages: deque[M] = deque()
        self._tail_ids = 0
        self._wake = asyncio.Event()

    def tail(self, num_ids: int = 0) -> M:
        """The newest unsent message with room for `num_ids` token ids more."""
        if not self._messages or self._tail_ids + num_ids > MAX_MESSAGE_IDS:
            self.push(self._new_message())
        self._tail_ids += num_ids
        return self._messages[-1]

    def push(self, message: M) -> None:
        """Add a message of its own."""
        self._messages.append(message)
        self._tail_ids = 0
        self._wake.set()

    @property
    def pending(self) -> Iterable[M]:
        """Messages that were not given to a call yet."""
        return self._messages

    def clear(self) -> None:
        self._messages.clear()
        self._tail_ids = 0

    async def drain(self, call: WritableStream) -> None:
        """Write messages as they come, until cancelled or the call breaks.

        A broken call ends it quietly: whoever reads the call learns why.
        """
        try:
            while True:
                while self._messages:
                    await call.write(self._messages.popleft())
                self._wake.clear()
                await self._wake.wait()
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return
