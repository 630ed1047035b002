"""What kube-proxy does: passes connections to a Service's address on to one of its pods.

    python -m tests.cluster.relay FILE

The JSON file has, by address to listen at, the addresses to pass on to; it is read again for each
connection, so the latter may change.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from pathlib import Path

_turns = itertools.count()


async def _relay(table: Path) -> None:
    servers = []
    for address in json.loads(table.read_text()):

        async def accept(
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
            address: str = address,
        ) -> None:
            await _pass_on(json.loads(table.read_text()).get(address, []), reader, writer)

        host, _, port = address.rpartition(":")
        servers.append(await asyncio.start_server(accept, host, int(port)))
    print("event=ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def _pass_on(
    targets: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """To the targets in turn; one that is not there is passed over, as it would not be ready."""
    turn = next(_turns)
    try:
        for number in range(len(targets)):
            host, _, port = targets[(turn + number) % len(targets)].rpartition(":")
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
                await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))
                return
    finally:
        writer.transport.abort()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


if __name__ == "__main__":
    asyncio.run(_relay(Path(sys.argv[1])))
