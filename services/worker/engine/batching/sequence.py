"""A sequence from its arrival to its one terminal entry."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.worker.engine.kv.radix import Node
from services.worker.engine.messages import Request


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """What the scheduler knows of a sequence besides its slot's row in the `SlotTable`.

    Its pages: pages[: tail.depth] belong to the tree and are kept by the lock on `tail`, the
    rest are its own. While it waits it has neither, and `tail` is where its last match ended.
    """

    request: Request
    # Prompt and output whose ids are known.
    token_ids: list[int]
    # The tree's keys of the full pages of token_ids, as far as they were needed.
    keys: list[bytes]
    # Its length when it must end: by its own limit, the context's or the pool's.
    end_len: int
    stop_ids: frozenset[int]
    arrival_ns: int
    tail: Node
    # First prompt position whose log-probability is still to be reported; None: none is.
    next_prompt_logprob: int | None
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    # Grows with each admission: the newest is preempted first.
    admission_number: int = 0
    # When it was admitted first.
    admitted_ns: int | None = None
    # When its first token came, or its prefill ended where it samples none.
    prefilled_ns: int | None = None
    cached_tokens: int = 0
    # When it gave way to others.
    preempted_ns: list[int] = field(default_factory=list)

    @property
    def key(self) -> int:
        """Its name."""
        return self.request.key

    @property
    def num_preemptions(self) -> int:
        """How often it gave way."""
        return len(self.preempted_ns)

    @property
    def num_output_tokens(self) -> int:
        """Output ids known, those of earlier attempts included."""
        return len(self.token_ids) - self.request.prompt_len

    def max_matched_tokens(self) -> int:
        """Most tokens that may come from the cache.

        The last known token is computed, for its logits; so is the one before the first prompt
        position to be reported, for the same reason.
        """
        limit = len(self.token_ids) - 1
        if self.next_prompt_logprob is not None:
            limit = min(limit, self.next_prompt_logprob - 1)
        return limit
