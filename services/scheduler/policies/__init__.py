"""Policies: ways to choose a worker, each in a file of its own, and their names."""

from services.scheduler.policies.registry import (
    DEFAULT_EVICTION_WEIGHT,
    DEFAULT_PREFIX_WEIGHT,
    DEFAULT_STALL_WEIGHT,
    make_policy,
)

__all__ = [
    "DEFAULT_EVICTION_WEIGHT",
    "DEFAULT_PREFIX_WEIGHT",
    "DEFAULT_STALL_WEIGHT",
    "make_policy",
]
