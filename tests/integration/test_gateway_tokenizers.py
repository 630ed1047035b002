"""Unary calls to tokenizer replicas: one that stands still is left, one that takes long is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from rhizome.tokenizer.v1 import tokenizer_service_pb2 as pb
from rhizome.tokenizer.v1.tokenizer_service_pb2_grpc import (
    TokenizerServiceServicer,
    add_TokenizerServiceServicer_to_server,
)
from services.common.rpc import running_server
from services.gateway.tokenizers import TokenizerPool
from tests.fakes.gateway_stack import running_tokenizer, tokenizer_parts, until

INPUTS = [pb.TokenizeInput(text="Hello")]


class SlowTokenizer(TokenizerServiceServicer):
    """Answers a prompt when told to, and who it is while it is `there`."""

    def __init__(self) -> None:
        self.num_prompts = 0
        self.num_asked = 0
        self.there = True
        self.done = asyncio.Event()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self.num_prompts += 1
        await self.done.wait()
        return pb.TokenizeResponse(results=[pb.TokenizedInput(token_ids=[7])])

    async def GetTokenizerInfo(
        self, request: pb.GetTokenizerInfoRequest, context: Any
    ) -> pb.GetTokenizerInfoResponse:
        if not self.there:
            await asyncio.Event().wait()
        self.num_asked += 1
        return tokenizer_parts().info


@contextlib.asynccontextmanager
async def running_slow_tokenizer(servicer: SlowTokenizer) -> AsyncIterator[str]:
    def add(server: aio.Server) -> None:
        add_TokenizerServiceServicer_to_server(servicer, server)

    services = [pb.DESCRIPTOR.services_by_name["TokenizerService"]]
    async with running_server(add, services, "localhost:0", grace_s=0.1) as server:
        yield f"localhost:{server.port}"


async def test_a_prompt_at_a_replica_that_stands_still_goes_to_another() -> None:
    slow = SlowTokenizer()
    async with running_slow_tokenizer(slow) as first, running_tokenizer() as second:
        pool = TokenizerPool((first, second), lambda: None)
        async with pool.following():
            await until(lambda: {_picked(pool), _picked(pool)} == {first, second})
            slow.there = False
            answers = [await pool.tokenize(INPUTS, "", 16) for _ in range(2)]
            assert slow.num_prompts == 1
            assert answers[0] == answers[1]
            assert answers[0][0].token_ids != [7]


async def test_a_prompt_that_takes_long_stays_where_it_is() -> None:
    slow = [SlowTokenizer(), SlowTokenizer()]
    async with running_slow_tokenizer(slow[0]) as first, running_slow_tokenizer(slow[1]) as second:
        pool = TokenizerPool((first, second), lambda: None)
        async with pool.following():
            await until(lambda: {_picked(pool), _picked(pool)} == {first, second})
            asked = sum(each.num_asked for each in slow)
            answer = asyncio.create_task(pool.tokenize(INPUTS, "", 16))
            await until(lambda: sum(each.num_asked for each in slow) >= asked + 2)
            for each in slow:
                each.done.set()
            assert (await answer)[0].token_ids == [7]
            assert sum(each.num_prompts for each in slow) == 1


async def test_pain_27_s_prompts_and_texts_are_shared_among_the_replicas() -> None:
    slow = [SlowTokenizer(), SlowTokenizer()]
    async with running_slow_tokenizer(slow[0]) as first, running_slow_tokenizer(slow[1]) as second:
        pool = TokenizerPool((first, second), lambda: None)
        async with pool.following():
            await until(lambda: {_picked(pool), _picked(pool)} == {first, second})
            answers = [asyncio.create_task(pool.tokenize(INPUTS, "", 16)) for _ in range(8)]
            await until(lambda: sum(each.num_prompts for each in slow) == 8)
            assert [each.num_prompts for each in slow] == [4, 4]
            # Text streams ask for their replica in the same way.
            assert Counter(_picked(pool) for _ in range(8)) == {first: 4, second: 4}
            for each in slow:
                each.done.set()
            await asyncio.gather(*answers)


async def test_the_replicas_of_a_name_come_and_go_with_its_addresses() -> None:
    slow = [SlowTokenizer(), SlowTokenizer()]
    async with running_slow_tokenizer(slow[0]) as first, running_slow_tokenizer(slow[1]) as second:
        addresses: frozenset[str] = frozenset()

        async def resolve(host: str, port: int) -> frozenset[str]:
            assert (host, port) == ("tokenizer", 30010)
            return addresses

        pool = TokenizerPool(
            ("dns+all:tokenizer:30010",), lambda: None, resolve=resolve, name_interval_s=0.01
        )
        async with pool.following():
            # Whoever comes before the name is known waits for it.
            answer = asyncio.create_task(pool.tokenize(INPUTS, "", 16))
            addresses = frozenset((first,))
            await until(lambda: slow[0].num_prompts == 1)
            addresses = frozenset((first, second))
            await until(lambda: {_picked(pool), _picked(pool)} == {first, second})
            addresses = frozenset((second,))
            await until(lambda: {_picked(pool), _picked(pool)} == {second})
            # What was under way at the one that left ends there.
            slow[0].done.set()
            assert (await answer)[0].token_ids == [7]
            assert slow[1].num_prompts == 0


async def test_the_only_replica_is_waited_for() -> None:
    slow = SlowTokenizer()
    async with running_slow_tokenizer(slow) as address:
        pool = TokenizerPool((address,), lambda: None)
        async with pool.following():
            await until(lambda: pool.usable)
            slow.there = False
            answer = asyncio.create_task(pool.tokenize(INPUTS, "", 16))
            # Longer than one that had another would be given.
            await asyncio.wait((answer,), timeout=2.0)
            slow.done.set()
            assert (await answer)[0].token_ids == [7]
            assert slow.num_prompts == 1


def _picked(pool: TokenizerPool) -> str | None:
    replica = pool.pick()
    return None if replica is None else replica.address
