"""A lease: at most one of several replicas holds it, and each new holder has a higher term."""

from __future__ import annotations

from typing import Protocol


class LeaseUnknownError(Exception):
    """Whoever keeps the lease did not answer or refused, so nobody knows who holds it."""


class Lease(Protocol):
    """One replica's claim to a lease that somebody else keeps."""

    duration_s: float
    """For how long it is held without being renewed."""

    renew_interval_s: float
    """How often to claim it."""

    async def claim(self) -> int:
        """Take the lease where it is free, renew it where it is ours.

        Returns the term, which is above those of all earlier holders; 0 while it is another's.
        Raises LeaseUnknownError.
        """
        ...

    async def release(self) -> None:
        """Leave it to others, if it is ours. Raises LeaseUnknownError."""
        ...

    async def check(self) -> None:
        """Find out whether its keeper answers, for those who watch; claims nothing."""
        ...
