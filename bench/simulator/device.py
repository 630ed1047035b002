"""How long a simulated device works on a step.

The form is that of `services/worker/cost_model.py`: what a worker fits online, so a fit of a real
worker can be put in here. One thing is added that a linear form cannot say: the weights are read
once in a step that both prefills and decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.worker.engine.batch import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Nanoseconds. The defaults are those of an 8-billion-parameter model on one H100.

    22 us a prefilled token (matrix products at 730 TFLOP/s), 1.35 ns a pair of tokens (attention at
    390 TFLOP/s), 47.7 ns a token of context read while decoding (2.75 TB/s), 5 ms to read the
    weights.
    """

    prefill_base_ns: float = 5.3e6
    prefill_token_ns: float = 22e3
    prefill_context_ns: float = 1.35
    decode_base_ns: float = 5.3e6
    decode_sequence_ns: float = 22e3
    decode_context_ns: float = 47.7

    def of(self, plan: StepPlan) -> int:
        """One step."""
        lengths = plan.num_tokens.astype(np.float64)
        starts = plan.start_positions.astype(np.float64)
        num_decodes = int((lengths == 1).sum())
        decode_context = float(starts[lengths == 1].sum())
        total = 0.0
        if num_decodes:
            total = (
                self.decode_base_ns
                + self.decode_sequence_ns * num_decodes
                + self.decode_context_ns * decode_context
            )
        if num_decodes < len(lengths):
            chunks = lengths > 1
            num_tokens = float(lengths[chunks].sum())
            pairs = float((lengths * (starts + lengths / 2))[chunks].sum())
            total += self.prefill_token_ns * num_tokens + self.prefill_context_ns * pairs
            total += max(0.0, self.prefill_base_ns - (self.decode_base_ns if num_decodes else 0.0))
        return int(total)
