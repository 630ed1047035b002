"""A network between services that a drill can cut, partition, delay and make lossy.

A user-space TCP proxy: each link listens on a port of its own and passes bytes on to one service.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

_T = TypeVar("_T")

_CHUNK_BYTES = 65536
# Pieces under way before the sender has to wait.
_MAX_UNDER_WAY = 256
# Linux sends a lost segment again after this long, and twice as long each further time.
_FIRST_RETRANSMISSION_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What happens to each piece of bytes, in both directions."""

    delay_s: float = 0.0
    # Share of pieces that are lost. TCP sends these again, so those behind them wait too.
    loss: float = 0.0
    # Nothing passes, not even the end of a connection; what was sent arrives when it is over.
    partitioned: bool = False


FINE = Condition()


class Link:
    """All connections to one service through one port; lives in its network's thread."""

    def __init__(self, target: str) -> None:
        self.port = 0
        self._target = target.removeprefix("unix:")
        self._condition = FINE
        # Whose connections meet the condition; None for everybody's.
        self._only: psutil.Process | None = None
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._random = random.Random(0)

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def set(self, condition: Condition, only: psutil.Process | None) -> None:
        self._condition, self._only = condition, only
        for connection in self._connections:
            connection.is_meant = self._is_meant(connection.port)
        self._changed.set()
        self._changed = asyncio.Event()

    def cut(self, only: psutil.Process | None) -> int:
        """Reset connections that are open; new ones are welcome. Returns how many there were."""
        doomed = [c for c in self._connections if only is None or _owns(only, c.port)]
        for connection in doomed:
            connection.abort()
        return len(doomed)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        connection = _Connection(port, self._is_meant(port), [writer])
        self._connections.add(connection)
        try:
            await self._until_passable(connection)
            far_reader, far_writer = await asyncio.open_unix_connection(self._target)
            connection.writers.append(far_writer)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._carry(connection, reader, far_writer))
                ways.create_task(self._carry(connection, far_reader, writer))
        except* OSError:
            # Either end is gone: so is the connection.
            pass
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _carry(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One direction, to its end."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_UNDER_WAY)

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(due - loop.time())
                await self._until_passable(connection)
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(deliver())
            data = b"-"
            while data:
                data = await reader.read(_CHUNK_BYTES)
                await under_way.put((loop.time() + self._transit_s(connection), data))

    def _transit_s(self, connection: _Connection) -> float:
        if not connection.is_meant:
            return 0.0
        transit_s, resend_s = self._condition.delay_s, _FIRST_RETRANSMISSION_S
        while self._random.random() < self._condition.loss:
            transit_s += resend_s
            resend_s *= 2
        return transit_s

    async def _until_passable(self, connection: _Connection) -> None:
        while self._condition.partitioned and connection.is_meant:
            await self._changed.wait()

    def _is_meant(self, port: int) -> bool:
        return self._only is None or _owns(self._only, port)


@dataclass(eq=False, slots=True)
class _Connection:
    # Of the client's end.
    port: int
    is_meant: bool
    writers: list[asyncio.StreamWriter]

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


def _owns(process: psutil.Process, port: int) -> bool:
    """Whether a connection's end belongs to the process."""
    return any(c.laddr.port == port for c in process.net_connections("tcp"))


class Network:
    """The links between services, by (client, server), and the thread that carries their bytes."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def route(self, client: str, address: str) -> str:
        """A new link to `unix:.../server.sock`; returns its address."""
        server = address.rpartition("/")[2].removesuffix(".sock")
        link = Link(address)
        self._links[client, server] = link
        self._servers.append(self._run(link.listen()))
        return f"127.0.0.1:{link.port}"

    def links(self, client: str, server: str) -> list[Link]:
        """Those whose ends' names start so."""
        found = [
            link
            for (one, other), link in self._links.items()
            if one.startswith(client) and other.startswith(server)
        ]
        assert found, f"nothing links {client} with {server}"
        return found

    def set(
        self, links: list[Link], condition: Condition, only: psutil.Process | None = None
    ) -> None:
        """Let links be so, for the connections of one client, or of all."""

        async def apply() -> None:
            for link in links:
                link.set(condition, only)

        self._run(apply())

    def cut(self, links: list[Link], only: psutil.Process | None = None) -> int:
        """Reset the connections that are open; returns how many there were."""

        async def apply() -> int:
            return sum(link.cut(only) for link in links)

        return self._run(apply())

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@contextlib.contextmanager
def running_network() -> Iterator[Network]:
    network = Network()
    try:
        yield network
    finally:
        network.close()
