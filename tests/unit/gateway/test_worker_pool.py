"""Which sessions a gateway has with its workers, and what is left of them."""

from __future__ import annotations

import asyncio

from services.gateway.tokenizers import TokenizerPool
from services.gateway.worker_pool import WorkerSessions
from tests.fakes.gateway_stack import until


async def test_a_session_that_took_a_dead_ones_place_does_not_hide_it() -> None:
    before = asyncio.all_tasks()
    sessions = WorkerSessions("gateway", TokenizerPool((), lambda: None))
    first = sessions.session("w0", "localhost:1", 1)
    await until(lambda: first.dead)
    assert sessions.session("w0", "localhost:1", 1) is not first
    await sessions.aclose()
    await until(lambda: asyncio.all_tasks() == before)
