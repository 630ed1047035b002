"""Which worker served each session last."""

from __future__ import annotations

from collections import OrderedDict

_MAX_SESSIONS = 65_536


class SessionHomes:
    """The lately used sessions' workers; the longest unused is forgotten first."""

    def __init__(self, max_sessions: int = _MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._homes: OrderedDict[tuple[str, str], str] = OrderedDict()

    def find(self, session: tuple[str, str] | None) -> str | None:
        return None if session is None else self._homes.get(session)

    def note(self, session: tuple[str, str] | None, worker_id: str) -> None:
        """The session's newest request went to the worker."""
        if session is None:
            return
        self._homes[session] = worker_id
        self._homes.move_to_end(session)
        if len(self._homes) > self._max_sessions:
            self._homes.popitem(last=False)
