"""Replays a workload against a running system, in real time and open loop."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from bench.simulator.records import Served
from bench.simulator.workloads import Conversation, Segment, Workload

# Ids of the built-in model's vocabulary that are ordinary text.
_FIRST_ID, _NUM_IDS = 64, 1400
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class _Answer:
    token_ids: list[int]
    cached_tokens: int


class Client:
    """Sends the turns of a workload and notes what they took. Any failed request is an error."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits)

    async def close(self) -> None:
        await self._http.aclose()

    async def probe(self, token_ids: Sequence[int]) -> float:
        """Seconds of a request for one token."""
        clock = asyncio.get_running_loop().time
        began = clock()
        await self._generate(list(token_ids), 1, None)
        return clock() - began

    async def replay(self, workload: Workload, arrivals_ns: Sequence[int]) -> list[Served]:
        """Every request, in the order in which they ended."""
        served: list[Served] = []
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for session, (conversation, at_ns) in enumerate(
                zip(workload.conversations, arrivals_ns, strict=True)
            ):
                group.create_task(self._converse(conversation, session, began, at_ns / 1e9, served))
        return served

    async def _converse(
        self,
        conversation: Conversation,
        session: int,
        began: float,
        at_s: float,
        served: list[Served],
    ) -> None:
        clock = asyncio.get_running_loop().time
        answers: list[list[int]] = []
        session_id = str(session) if len(conversation.turns) > 1 else None
        await asyncio.sleep(began + at_s - clock())
        for number, turn in enumerate(conversation.turns):
            if number:
                await asyncio.sleep(conversation.think_s)
            token_ids = _prompt(turn.segments, answers)
            asked_at = clock()
            answer = await self._generate(token_ids, turn.output_len, session_id)
            served.append(
                Served(
                    arrived_s=asked_at - began,
                    first_token_s=0.0,
                    latency_s=clock() - asked_at,
                    queued_s=0.0,
                    prompt_tokens=len(token_ids),
                    cached_tokens=answer.cached_tokens,
                    predicted_tokens=0,
                    output_tokens=len(answer.token_ids),
                    num_attempts=1,
                    worker_id="",
                )
            )
            assert len(answer.token_ids) == turn.output_len, "every token arrives, and no other"
            answers.append(answer.token_ids)

    async def _generate(
        self, token_ids: list[int], output_len: int, session_id: str | None
    ) -> _Answer:
        sampling = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
        body = {"input_ids": token_ids, "sampling_params": sampling, "session_id": session_id}
        response = await self._http.post("/generate", content=json.dumps(body))
        response.raise_for_status()
        reply = response.json()
        return _Answer(reply["output_ids"], reply["meta_info"]["cached_tokens"])


def _prompt(segments: Sequence[Segment], answers: Sequence[list[int]]) -> list[int]:
    """The simulator's ids as ids of the model; answers are what the model did say."""
    token_ids: list[int] = []
    left = iter(answers)
    for segment in segments:
        token_ids += next(left) if segment.first is None else model_ids(segment)
    return token_ids


def model_ids(segment: Segment) -> list[int]:
    """As many ids, the same for the same segment and probably for no other."""
    rng = random.Random(segment.first)
    return [_FIRST_ID + rng.randrange(_NUM_IDS) for _ in range(segment.length)]
