"""Too many requests, a tenant that floods, clients that leave, a gateway that stands still.

The engine's steps are floored, so that capacity is a matter of slots and not of what the machine
does. Where it is too busy for the floor, steps last longer; rates and latencies are therefore
compared in steps of their time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean

import pytest

from tests.fakes.cluster import Cluster, running_cluster
from tests.faults.resources import MIB, Held, growth, held_by, settle
from tests.faults.traffic import (
    APIS,
    Client,
    Sent,
    client_of,
    closed_loop,
    open_loop,
    quantile,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEP_S = 0.1
SLOTS = 16
# Requests of a service that is as busy as it can be: some wait, none for too long.
SATURATING = 24
MAX_WAIT_S = 3
POOL_TOKENS = 4096
# Chunks of an allocator's arenas, buffers of connections: what a process may gain and keep.
SPARE_MIB = 8.0
NUM_LEAVING = 60
# An engine's pool becomes resident page by page: 4 layers, keys and values, 2 heads of 128 floats.
POOL_MIB = POOL_TOKENS * 4 * 2 * 2 * 128 * 4 / MIB


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(
        num_schedulers=1,
        num_gateways=2,
        num_workers=1,
        step_floor_ms=STEP_S * 1000,
        worker_arguments=(
            *("--max-running-requests", str(SLOTS)),
            *("--max-total-tokens", str(POOL_TOKENS)),
        ),
        scheduler_arguments=("--max-queue-wait-s", str(MAX_WAIT_S)),
    ) as running:
        yield running


def some_tokens(rng: random.Random) -> int:
    """Lengths that differ, so that slots become free one by one."""
    return rng.randint(8, 24)


def mean_step_s(cluster: Cluster, since: float) -> float:
    """Of the steps from then on."""
    return mean(cluster.steps(0, since, time.monotonic()))


def goodput(sent: Sequence[Sent], since: float, until: float) -> float:
    """Tokens a second of requests that ended well, each taken to have come evenly to its end."""
    tokens = 0.0
    for request in sent:
        if request.fate == "ok":
            began = request.ended_s - request.num_tokens * STEP_S
            overlap = min(until, request.ended_s) - max(since, began)
            tokens += request.num_tokens * max(0.0, overlap) / (request.ended_s - began)
    return tokens / (until - since)


async def watch(cluster: Cluster, samples: list[dict[str, Held]]) -> None:
    """Memory of all services, twice a second, for ever."""
    while True:
        samples.append(await asyncio.to_thread(held_by, cluster))
        await asyncio.sleep(0.5)


async def test_ten_times_too_much_costs_no_goodput_and_no_memory(
    cluster: Cluster, fault_scale: float
) -> None:
    seconds = max(6.0, 60 * fault_scale)
    samples: list[dict[str, Held]] = []
    async with client_of(cluster) as client:
        await closed_loop(client, 1, SATURATING, some_tokens)
        began = time.monotonic()
        at_peak = await closed_loop(client, 2 + seconds / 2, SATURATING, some_tokens)
        peak_until = max(sent.began_s for sent in at_peak)
        peak = goodput(at_peak, began + 2, peak_until) * mean_step_s(cluster, began)
        rate = sum(sent.fate == "ok" for sent in at_peak) / (peak_until - began)
        watching = asyncio.create_task(watch(cluster, samples))
        began = time.monotonic()
        flooded = await open_loop(client, seconds, 10 * rate, some_tokens)
        watching.cancel()
        kept = goodput(flooded, began + 2, began + seconds) * mean_step_s(cluster, began)
        assert await settle(cluster) == {}
    fates = Counter(sent.fate for sent in flooded)
    grown = growth(samples[len(samples) // 3], samples[-1])
    print(f"peak {peak:.1f} tokens a step, {rate:.1f} requests/s; kept {kept:.1f}: {fates}")
    print(f"MiB grown in the last two thirds: {grown}")
    assert {sent.fate for sent in at_peak} <= {"ok", "shed"}
    assert set(fates) == {"ok", "shed"}
    for api in APIS:
        assert {sent.fate for sent in flooded if sent.api == api} == {"ok", "shed"}
    assert kept >= 0.9 * peak
    assert_flat(grown)


def assert_flat(grown: dict[str, float]) -> None:
    for name, mib in grown.items():
        assert mib <= SPARE_MIB + (POOL_MIB if name.endswith("engine") else 0), (name, mib)


async def test_a_flooding_tenant_slows_nobody_else(cluster: Cluster, fault_scale: float) -> None:
    seconds = max(5.0, 60 * fault_scale)
    async with client_of(cluster) as client:

        async def p99_steps() -> float:
            """Of three tenants that send less than their shares: steps made during a request."""
            sent = await closed_loop(
                client, seconds, 6, lambda rng: 30, tenant=lambda index: f"quiet-{index % 3}"
            )
            assert {request.fate for request in sent} == {"ok"}
            steps = [len(cluster.steps(0, one.began_s, one.ended_s)) for one in sent]
            print(f"steps of quiet requests, the slowest: {sorted(steps)[-5:]}")
            return quantile(steps, 0.99)

        alone = await p99_steps()
        flooding = asyncio.create_task(
            open_loop(client, 3 + seconds, 60, lambda rng: rng.randint(1, 15), tenant="flood")
        )
        await asyncio.sleep(3)
        beside = await p99_steps()
        fates = Counter(request.fate for request in await flooding)
        assert await settle(cluster) == {}
    print(f"p99 {alone} steps alone, {beside} beside the flood: {fates}")
    # It was a flood: not all of it could be served.
    assert set(fates) == {"ok", "shed"}
    assert beside <= 1.5 * alone


async def test_clients_that_leave_leave_nothing_behind(
    cluster: Cluster, fault_scale: float
) -> None:
    number = max(200, round(10_000 * fault_scale))

    async def leave(number: int, seed: int) -> None:
        async with client_of(cluster) as client:
            await asyncio.gather(
                *(
                    leave_often(client, cluster, -(-number // NUM_LEAVING), seed + index)
                    for index in range(NUM_LEAVING)
                )
            )

    await leave(number // 10, 0)
    assert await settle(cluster) == {}
    before = held_by(cluster)
    await leave(number, 1000)
    assert await settle(cluster) == {}
    after = held_by(cluster)
    grown = growth(before, after)
    opened = {name: after[name].num_fds - held.num_fds for name, held in before.items()}
    print(f"MiB grown: {grown}; descriptors: {opened}")
    assert_flat(grown)
    assert max(opened.values()) <= 2
    async with client_of(cluster) as client:
        assert {(await client.ask(api, "And now?", 4)).fate for api in APIS} == {"ok"}


async def leave_often(client: Client, cluster: Cluster, times: int, seed: int) -> None:
    """Ask and go away, at any moment of a request's life; who was answered before did not leave."""
    rng = random.Random(seed)
    num_left = 0
    while num_left < times:
        patience_s = 1.5 * rng.random() ** 3
        if rng.random() < 0.2:
            await leave_rudely(cluster, rng, patience_s)
            num_left += 1
            continue
        prompt = f"Count {rng.randrange(10**6)} sheep." * rng.choice([1, 1, 30])
        try:
            async with asyncio.timeout(patience_s):
                await client.ask(rng.choice(APIS), prompt, rng.randint(1, 100))
        except TimeoutError:
            num_left += 1


