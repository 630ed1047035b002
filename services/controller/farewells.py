"""Workers that shall have nothing to do before their pods go: asked to drain, then waited for."""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.loads import Loads

# A scheduler that has just started knows nobody yet.
_GONE_AFTER_S = 10.0


@dataclass(slots=True)
class Farewell:
    """One worker's way out, since when, and for how long it may take."""

    worker_id: str
    since: float
    timeout_s: float
    # Since when no scheduler knows it.
    unknown_since: float | None = None

    def must_ask(self, loads: Loads) -> bool:
        """Whether a scheduler may still place requests there."""
        load = loads.worker(self.worker_id)
        return load is not None and not load.is_draining

    def is_over(self, loads: Loads, now: float) -> bool:
        """Nothing runs there and nothing comes any more, or it took too long."""
        if now - self.since >= self.timeout_s:
            return True
        load = loads.worker(self.worker_id)
        if load is not None:
            self.unknown_since = None
            return load.is_draining and load.num_requests == 0
        if self.unknown_since is None:
            self.unknown_since = now
        return now - self.unknown_since >= _GONE_AFTER_S
