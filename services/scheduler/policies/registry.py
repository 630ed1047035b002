"""Policies by name."""

from __future__ import annotations

import random

from services.common.policies import PolicyName
from services.scheduler.pickers import LowestCost, PowerOfTwo, RandomChoice, Rotation
from services.scheduler.policies.dynamo_cost import dynamo_blocks
from services.scheduler.policies.e2 import E2, e2_branch
from services.scheduler.policies.least_outstanding import LeastOutstanding
from services.scheduler.policies.prefix_hash import PrefixHash
from services.scheduler.policies.prefix_threshold import PrefixThreshold
from services.scheduler.policies.session_affinity import SessionAffinity
from services.scheduler.policy import Policy
from services.scheduler.scorers.eviction import eviction_time
from services.scheduler.scorers.load import load_time
from services.scheduler.scorers.prefix import prefill_time
from services.scheduler.scorers.session import away_from_home
from services.scheduler.scorers.stall import stall_time

# A prefill costs its request's time, and as much again of those that run beside it: what waits
# costs one request only. So a burst with one new prefix waits for its first prefill rather than
# repeat it elsewhere.
DEFAULT_PREFIX_WEIGHT = 2.0
# Others' lost time counts half: a worker is busy because it holds what many ask for, and a full
# count drives requests from their prefixes (bench/results/policies.md has the comparison).
DEFAULT_STALL_WEIGHT = 0.5
# An eviction costs its share of requests more than the next one only.
DEFAULT_EVICTION_WEIGHT = 30.0


def make_policy(
    name: PolicyName,
    rng: random.Random,
    *,
    prefix_weight: float = DEFAULT_PREFIX_WEIGHT,
    load_weight: float = 1.0,
    session_weight: float = 1.0,
    stall_weight: float = DEFAULT_STALL_WEIGHT,
    eviction_weight: float = DEFAULT_EVICTION_WEIGHT,
) -> Policy:
    """The policy of that name. The weights are `prefix_load`'s."""
    match name:
        case "prefix_load":
            scorers = (
                (prefill_time, prefix_weight),
                (load_time, load_weight),
                (stall_time, stall_weight),
                (eviction_time, eviction_weight),
                (away_from_home, session_weight),
            )
            return Policy(name, scorers, LowestCost(), waits=True)
        case "e2":
            return Policy(name, (), E2(), waits=True, rule=e2_branch)
        case "least_loaded":
            return Policy(name, ((load_time, 1.0),), LowestCost())
        case "least_outstanding":
            return Policy(name, (), LeastOutstanding())
        case "power_of_two":
            return Policy(name, ((load_time, 1.0),), PowerOfTwo(rng))
        case "prefix_threshold":
            return Policy(name, (), PrefixThreshold(), waits=True)
        case "dynamo_cost":
            return Policy(name, ((dynamo_blocks, 1.0),), LowestCost(), waits=True)
        case "session_affinity":
            return Policy(name, (), SessionAffinity(), waits=True)
        case "prefix_hash":
            return Policy(name, (), PrefixHash(), waits=True)
        case "round_robin":
            return Policy(name, (), Rotation())
        case "random":
            return Policy(name, (), RandomChoice(rng))