async def leave_rudely(cluster: Cluster, rng: random.Random, patience_s: float) -> None:
    """Send a request or a part of it, read nothing, and reset the connection."""
    port = int(rng.choice(cluster.urls).rpartition(":")[2])
    stream = rng.choice(["true", "false"])
    body = f'{{"text": "Rude", "stream": {stream}, "sampling_params": {{"max_new_tokens": 50}}}}'
    request = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"content-type: application/json\r\n\r\n{body}"
    )
    length = len(request) if rng.random() < 0.7 else rng.randrange(len(request))
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request[:length].encode())
    await asyncio.sleep(patience_s)
    writer.transport.abort()


async def test_a_gateway_that_stands_still_slows_no_other(
    cluster: Cluster, fault_scale: float
) -> None:
    """Half of the streams go through a gateway that is stopped, then goes on.

    Times between pieces are held against the steps behind them, which no gateway can delay. Three
    times, of which the middle one counts: something else may keep the machine busy once.
    """
    seconds = max(1.5, 20 * fault_scale)
    ratios = [await halt(cluster, seconds) for _ in range(3)]
    assert sorted(ratios)[1] <= 1.2


async def halt(cluster: Cluster, seconds: float) -> float:
    """How much longer the other gateway's p99 between pieces is, in p99 steps, while one stands."""
    num_tokens = round((2 * seconds + 1.5) / STEP_S)
    halted = cluster.process("gateway-0")
    async with client_of(cluster) as client:
        streams = [
            asyncio.create_task(client.ask("grpc", f"Story {index}", num_tokens, gateway=gateway))
            for index in range(SLOTS // 2)
            for gateway in range(2)
        ]
        await asyncio.sleep(1)
        times = [time.monotonic()]
        await asyncio.sleep(seconds)
        try:
            halted.suspend()
            times.append(time.monotonic())
            await asyncio.sleep(seconds)
            times.append(time.monotonic())
        finally:
            halted.resume()
        sent = await asyncio.gather(*streams)
        assert await settle(cluster) == {}
    gaps = [gap for stream in sent[1::2] for gap in stream.gaps_s]
    ratios = []
    for since, until in zip(times, times[1:], strict=False):
        gap_s = quantile([gap for at, gap in gaps if since <= at < until], 0.99)
        step_s = quantile(cluster.steps(0, since, until), 0.99)
        print(f"p99 between pieces {gap_s * 1e3:.1f} ms, of steps {step_s * 1e3:.1f} ms")
        ratios.append(gap_s / step_s)
    before, during = ratios
    assert {stream.fate for stream in sent} == {"ok"}
    # Those of the halted gateway lost nothing by it.
    assert [one.token_ids for one in sent[::2]] == [one.token_ids for one in sent[1::2]]
    assert max(gap for stream in sent[::2] for _, gap in stream.gaps_s) >= 0.9 * seconds
    return during / before
