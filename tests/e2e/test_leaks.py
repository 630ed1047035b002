"""Clients that leave or stall cost nobody else anything, and nothing of theirs stays behind."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import aiohttp
import pytest

from tests.e2e.system import System

NUM_STREAMS = 64
STALL_S = 20.0


def body(index: int, num_tokens: int) -> dict[str, Any]:
    return {
        "model": "default",
        "messages": [{"role": "user", "content": f"Count from {index} to 100."}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }


async def read_stream(
    client: aiohttp.ClientSession, url: str, index: int, leave_after: int | None = None
) -> str:
    """The text of one stream; drops the connection after `leave_after` chunks."""
    text, num_chunks = "", 0
    async with client.post(f"{url}/v1/chat/completions", json=body(index, 120)) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
            num_chunks += 1
            if num_chunks == leave_after:
                assert response.connection is not None
                response.connection.close()
                return text
    return text


def stalled_reader(system: System) -> socket.socket:
    """A client that asks for a long stream and reads none of it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", system.port))
    payload = json.dumps({**body(1, 3500), "n": 4}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    client.sendall(head.encode() + payload)
    return client


async def settled_state(client: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The worker's counters once nothing runs, or as they are after 30 s."""
    for _ in range(300):
        async with client.get(f"{url}/get_server_info") as response:
            info = await response.json()
        (state,) = info["internal_states"]
        state["num_pages"] = info["max_total_num_tokens"] // info["page_size"]
        if not state["num_running"] and not state["num_handles"]:
            return dict(state)
        await asyncio.sleep(0.1)
    return dict(state)


@pytest.mark.timeout(240)
async def test_leaving_and_stalling_clients_leave_nothing_and_disturb_nobody(
    system: System,
) -> None:
    timeout = aiohttp.ClientTimeout(total=180)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        staying = range(0, NUM_STREAMS, 2)
        undisturbed = await asyncio.gather(
            *(read_stream(client, system.url, index) for index in staying)
        )
        stalled = stalled_reader(system)
        streams = [
            read_stream(client, system.url, index, None if index % 2 == 0 else 3 + index % 7)
            for index in range(NUM_STREAMS)
        ]
        texts = await asyncio.gather(*streams)
        assert texts[::2] == undisturbed
        await asyncio.sleep(STALL_S)
        stalled.close()
        state = await settled_state(client, system.url)
        assert state["num_running"] == 0
        assert state["num_waiting"] == 0
        assert state["num_handles"] == 0
        assert state["num_free_pages"] + state["num_evictable_pages"] == state["num_pages"]
        async with client.get(f"{system.url}/health_generate") as response:
            assert response.status == 200
