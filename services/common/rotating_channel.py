"""A gRPC channel that outlives its certificate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
from grpc import aio

Key = TypeVar("Key")

# How often whoever waits for a connection looks whether it should be made with a new certificate.
_WAIT_S = 1.0


class RotatingChannel(aio.Channel, Generic[Key]):
    """Makes each call on the channel that `connect` made for what `current` gives.

    When that changes, new calls go to a new channel, and the old one is closed when its last call
    has ended: calls are never cut off for the change's sake.
    """

    def __init__(self, current: Callable[[], Key], connect: Callable[[Key], aio.Channel]) -> None:
        self._current = current
        self._connect = connect
        self._key = current()
        self._newest = _Connection(connect(self._key))
        self._retired: set[_Connection] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def num_retired(self) -> int:
        """Old channels whose calls have not ended."""
        return len(self._retired)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        self._is_closed = True
        connections = (self._newest, *self._retired)
        self._retired.clear()
        await asyncio.gather(
            *(connection.channel.close(grace) for connection in connections), *self._closing
        )

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._connection().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._connection().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_WAIT_S):
                    return await self._connection().channel.channel_ready()
            except TimeoutError:
                continue

    def unary_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        return self._caller("unary_unary", method, serializers, options)

    def unary_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        return self._caller("unary_stream", method, serializers, options)

    def stream_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        return self._caller("stream_unary", method, serializers, options)

    def stream_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        return self._caller("stream_stream", method, serializers, options)

    def _caller(
        self, kind: str, method: str, serializers: tuple[Any, ...], options: dict[str, Any]
    ) -> Callable[..., Any]:
        """Stubs ask for each method once; what they get finds the channel of the time."""
        made_on: _Connection | None = None
        callee: Any = None

        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal made_on, callee
            connection = self._connection()
            if connection is not made_on:
                made_on = connection
                callee = getattr(connection.channel, kind)(method, *serializers, **options)
            made = callee(*arguments, **settings)
            connection.num_calls += 1
            made.add_done_callback(lambda _: self._end_call(connection))
            return made

        return call

    def _connection(self) -> _Connection:
        key = self._current()
        if key is not self._key and not self._is_closed:
            old, self._key = self._newest, key
            self._newest = _Connection(self._connect(key))
            self._retired.add(old)
            self._close_unused(old)
        return self._newest

    def _end_call(self, connection: _Connection) -> None:
        connection.num_calls -= 1
        self._close_unused(connection)

    def _close_unused(self, connection: _Connection) -> None:
        if connection.num_calls == 0 and connection in self._retired:
            self._retired.remove(connection)
            closing = asyncio.ensure_future(connection.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


class _Connection:
    """A channel and the number of its calls that have not ended."""

    def __init__(self, channel: aio.Channel) -> None:
        self.channel = channel
        self.num_calls = 0
