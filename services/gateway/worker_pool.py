"""All worker sessions of a gateway."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from services.common.peer_tls import PeerTls
from services.gateway.silence import CHECK_INTERVAL_S
from services.gateway.tokenizers import TokenizerPool
from services.gateway.worker_sessions import WorkerSession


class WorkerSessions:
    """All sessions of this gateway, by worker address and epoch; opened when first needed."""

    def __init__(
        self,
        gateway_id: str,
        tokenizers: TokenizerPool,
        has_others: Callable[[str], bool] = lambda worker_id: False,
        tls: PeerTls | None = None,
    ) -> None:
        self._gateway_id = gateway_id
        self._tokenizers = tokenizers
        self._has_others = has_others
        self._tls = tls
        self._handles = itertools.count(1)
        self._sessions: dict[tuple[str, int], WorkerSession] = {}
        # Dead ones whose place was taken; their last texts may still be on their way.
        self._replaced: list[WorkerSession] = []

    def session(self, worker_id: str, address: str, epoch: int) -> WorkerSession:
        """The live session with this epoch of the worker."""
        key = (address, epoch)
        session = self._sessions.get(key)
        if session is None or session.dead:
            if session is not None:
                self._replaced.append(session)
            session = WorkerSession(
                self._gateway_id,
                worker_id,
                address,
                epoch,
                self._tokenizers,
                self._handles,
                self._has_others,
                self._tls,
            )
            self._sessions[key] = session
        return session

    def num_choices(self, worker_id: str) -> int:
        """Sequences this gateway runs on a worker."""
        return sum(s.num_choices for s in self._sessions.values() if s.worker_id == worker_id)

    async def watch(self) -> None:
        """Check every session, and drop the dead ones, for ever."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            for session in [*self._sessions.values(), *self._replaced]:
                session.check()
                if session.dead and not session.num_open_texts:
                    self._forget(session)
                    await session.aclose()

    async def aclose(self) -> None:
        sessions = [*self._sessions.values(), *self._replaced]
        self._sessions.clear()
        self._replaced.clear()
        await asyncio.gather(*(session.aclose() for session in sessions))

    def _forget(self, session: WorkerSession) -> None:
        if session in self._replaced:
            self._replaced.remove(session)
        else:
            del self._sessions[session.address, session.epoch]
