"""Policies by name."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from services.common.policies import PolicyName
from services.scheduler.pickers import LowestCost, PowerOfTwo, RandomChoice, Rotation
from services.scheduler.policy import Policy
from services.scheduler.scorers.load import load_time
from services.scheduler.scorers.prefix import prefill_time
from services.scheduler.scorers.session import away_from_home

# A prefill costs its request's time, and as much again of those that run beside it: what waits
# costs one request only. So a burst with one new prefix waits for its first prefill rather than
# repeat it elsewhere.
DEFAULT_PREFIX_WEIGHT = 2.0


def make_policy(
    name: PolicyName,
    rng: random.Random,
    *,
    prefix_weight: float = DEFAULT_PREFIX_WEIGHT,
    load_weight: float = 1.0,
    session_weight: float = 0.25,
    clock: Callable[[], float] = time.monotonic,
) -> Policy:
    """The policy of that name. The weights are `prefix_load`'s."""
    match name:
        case "prefix_load":
            scorers = (
                (prefill_time, prefix_weight),
                (load_time, load_weight),
                (away_from_home, session_weight),
            )
            return Policy(name, scorers, LowestCost(), waits=True)
        case "least_loaded":
            return Policy(name, ((load_time, 1.0),), LowestCost())
        case "power_of_two":
            return Policy(name, ((load_time, 1.0),), PowerOfTwo(rng))
        case "round_robin":
            return Policy(name, (), Rotation())
        case "random":
            return Policy(name, (), RandomChoice(rng))
