"""What arrives: requests as segments of token ids, drawn from a seed.

Ids are never repeated but by sharing a segment, so two prompts have exactly the prefix in common
that they were given. The five of Preble follow Table 1 of arXiv 2407.00023 (means and standard
deviations of lengths, share of the key portion and requests a key).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from bench.simulator.worker import SAMPLED_ID

_FIRST_ID = 1000


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive ids from `first` on; an answer (first None) is what simulated devices sample."""

    first: int | None
    length: int

    def ids(self) -> list[int]:
        if self.first is None:
            return [SAMPLED_ID] * self.length
        return list(range(self.first, self.first + self.length))


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: its prompt and how many tokens it generates."""

    segments: tuple[Segment, ...]
    output_len: int

    def token_ids(self) -> list[int]:
        return [token_id for segment in self.segments for token_id in segment.ids()]

    @property
    def prompt_len(self) -> int:
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of one user, each sent `think_s` after the one before was answered."""

    turns: tuple[Turn, ...]
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations in the order of their arrival; those of one burst arrive at one moment."""

    name: str
    conversations: tuple[Conversation, ...]
    burst: int = 1
    num_requests: int = field(init=False)

    def __post_init__(self) -> None:
        total = sum(len(conversation.turns) for conversation in self.conversations)
        object.__setattr__(self, "num_requests", total)

    def arrivals_ns(self, rate: float, seed: int) -> list[int]:
        """A Poisson process of bursts in which `rate` requests arrive a second."""
        rng = random.Random(seed)
        turns = self.num_requests / len(self.conversations)
        times: list[int] = []
        now = 0.0
        while len(times) < len(self.conversations):
            now += rng.expovariate(rate / turns / self.burst)
            times += [int(now * 1e9)] * self.burst
        return times[: len(self.conversations)]


class Ids:
    """Hands out ids that nobody had before."""

    def __init__(self) -> None:
        self._next = _FIRST_ID

    def take(self, length: int) -> Segment:
        first, self._next = self._next, self._next + length
        return Segment(first, length)


@dataclass(frozen=True, slots=True)
class _Table:
    """A row of Preble's Table 1: (mean, standard deviation)."""

    prompt: tuple[float, float]
    output: tuple[float, float]
    # Share of the prompt in the key portion, and requests that have one.
    key_share: tuple[float, float]
    per_key: tuple[float, float]
    # Tokens that every prompt starts with (the key portion includes them).
    system: int = 0


_PREBLE = {
    "toolbench": _Table((1835, 742), (43, 16), (0.76, 0.16), (39, 64), 300),
    "embodied": _Table((2285, 471), (16, 13), (0.76, 0.12), (48, 8), 400),
    "programming": _Table((3871, 1656), (190, 343), (0.78, 0.13), (126, 2157), 400),
    "videoqa": _Table((9865, 5976), (4, 1.5), (0.99, 0.002), (8.6, 2)),
    "loogle": _Table((23474, 6105), (16, 9.9), (0.94, 0.15), (18, 8.6), 13),
}


