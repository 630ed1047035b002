"""Policies: ways to choose a worker, each in a file of its own, and their names."""

from services.scheduler.policies.registry import (
    DEFAULT_PREFIX_WEIGHT,
    PolicyName,
    make_policy,
)

__all__ = ["DEFAULT_PREFIX_WEIGHT", "PolicyName", "make_policy"]
