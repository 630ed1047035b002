"""Predicted times of one worker, in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Linear step times, as in scheduler.v1.CostModel.

    The defaults are about those of an 8-billion-parameter model on one H100; they matter only
    relative to each other, until workers report their own.
    """

    prefill_base_ns: float = 5e6
    prefill_token_ns: float = 25e3
    prefill_context_ns: float = 1.35
    decode_base_ns: float = 6e6
    decode_sequence_ns: float = 14e3
    decode_context_ns: float = 47.7

    def prefill_ns(self, num_uncached: int, num_context: int) -> float:
        """To compute `num_uncached` tokens, the last ones of `num_context`."""
        if num_uncached <= 0:
            return 0.0
        return self.prefill_base_ns + self.prefill_work_ns(num_uncached, num_context)

    def prefill_work_ns(self, num_uncached: int, num_context: int) -> float:
        """What they add to a queue, whose prefills share their steps' fixed time."""
        # The context of a token is what stands before it: on average, half of the others too.
        mean_context = num_context - num_uncached / 2
        return num_uncached * (self.prefill_token_ns + self.prefill_context_ns * mean_context)

    def decode_step_ns(self, num_sequences: int, num_context_tokens: int) -> float:
        """One step of `num_sequences` that hold `num_context_tokens` together."""
        return (
            self.decode_base_ns
            + self.decode_sequence_ns * num_sequences
            + self.decode_context_ns * num_context_tokens
        )


DEFAULT_COST_MODEL = CostModel()
