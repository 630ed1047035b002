"""What the processes of a cluster hold: memory, file descriptors, requests, pages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import psutil

from tests.fakes.cluster import Cluster

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Held:
    """One process's resident memory and open file descriptors."""

    rss_mib: float
    num_fds: int


def held_by(cluster: Cluster) -> dict[str, Held]:
    """Of every service, the engines of workers apart."""
    return {
        name: Held(process.memory_info().rss / MIB, process.num_fds())
        for name, process in _processes(cluster)
    }


def _processes(cluster: Cluster) -> Iterator[tuple[str, psutil.Process]]:
    for name in cluster.processes:
        process = cluster.process(name)
        yield name, process
        if name.startswith("worker"):
            for child in process.children():
                yield f"{name}/engine", child


def growth(before: dict[str, Held], after: dict[str, Held]) -> dict[str, float]:
    """MiB of resident memory that each process has more."""
    return {name: after[name].rss_mib - held.rss_mib for name, held in before.items()}


async def leftovers(cluster: Cluster) -> dict[str, float]:
    """What is held for requests anywhere, by name; empty when there is nothing."""
    found: dict[str, float] = {}
    for number, url in enumerate(cluster.urls):
        found[f"gateway-{number} prompts"] = await asyncio.to_thread(
            cluster.metric, number, "rhizome_gateway_inflight_prompts"
        )
        async with aiohttp.request("GET", f"{url}/get_server_info") as reply:
            info = await reply.json()
    for state in info["internal_states"]:
        for name in ("num_running", "num_waiting", "num_handles"):
            found[f"{state['worker_id']} {name}"] = state[name]
    num_pages = info["max_total_num_tokens"] // info["page_size"]
    held = num_pages - sum(
        state["num_free_pages"] + state["num_evictable_pages"] for state in info["internal_states"]
    )
    found["pages"] = held
    for name in ("reservations", "reservations_charged", "tenants_waiting"):
        found[f"scheduler {name}"] = await asyncio.to_thread(
            cluster.service_metric, "scheduler-0", f"rhizome_scheduler_{name}"
        )
    return {name: value for name, value in found.items() if value}


async def settle(cluster: Cluster, timeout_s: float = 30.0) -> dict[str, float]:
    """Wait until nothing is held for requests; what is left when that does not come."""
    deadline = time.monotonic() + timeout_s
    while (left := await leftovers(cluster)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return left
