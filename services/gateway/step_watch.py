"""Finds engines that hang behind a live front, from the heartbeats of one session."""

from __future__ import annotations

from rhizome.worker.v1.worker_service_pb2 import Heartbeat

# An engine that is busy with the same step for longer than both of these is hung: twice as long as
# the scheduler takes to suspect it. Nobody leaves it so soon who has no other worker to go to.
_HUNG_STEP_S = 2.0
_HUNG_STEP_FACTOR = 10
_ALONE_FACTOR = 15


class StepWatch:
    """When the engine's step number grew last, or it had nothing to do."""

    def __init__(self) -> None:
        self._step_number = -1
        self._since = 0.0

    def is_hung(self, heartbeat: Heartbeat, now: float, has_others: bool) -> bool:
        """Take the next heartbeat; `has_others` when another worker could go on."""
        if heartbeat.engine_step_number != self._step_number or not heartbeat.engine_busy:
            self._step_number = heartbeat.engine_step_number
            self._since = now
            return False
        patience_s = max(_HUNG_STEP_S, _HUNG_STEP_FACTOR * heartbeat.predicted_step_ns / 1e9)
        return now - self._since > (patience_s if has_others else _ALONE_FACTOR * patience_s)
