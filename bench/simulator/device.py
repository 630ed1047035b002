"""How long a simulated device works on a step.

The linear form is that of `services/worker/cost_model.py`: what a worker fits online, so a fit of a
real worker can be put in here. Two things are added that it cannot say: the weights are read once
in a step that both prefills and decodes, and rows that share a prefix share its reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.worker.engine.batch import StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedReads:
    """Nanoseconds of decode attention where rows share pages; a step takes the cheaper way.

    Plain: everything once from memory or what each row sees from the second-level cache, whichever
    is longer. Cascade: everything once, at a lower rate, and a second pass. The defaults are those
    measured on an H100 (bench/results/shared_prefix_gpu.md: 2.7, 7.2 and 2.5 TB/s, 24 us a layer)
    for a shape of 32 layers and 131 kB a token.
    """

    memory_ns: float = 48.5
    cache_ns: float = 18.2
    cascade_memory_ns: float = 52.4
    cascade_base_ns: float = 24e3 * 32

    def of(self, num_seen: int, num_distinct: int) -> float:
        """Rows that see so many tokens together, so many of them different."""
        plain = max(self.memory_ns * num_distinct, self.cache_ns * num_seen)
        return min(plain, self.cascade_base_ns + self.cascade_memory_ns * num_distinct)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Nanoseconds. The defaults are those of an 8-billion-parameter model on one H100.

    22 us a prefilled token (matrix products at 730 TFLOP/s), 1.35 ns a pair of tokens (attention at
    390 TFLOP/s); decode steps as bench/results/engine_gpu.md has them: 6 ms and 14 us a row beside
    attention. `decode_context_ns` counts where `shared_reads` is None: for each token that a row
    sees, whoever else does.
    """

    prefill_base_ns: float = 6e6
    prefill_token_ns: float = 22e3
    prefill_context_ns: float = 1.35
    decode_base_ns: float = 6e6
    decode_sequence_ns: float = 14e3
    decode_context_ns: float = 0.0
    shared_reads: SharedReads | None = SharedReads()

    def of(self, plan: StepPlan, num_shared: int = 0) -> int:
        """One step. Its decode rows see `num_shared` tokens that another of them sees, too."""
        lengths = plan.num_tokens.astype(np.float64)
        starts = plan.start_positions.astype(np.float64)
        num_decodes = int((lengths == 1).sum())
        total = 0.0
        if num_decodes:
            num_seen = int(starts[lengths == 1].sum())
            total = (
                self.decode_base_ns
                + self.decode_sequence_ns * num_decodes
                + self.decode_context_ns * num_seen
            )
            if self.shared_reads is not None:
                total += self.shared_reads.of(num_seen, num_seen - num_shared)
        if num_decodes < len(lengths):
            chunks = lengths > 1
            num_tokens = float(lengths[chunks].sum())
            pairs = float((lengths * (starts + lengths / 2))[chunks].sum())
            total += self.prefill_token_ns * num_tokens + self.prefill_context_ns * pairs
            total += max(0.0, self.prefill_base_ns - (self.decode_base_ns if num_decodes else 0.0))
        return int(total)


class PageTable:
    """The device's page table, kept to know what the decode rows of a step share.

    Pages that rows generate are their own, so what rows share changes only when rows come or go.
    """

    def __init__(self, num_slots: int, max_pages: int, page_size: int) -> None:
        self._pages = np.zeros((num_slots, max_pages), np.int32)
        self._page_size = page_size
        self._rows = b""
        self._num_shared = 0

    def shared_tokens(self, plan: StepPlan) -> int:
        """Apply the plan's changes; tokens that its decode rows see and a row before them, too."""
        self._pages[plan.page_slots, plan.page_indices] = plan.page_ids
        decodes = plan.num_tokens == 1
        slots = plan.slots[decodes]
        rows = slots.tobytes()
        if rows != self._rows or plan.assignments:
            self._rows = rows
            counts = plan.start_positions[decodes] // self._page_size
            longest = int(counts.max(initial=0))
            listed = np.arange(longest) < counts[:, None]
            pages = self._pages[slots, :longest][listed]
            num_distinct = int(np.count_nonzero(np.bincount(pages, minlength=1)))
            self._num_shared = (len(pages) - num_distinct) * self._page_size
        return self._num_shared
