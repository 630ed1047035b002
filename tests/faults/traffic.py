"""Clients of both public APIs that note what became of each request, and when its tokens came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
import grpc

from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.inference.v1.inference_service_pb2 import GenerateRequest
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.fakes.cluster import Cluster

Api = Literal["stream", "whole", "grpc"]
APIS: tuple[Api, ...] = ("stream", "whole", "grpc", "stream")


@dataclass(slots=True)
class Sent:
    """One request and its fate. Times are monotonic seconds."""

    api: Api
    num_tokens: int
    began_s: float = 0.0
    ended_s: float = 0.0
    # "ok", "shed" for a refusal with a hint when to come back, or what went wrong.
    fate: str = ""
    # When each piece of output came, and what they said together; token ids over gRPC only.
    pieces_s: list[float] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.began_s

    @property
    def gaps_s(self) -> list[tuple[float, float]]:
        """(when a piece came, seconds since the one before)."""
        return [
            (later, later - earlier)
            for earlier, later in zip(self.pieces_s, self.pieces_s[1:], strict=False)
        ]


class Client:
    """Asks the gateways of a cluster in turn. Owns its connections."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        stubs: Sequence[InferenceServiceStub],
    ) -> None:
        self._http = http
        self._urls = urls
        self._stubs = stubs
        self._num_sent = 0

    async def ask(
        self,
        api: Api,
        prompt: str,
        num_tokens: int,
        *,
        tenant: str = "",
        gateway: int | None = None,
    ) -> Sent:
        """One greedy request of exactly so many tokens, all of them text, to its end."""
        index = self._num_sent % len(self._urls) if gateway is None else gateway
        self._num_sent += 1
        sent = Sent(api, num_tokens, began_s=time.monotonic())
        try:
            if api == "grpc":
                sent.fate = await self._ask_grpc(self._stubs[index], sent, prompt, tenant)
            else:
                sent.fate = await self._ask_http(self._urls[index], sent, prompt, tenant)
        except aiohttp.ClientError as error:
            sent.fate = f"{type(error).__name__}: {error}"
        sent.ended_s = time.monotonic()
        return sent

    async def _ask_http(self, url: str, sent: Sent, prompt: str, tenant: str) -> str:
        body = {
            "model": "default",
            "prompt": prompt,
            "max_tokens": sent.num_tokens,
            "min_tokens": sent.num_tokens,
            "temperature": 0,
            "stream": sent.api == "stream",
        }
        headers = {"x-tenant-id": tenant} if tenant else {}
        async with self._http.post(f"{url}/v1/completions", json=body, headers=headers) as reply:
            if reply.status == 429 and int(reply.headers.get("retry-after", "0")) >= 1:
                return "shed"
            if reply.status != 200:
                return f"{reply.status}: {await reply.text()}"
            if sent.api == "whole":
                sent.text = (await reply.json())["choices"][0]["text"]
                return "ok"
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return f"in the stream: {chunk['error']}"
                    sent.pieces_s.append(time.monotonic())
                    sent.text += "".join(choice["text"] for choice in chunk["choices"])
                elif line.startswith(b"data: [DONE]"):
                    return "ok"
        return "the stream ended without its last event"

    async def _ask_grpc(
        self, stub: InferenceServiceStub, sent: Sent, prompt: str, tenant: str
    ) -> str:
        call = stub.Generate(
            GenerateRequest(
                text=prompt,
                sampling=SamplingParams(
                    temperature=0, max_new_tokens=sent.num_tokens, min_new_tokens=sent.num_tokens
                ),
            ),
            metadata=(("x-tenant-id", tenant),) if tenant else (),
        )
        try:
            async for response in call:
                if response.HasField("usage"):
                    return "ok"
                sent.pieces_s.append(time.monotonic())
                sent.text += response.text
                sent.token_ids += response.token_ids
        except grpc.aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata() or ())
            details = trailers.get("grpc-status-details-bin", b"")
            if (
                error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                and b"google.rpc.RetryInfo" in details
                and int(trailers["rhizome-retry-after-ms"]) >= 1000
            ):
                return "shed"
            return f"{error.code().name}: {error.details()}"
        finally:
            call.cancel()
        return "the call ended without its usage"


@contextlib.asynccontextmanager
async def client_of(cluster: Cluster) -> AsyncIterator[Client]:
    """A client of every gateway of the cluster."""
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=180),
            )
        )
        stubs = []
        for number in range(len(cluster.urls)):
            target = f"unix:{cluster.directory}/gateway-{number}.sock"
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            stubs.append(InferenceServiceStub(channel))
        yield Client(http, cluster.urls, stubs)


async def closed_loop(
    client: Client,
    seconds: float,
    num_clients: int,
    lengths: Callable[[random.Random], int],
    *,
    apis: Sequence[Api] = APIS,
    tenant: Callable[[int], str] = lambda index: "",
) -> list[Sent]:
    """Clients that each ask anew when they have their answer, and come back a second after a
    refusal; all that was asked within the time."""
    until = time.monotonic() + seconds

    async def go_on(index: int) -> list[Sent]:
        rng, all_sent = random.Random(index), []
        while time.monotonic() < until:
            prompt = f"Question {rng.randrange(10**6)} of client {index}:"
            api = apis[(index + len(all_sent)) % len(apis)]
            all_sent.append(await client.ask(api, prompt, lengths(rng), tenant=tenant(index)))
            if all_sent[-1].fate == "shed":
                await asyncio.sleep(1)
        return all_sent

    return sum(await asyncio.gather(*map(go_on, range(num_clients))), [])


async def open_loop(
    client: Client,
    seconds: float,
    rate: float,
    lengths: Callable[[random.Random], int],
    *,
    tenant: str = "",
) -> list[Sent]:
    """Requests at random moments, so many a second, whatever becomes of those before."""
    rng = random.Random(7)
    now = time.monotonic()
    until, due = now + seconds, now
    tasks: list[asyncio.Task[Sent]] = []
    while (due := due + rng.expovariate(rate)) < until:
        await asyncio.sleep(due - time.monotonic())
        prompt = f"Task {rng.randrange(10**6)}:"
        api = APIS[len(tasks) % len(APIS)]
        tasks.append(asyncio.create_task(client.ask(api, prompt, lengths(rng), tenant=tenant)))
    return await asyncio.gather(*tasks)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
