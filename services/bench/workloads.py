"""What requests a benchmark sends: prompts, lengths and turns, drawn from a seed.

The draws and their order are part of the definition: the same workload and seed give the same
prompts in every run, so figures taken from different servers, or years apart, compare.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

WorkloadKind = Literal["random", "shared", "multiturn"]

# Ids below stand for special tokens in common vocabularies.
FIRST_TOKEN_ID = 1000

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: its prompt and how many tokens it must generate."""

    token_ids: list[int]
    output_len: int


# Turns of one user: each is sent when the one before was answered.
Conversation = list[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A distribution of requests and its seed. Lengths are drawn uniformly, both ends included.

    random: `num_prompts` unrelated requests.
    shared: `num_groups` prefixes of `prefix_len` tokens, each in `prompts_per_group` requests that
    end with a part of their own, in shuffled order.
    multiturn: `num_groups` users of `prompts_per_group` turns after a system prompt of
    `prefix_len`; each turn sends the whole history, in which random ids stand for the answers.
    """

    kind: WorkloadKind
    input_len: Range
    output_len: Range
    vocab_size: int
    seed: int
    num_prompts: int = 0
    num_groups: int = 0
    prompts_per_group: int = 0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be 1 <= shortest <= longest, got {low} {high}")
        if self.vocab_size <= FIRST_TOKEN_ID:
            raise ValueError(
                f"vocab_size must be above {FIRST_TOKEN_ID}, the first id that prompts use, "
                f"got {self.vocab_size}"
            )
        if self.num_requests < 1:
            raise ValueError("a workload must have at least one request")
        if self.prefix_len < 0:
            raise ValueError(f"prefix_len must be >= 0, got {self.prefix_len}")

    @property
    def num_requests(self) -> int:
        """Requests in all."""
        if self.kind == "random":
            return self.num_prompts
        return self.num_groups * self.prompts_per_group

    @property
    def longest(self) -> int:
        """Most tokens a sequence can reach, prompt and output."""
        turns = self.prompts_per_group if self.kind == "multiturn" else 1
        return self.prefix_len + turns * (self.input_len[1] + self.output_len[1])

    def conversations(self) -> list[Conversation]:
        """Draw every request."""
        source = random.Random(self.seed)
        match self.kind:
            case "random":
                return [[self._turn(source)] for _ in range(self.num_prompts)]
            case "shared":
                return self._shared(source)
            case "multiturn":
                return self._multiturn(source)

    def _shared(self, source: random.Random) -> list[Conversation]:
        conversations = []
        for _ in range(self.num_groups):
            prefix = self._ids(source, self.prefix_len)
            for _ in range(self.prompts_per_group):
                turn = self._turn(source)
                conversations.append([Turn(prefix + turn.token_ids, turn.output_len)])
        source.shuffle(conversations)
        return conversations

    def _multiturn(self, source: random.Random) -> list[Conversation]:
        system_prompt = self._ids(source, self.prefix_len)
        conversations = []
        for _ in range(self.num_groups):
            history = system_prompt
            turns = []
            for _ in range(self.prompts_per_group):
                turn = self._turn(source)
                history = history + turn.token_ids
                turns.append(Turn(history, turn.output_len))
                history = history + self._ids(source, turn.output_len)
            conversations.append(turns)
        return conversations

    def _turn(self, source: random.Random) -> Turn:
        prompt = self._ids(source, source.randint(*self.input_len))
        return Turn(prompt, source.randint(*self.output_len))

    def _ids(self, source: random.Random, count: int) -> list[int]:
        return [source.randrange(FIRST_TOKEN_ID, self.vocab_size) for _ in range(count)]
