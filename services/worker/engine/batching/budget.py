"""How much one step may compute, and how many pages running sequences will still ask for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_INITIAL_RATIO = 0.7
_MIN_RATIO = 0.1
_DECAY_PER_STEP = 0.001
_RAISE_PER_PREEMPTION = 0.1
# A sequence that may go on for longer is expected to end before.
_MAX_FORESEEN_TOKENS = 4096


class TokenBudget:
    """The tokens that one step may still compute. Made anew for each step."""

    def __init__(self, max_tokens: int, page_size: int) -> None:
        self.num_left = max_tokens
        self._page_size = page_size

    def take(self, num_tokens: int) -> None:
        """Spend tokens."""
        self.num_left -= num_tokens
        assert self.num_left >= 0, "a step of more tokens than it may have"

    def chunk_len(self, start: int, stop: int) -> int:
        """How many of the tokens `start` to `stop` - 1 to compute now.

        A chunk that does not reach `stop` ends where a page does, if it reaches that far, so
        that what it leaves behind can be shared.
        """
        if stop - start <= self.num_left:
            return stop - start
        aligned = (start + self.num_left) // self._page_size * self._page_size
        return aligned - start if aligned > start else self.num_left


class GrowthEstimate:
    """The share of their remaining tokens that sequences are expected to produce.

    Falls a little each step and rises when a preemption shows that it was too low (after the
    `new_token_ratio` of SGLang's scheduler).
    """

    def __init__(self, initial: float = _INITIAL_RATIO, minimum: float = _MIN_RATIO) -> None:
        self.ratio = initial
        self._minimum = minimum

    def expected_tokens(self, remaining: npt.NDArray[np.int32]) -> int:
        """Tokens expected of sequences that may produce `remaining` tokens each."""
        foreseen = np.clip(remaining, 0, _MAX_FORESEEN_TOKENS).sum(dtype=np.int64)
        return int(np.ceil(self.ratio * float(foreseen)))

    def on_step(self) -> None:
        """A step was planned without a preemption."""
        self.ratio = max(self._minimum, self.ratio - _DECAY_PER_STEP)

    def on_preemption(self) -> None:
        """A sequence had to give way."""
        self.ratio = min(1.0, self.ratio + _RAISE_PER_PREEMPTION)
