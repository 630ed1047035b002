"""A cache index that restarts: refilled by its workers, against a snapshot in Redis. Prints JSON.

    python -m bench.index_restart [--pages 1000000] [--workers 64]

`workers` is the time from an empty index that has heard of its workers until it holds every page,
through gRPC, with the index as a process of its own. `redis` is the least that a snapshot in Redis
could take: one value read from a redis-server on this host, decoded and stored, with nothing
checked against the workers' streams. Needs `redis-server` on the path.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from typing import Any

from redis.asyncio import Redis

from bench.cache_index import Fleet, random_chains, serve
from rhizome.cache_index.v1 import cache_index_service_pb2 as index_pb
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import CacheIndexServiceStub
from services.cache_index.index import GPU, PrefixIndex
from services.common.process import run
from services.common.rpc import open_channel


async def from_workers(pages: int, workers: int) -> dict[str, float]:
    """An empty index learns everything from the workers' snapshots."""
    fleet = Fleet(workers, pages)
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        for number in range(workers + 1):
            address = f"unix:{directory}/{number}.sock"
            if number:
                fleet.addresses.append(address)
            await stack.enter_async_context(serve(fleet, address))
        listen = f"unix:{directory}/index.sock"
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cache_index", "--listen", listen),
            *("--scheduler", f"unix:{directory}/0.sock", "--log-level", "warning"),
        )
        try:
            channel = await stack.enter_async_context(open_channel(listen))
            await channel.channel_ready()
            ready = time.monotonic()
            stub: Any = CacheIndexServiceStub(channel)
            half_s = 0.0
            while True:
                status = await stub.GetIndexStatus(index_pb.GetIndexStatusRequest())
                now = time.monotonic() - ready
                if not half_s and status.num_prefixes >= fleet.num_pages // 2:
                    half_s = now
                if status.num_prefixes >= fleet.num_pages:
                    break
                await asyncio.sleep(0.01)
            return {
                "process_start_s": round(ready - started, 2),
                "half_of_the_pages_s": round(half_s, 2),
                "all_pages_s": round(now, 2),
            }
        finally:
            process.terminate()
            await process.wait()


async def from_redis(pages: int, workers: int) -> dict[str, float]:
    """Read one value with every page's hash and parent and store them, worker by worker."""
    rng = random.Random(2)
    snapshot = array.array("Q")
    for _ in range(workers):
        for chain in random_chains(pages // workers, rng):
            snapshot.extend(chain)
    chain_len = 256
    with tempfile.TemporaryDirectory() as directory:
        socket = f"{directory}/redis.sock"
        process = await asyncio.create_subprocess_exec(
            *("redis-server", "--port", "0", "--unixsocket", socket, "--save", ""),
            *("--dir", directory),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            client = Redis(unix_socket_path=socket)
            while True:
                with contextlib.suppress(Exception):
                    await client.ping()
                    break
                await asyncio.sleep(0.02)
            await client.set("snapshot", snapshot.tobytes())
            start = time.monotonic()
            value = await client.get("snapshot")
            read_s = time.monotonic() - start
            hashes = array.array("Q", value)
            index = PrefixIndex(2 * pages)
            holders = [index.add_holder(f"worker-{number}", 1) for number in range(workers)]
            share = len(hashes) // workers
            for number, holder in enumerate(holders):
                for at in range(number * share, (number + 1) * share, chain_len):
                    index.store(holder, GPU, 0, hashes[at : at + chain_len])
            all_s = time.monotonic() - start
            await client.aclose()
            return {"read_s": round(read_s, 2), "all_pages_s": round(all_s, 2)}
        finally:
            process.terminate()
            await process.wait()


async def _main(pages: int, workers: int) -> None:
    result = {
        "pages": pages,
        "workers": workers,
        "from_workers": await from_workers(pages, workers),
        "from_redis": await from_redis(pages, workers),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    arguments = parser.parse_args()
    run(_main(arguments.pages, arguments.workers))