def _preble(name: str, num_requests: int, seed: int) -> Workload:
    """Keys with log-normal numbers of requests, of which a shuffled run is taken."""
    table, rng, ids = _PREBLE[name], random.Random(seed), Ids()
    system = ids.take(table.system)
    turns: list[Turn] = []
    while len(turns) < num_requests:
        # A key that has more requests than the run is as good as one that has them all.
        uses = min(round(_log_normal(rng, table.per_key)), num_requests // 4)
        key_share = min(max(rng.gauss(*table.key_share), 0.3), 0.995)
        prompt_len = max(64, round(_log_normal(rng, table.prompt)))
        shared = ids.take(max(1, round(prompt_len * key_share) - table.system))
        for _ in range(max(1, uses)):
            # The key is the same text each time; what follows it varies.
            own = ids.take(max(1, round(prompt_len * (1 - key_share) * rng.uniform(0.5, 1.5))))
            output_len = max(1, round(_log_normal(rng, table.output)))
            turns.append(Turn((system, shared, own), output_len))
    rng.shuffle(turns)
    return Workload(name, tuple(Conversation((turn,)) for turn in turns[:num_requests]))


def _shared_prefix(num_requests: int, seed: int) -> Workload:
    """SGLang's generated-shared-prefix: 64 groups, system prompts of 2048, questions of 128."""
    return _groups("shared_prefix", num_requests, seed, 64, 2048, 128, 256)


def _llm_d(num_requests: int, seed: int) -> Workload:
    """llm-d's benchmark of precise routing: 150 prefixes of 6000 tokens, questions of 1200."""
    return _groups("llm_d", num_requests, seed, 150, 6000, 1200, 128)


def _zipf(num_requests: int, seed: int) -> Workload:
    """256 prefixes of 2048 tokens, of which the k-th is drawn with weight 1 / k^1.1."""
    weights = [1 / rank**1.1 for rank in range(1, 257)]
    return _groups("zipf", num_requests, seed, 256, 2048, 256, 64, weights)


def _bursts(num_requests: int, seed: int) -> Workload:
    """generated-shared-prefix whose requests come 32 at a time."""
    flat = _groups("bursts", num_requests, seed, 64, 2048, 128, 64)
    return Workload(flat.name, flat.conversations, burst=32)


def _random(num_requests: int, seed: int) -> Workload:
    """Nothing is shared: 512 to 4096 tokens in, 16 to 256 out."""
    rng, ids = random.Random(seed), Ids()
    turns = [
        Turn((ids.take(rng.randint(512, 4096)),), rng.randint(16, 256)) for _ in range(num_requests)
    ]
    return Workload("random", tuple(Conversation((turn,)) for turn in turns))


def _multi_turn(num_requests: int, seed: int) -> Workload:
    """Users of 2 to 10 turns after a system prompt of 512; 200 to 1200 tokens in, 50 to 250 out."""
    return _conversations("multi_turn", num_requests, seed, 512, (200, 1200), (50, 250), 10)


def _conversations(
    name: str,
    num_requests: int,
    seed: int,
    system_len: int,
    input_len: tuple[int, int],
    output_lens: tuple[int, int],
    most_turns: int,
) -> Workload:
    rng, ids = random.Random(seed), Ids()
    system = ids.take(system_len)
    conversations: list[Conversation] = []
    num_turns = 0
    while num_turns < num_requests:
        history: tuple[Segment, ...] = (system,)
        turns: list[Turn] = []
        for _ in range(min(rng.randint(2, most_turns), num_requests - num_turns)):
            history = (*history, ids.take(rng.randint(*input_len)))
            output_len = rng.randint(*output_lens)
            turns.append(Turn(history, output_len))
            # The last token is sampled and never computed, but a client sends it back.
            history = (*history, Segment(None, output_len))
        num_turns += len(turns)
        conversations.append(Conversation(tuple(turns), think_s=rng.expovariate(1 / 3)))
    return Workload(name, tuple(conversations))


def _small_random(num_requests: int, seed: int) -> Workload:
    """Nothing is shared: 32 to 1024 tokens in, 4 to 32 out."""
    rng, ids = random.Random(seed), Ids()
    turns = [
        Turn((ids.take(rng.randint(32, 1024)),), rng.randint(4, 32)) for _ in range(num_requests)
    ]
    return Workload("small_random", tuple(Conversation((turn,)) for turn in turns))


def _small_zipf(num_requests: int, seed: int) -> Workload:
    """48 prefixes of 768 tokens, of which the k-th is drawn with weight 1 / k."""
    weights = [1 / rank for rank in range(1, 49)]
    return _groups("small_zipf", num_requests, seed, 48, 768, 48, 12, weights)


def _small_turns(num_requests: int, seed: int) -> Workload:
    """Users of 2 to 6 turns after a system prompt of 256; 64 to 320 tokens in, 8 to 24 out."""
    return _conversations("small_turns", num_requests, seed, 256, (64, 320), (8, 24), 6)


WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    **{name: partial(_preble, name) for name in _PREBLE},
    "shared_prefix": _shared_prefix,
    "llm_d": _llm_d,
    "multi_turn": _multi_turn,
    "zipf": _zipf,
    "bursts": _bursts,
    "random": _random,
}

# For the built-in model, whose context is 4,096 tokens (`bench/reality`).
SMALL_WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "small_random": _small_random,
    "small_zipf": _small_zipf,
    "small_turns": _small_turns,
}


def make_workload(name: str, num_requests: int, seed: int) -> Workload:
    """The workload of that name, small ones included. Raises ValueError for an unknown one."""
    known = WORKLOADS | SMALL_WORKLOADS
    if name not in known:
        raise ValueError(f"workload must be one of {', '.join(known)}, got {name!r}")
    return known[name](num_requests, seed)


def _groups(
    name: str,
    num_requests: int,
    seed: int,
    num_groups: int,
    prefix_len: int,
    question_len: int,
    output_len: int,
    weights: list[float] | None = None,
) -> Workload:
    rng, ids = random.Random(seed), Ids()
    prefixes = [ids.take(prefix_len) for _ in range(num_groups)]
    cumulative = list(accumulate(weights or [1.0] * num_groups))
    drawn = rng.choices(prefixes, cum_weights=cumulative, k=num_requests)
    turns = (Turn((prefix, ids.take(question_len)), output_len) for prefix in drawn)
    return Workload(name, tuple(Conversation((turn,)) for turn in turns))


def _log_normal(rng: random.Random, moments: tuple[float, float]) -> float:
    """Positive, with this mean and standard deviation."""
    mean, deviation = moments
    variance = math.log(1 + (deviation / mean) ** 2)
    return rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
