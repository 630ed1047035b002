"""The tokenizer replicas: which may be used, encoding and decoding through them.

A replica is used only while its digests equal those of the pool that is served: otherwise prompts
would be encoded, or text decoded, silently wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import TypeVar

import grpc
from grpc import aio

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity
from rhizome.common.v1.text_options_pb2 import TextOptions
from rhizome.tokenizer.v1.tokenizer_service_pb2 import (
    DetokenizeRequest,
    GetTokenizerInfoRequest,
    GetTokenizerInfoResponse,
    TokenizedInput,
    TokenizeInput,
    TokenizeRequest,
    TokenSequence,
)
from rhizome.tokenizer.v1.tokenizer_service_pb2_grpc import TokenizerServiceStub
from services.common.errors import InvalidRequestError, UnavailableError, error_from_rpc
from services.common.peer_tls import PeerTls
from services.common.rpc import MAX_MESSAGE_BYTES, open_channel
from services.gateway.replica_names import (
    LOOK_UP_INTERVAL_S,
    Resolve,
    follow_name,
    host_of,
    names_all,
    resolve,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long a prompt waits when no replica can be reached: one may be starting again, or too busy to
# say in time that it is there.
_WAIT_S = 5.0
_CHECK_INTERVAL_S = 5.0
_UNREACHED_INTERVAL_S = 0.25
_INFO_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 60.0
# Long prompts take long to encode, a stopped replica for ever: after so long it is asked whether it
# is still there, which it answers at once. Only who has another one leaves it then.
_DOUBT_S = 0.5
_PROBE_TIMEOUT_S = 1.0
# Texts under way at a replica whose name went have so long to end there.
_FAREWELL_S = 60.0
_IDENTITY_FIELDS = ("tokenizer_digest", "template_digest", "hash_version")


class TokenizerReplica:
    """One tokenizer: its channel and what it said about itself, None while unreachable."""

    def __init__(
        self,
        address: str,
        answered: asyncio.Event,
        tls: PeerTls | None = None,
        host: str | None = None,
    ) -> None:
        """`answered` is set whenever it can be used again. `host` is whose address it is, where
        that is not in the address."""
        self.address = address
        self._answered = answered
        self.channel = open_channel(address, tls, host)
        self.stub = TokenizerServiceStub(self.channel)
        self.info: GetTokenizerInfoResponse | None = None
        self._check_now = asyncio.Event()

    def suspect(self) -> None:
        """Use others until this one has answered again."""
        self.info = None
        self._check_now.set()

    async def answer(self, call: Awaitable[_T], has_others: Callable[[], bool]) -> _T:
        """What it answers, however long that takes while it is there. Raises AioRpcError."""
        answer = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait((answer,), timeout=_DOUBT_S))[0]:
                if has_others():
                    await self.stub.GetTokenizerInfo(
                        GetTokenizerInfoRequest(), timeout=_PROBE_TIMEOUT_S
                    )
            return answer.result()
        finally:
            answer.cancel()

    async def follow(self) -> None:
        """Keep `info` current, for ever."""
        while True:
            interval = _CHECK_INTERVAL_S
            try:
                self.info = await self.stub.GetTokenizerInfo(
                    GetTokenizerInfoRequest(), timeout=_INFO_TIMEOUT_S
                )
                self._answered.set()
            except aio.AioRpcError as error:
                if self.info is not None:
                    logger.warning(
                        "event=tokenizer_lost tokenizer=%s status=%s",
                        self.address,
                        error.code().name,
                    )
                self.info = None
                interval = _UNREACHED_INTERVAL_S
            self._check_now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._check_now.wait()


class TokenizerPool:
    """All replicas; hands out those that fit the served pool, in turn.

    `identity` is what the pool declares, or None while it is unknown.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        identity: Callable[[], PoolIdentity | None],
        wait_s: float = _WAIT_S,
        tls: PeerTls | None = None,
        resolve: Resolve = resolve,
        name_interval_s: float = LOOK_UP_INTERVAL_S,
    ) -> None:
        """An address may be `dns+all:host:port`: all that the name stands for, as it changes."""
        self._answered = asyncio.Event()
        listed = list(addresses)
        self._names = [target for target in listed if names_all(target)]
        self._tls = tls
        self._resolve = resolve
        self._name_interval_s = name_interval_s
        self._replicas = [
            TokenizerReplica(address, self._answered, tls)
            for address in listed
            if address not in self._names
        ]
        self._tasks: set[asyncio.Task[None]] = set()
        self._followers: dict[TokenizerReplica, asyncio.Task[None]] = {}
        self._identity = identity
        self._wait_s = wait_s
        self._turn = itertools.count()
        self._pieces: dict[int, bytes] = {}
        self._reported: set[tuple[str, str]] = set()

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Watch the replicas until the block ends, then close their channels."""
        for replica in self._replicas:
            self._followers[replica] = asyncio.create_task(replica.follow())
        for name in self._names:
            update = _OneName(self, host_of(name)).update
            self._start(follow_name(name, update, self._resolve, interval_s=self._name_interval_s))
        try:
            yield
        finally:
            tasks = [*self._tasks, *self._followers.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for replica in self._replicas:
                await replica.channel.close()

    def add(self, address: str, host: str) -> TokenizerReplica:
        """A replica that was not there before, at an address of the host."""
        replica = TokenizerReplica(address, self._answered, self._tls, host)
        self._replicas.append(replica)
        self._followers[replica] = asyncio.create_task(replica.follow())
        return replica

    def remove(self, replica: TokenizerReplica) -> None:
        """Nothing new goes there; texts under way may end."""
        self._replicas.remove(replica)
        self._followers.pop(replica).cancel()
        self._start(_close_later(replica))

    def pick(self) -> TokenizerReplica | None:
        """The next usable replica, or None."""
        first = next(self._turn)
        for step in range(len(self._replicas)):
            replica = self._replicas[(first + step) % len(self._replicas)]
            if self._is_usable(replica):
                return replica
        return None

    @property
    def usable(self) -> bool:
        return any(self._is_usable(replica) for replica in self._replicas)

    def has_others(self, replica: TokenizerReplica) -> bool:
        """Whether a replica other than this one could go on."""
        return any(other is not replica and self._is_usable(other) for other in self._replicas)

    @property
    def info(self) -> GetTokenizerInfoResponse | None:
        """What a usable replica says about itself."""
        replica = self.pick()
        return None if replica is None else replica.info

    async def tokenize(
        self,
        inputs: Sequence[TokenizeInput],
        namespace: str,
        page_size: int,
        traceparent: str = "",
    ) -> Sequence[TokenizedInput]:
        """Encode and hash.

        Raises InvalidRequestError for what a template refuses, and for prompts that are too long
        for a message.
        """
        # In metadata the context would cost ten times as much.
        request = TokenizeRequest(
            inputs=inputs, namespace=namespace, page_size=page_size, traceparent=traceparent
        )
        num_bytes = request.ByteSize()
        if num_bytes > MAX_MESSAGE_BYTES:
            raise InvalidRequestError(
                f"the prompt is too long: the request has {num_bytes} bytes of text, more than "
                f"{MAX_MESSAGE_BYTES}"
            )
        response = await self._on_any(
            lambda replica: replica.stub.Tokenize(request, timeout=_CALL_TIMEOUT_S)
        )
        return response.results

    async def detokenize(self, token_ids: Sequence[int], options: TextOptions) -> str:
        """The whole text of one sequence of ids."""
        request = DetokenizeRequest(sequences=[TokenSequence(token_ids=token_ids)], options=options)
        response = await self._on_any(
            lambda replica: replica.stub.Detokenize(request, timeout=_CALL_TIMEOUT_S)
        )
        return response.results[0].text

    async def pieces(self, token_ids: Iterable[int]) -> dict[int, bytes]:
        """A table with at least these ids and the exact bytes each stands for."""
        missing = [token_id for token_id in set(token_ids) if token_id not in self._pieces]
        if missing:
            request = DetokenizeRequest(
                sequences=[TokenSequence(token_ids=missing)],
                options=TextOptions(skip_special_tokens=False),
                as_pieces=True,
            )
            response = await self._on_any(
                lambda replica: replica.stub.Detokenize(request, timeout=_CALL_TIMEOUT_S)
            )
            self._pieces.update(zip(missing, response.results[0].pieces, strict=True))
        return self._pieces

    async def _await_usable(self) -> TokenizerReplica | None:
        """The next usable replica; waits while one that is needed may come back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while (replica := self.pick()) is None and self._may_come:
                    self._answered.clear()
                    await self._answered.wait()
                return replica
        return None

    async def _on_any(self, call: Callable[[TokenizerReplica], Awaitable[_T]]) -> _T:
        """Answer from the first replica that can be reached, or comes back soon."""
        last: aio.AioRpcError | None = None
        for _ in range(len(self._replicas) + 1):
            replica = await self._await_usable()
            if replica is None:
                break
            try:
                return await replica.answer(call(replica), partial(self.has_others, replica))
            except aio.AioRpcError as error:
                if error.code() not in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ):
                    raise error_from_rpc(error) from error
                replica.suspect()
                last = error
        raise UnavailableError(self.why_unusable()) from last

    @property
    def _may_come(self) -> bool:
        """Whether one that cannot be used now may be usable soon."""
        if self._names and not self._replicas:
            return True
        return any(replica.info is None for replica in self._replicas)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _is_usable(self, replica: TokenizerReplica) -> bool:
        return replica.info is not None and not self._mismatch(replica)

    def _mismatch(self, replica: TokenizerReplica) -> str:
        """How the replica differs from the pool; empty when it does not."""
        identity = self._identity()
        if identity is None or replica.info is None:
            return ""
        for name in _IDENTITY_FIELDS:
            ours, theirs = getattr(identity, name), getattr(replica.info, name)
            if ours != theirs:
                difference = f"{name} is {theirs!r}, the workers' is {ours!r}"
                if (replica.address, difference) not in self._reported:
                    self._reported.add((replica.address, difference))
                    logger.error(
                        "event=tokenizer_mismatch tokenizer=%s %s", replica.address, difference
                    )
                return difference
        return ""

    def why_unusable(self) -> str:
        """Why no replica can be used."""
        for replica in self._replicas:
            if difference := self._mismatch(replica):
                return f"tokenizer {replica.address} does not fit the pool: {difference}"
        return "no tokenizer can be reached"


class _OneName:
    """The replicas of a pool that one name stands for."""

    def __init__(self, pool: TokenizerPool, host: str) -> None:
        self._pool = pool
        self._host = host
        self._replicas: dict[str, TokenizerReplica] = {}

    def update(self, addresses: frozenset[str]) -> None:
        for address in self._replicas.keys() - addresses:
            self._pool.remove(self._replicas.pop(address))
        for address in addresses - self._replicas.keys():
            self._replicas[address] = self._pool.add(address, self._host)


async def _close_later(replica: TokenizerReplica) -> None:
    try:
        await asyncio.sleep(_FAREWELL_S)
    finally:
        await replica.channel.close()
