"""Hosts above 0 learn of host 0's end, also when it cannot say so."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from services.common.peer_tls import peer_tls
from services.launch.hosts import HostUnreachableError, lifetime_shown, until_node_0_ends
from tests.fakes.certificates import Authority, files_of


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


async def test_host_0_says_that_it_ends() -> None:
    address = free_address()
    follower = asyncio.create_task(until_node_0_ends(address))
    async with lifetime_shown(address):
        await asyncio.wait([follower], timeout=2)
        assert not follower.done()
    await asyncio.wait_for(follower, 10)


async def test_host_0_says_so_over_tls(tmp_path: Path) -> None:
    address = free_address()
    files = files_of(tmp_path, Authority())
    async with peer_tls(files.flags()) as tls:
        async with lifetime_shown(address, tls):
            follower = asyncio.create_task(until_node_0_ends(address, tls=tls))
            with pytest.raises(HostUnreachableError):
                await until_node_0_ends(address, first_contact_s=0.1)
            await asyncio.wait([follower], timeout=2)
            assert not follower.done()
        await asyncio.wait_for(follower, 10)


async def test_a_host_0_that_is_never_heard_of_is_named() -> None:
    address = free_address()
    with pytest.raises(HostUnreachableError, match=address):
        await until_node_0_ends(address, first_contact_s=0.1)


async def test_a_host_0_that_goes_without_a_word_is_lost_after_a_while() -> None:
    address = free_address()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SERVER, address), stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    await server.stdout.readline()
    follower = asyncio.create_task(until_node_0_ends(address, lost_after_s=0.5))
    await asyncio.wait([follower], timeout=2)
    assert not follower.done()
    server.kill()
    await server.wait()
    with pytest.raises(HostUnreachableError):
        await asyncio.wait_for(follower, 30)


_SERVER = """
import asyncio, sys
from services.common.peer_tls import peer_tls
from services.launch.hosts import lifetime_shown
async def main():
    async with lifetime_shown(sys.argv[1]):
        print("up", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
