"""How long a peer that should be heard has said nothing."""

from __future__ import annotations

# The time between two checks.
CHECK_INTERVAL_S = 0.1


class Silence:
    """The evenly spaced checks of a gateway since it heard a peer.

    Counted in checks and not by the clock: a gateway that stood still itself blames nobody for it.
    """

    def __init__(self) -> None:
        self._num_checks = 0

    def end(self) -> None:
        """The peer was heard, or has nothing to say."""
        self._num_checks = 0

    def check(self) -> float:
        """Count a check; returns how long it has been silent, in seconds."""
        self._num_checks += 1
        return self._num_checks * CHECK_INTERVAL_S
