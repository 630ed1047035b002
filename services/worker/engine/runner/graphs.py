"""Decode steps as CUDA graphs: one launch in place of hundreds.

Shapes: N rows of a captured step, E hidden size.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from services.worker.engine.attention.backend import CapturableAttention
from services.worker.engine.batch import StepPlan
from services.worker.engine.kv.pool import PagePool, StepPlaces
from services.worker.engine.models.decoder import Decoder
from services.worker.engine.runner.inputs import (
    PACKED_ROWS,
    SlotTables,
    StepInputs,
    padding_only,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    # [PACKED_ROWS, N]
    packed: torch.Tensor
    # [N, E]
    hidden: torch.Tensor


class DecodeGraphs:
    """Owns one graph for each of `sizes`, the numbers of rows; all are captured at start.

    A step with fewer rows is padded; padding rows write to the padding slot's page, which no
    sequence reads. A replay overwrites the last one's output, so what reads that must be issued
    before.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        backend: CapturableAttention,
        pool: PagePool,
        tables: SlotTables,
        sizes: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._model = model
        self._backend = backend
        self._pool = pool
        self._tables = tables
        self._device = device
        self._sizes = np.array(sorted(sizes))
        # Graphs share their memory: one runs at a time. The largest comes first, to size it.
        self._memory = torch.cuda.graph_pool_handle()
        largest = int(self._sizes[-1])
        self._packed = torch.zeros(PACKED_ROWS * largest, dtype=torch.int64, device=device)
        self._hidden: torch.Tensor | None = None
        started = time.monotonic()
        self._captured = {size: self._capture(size) for size in self._sizes[::-1].tolist()}
        logger.info(
            "event=graphs_captured count=%s seconds=%.1f",
            len(self._captured),
            time.monotonic() - started,
        )

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is one for `forward`: every row computes one token and samples."""
        num_rows = len(plan.slots)
        return (
            num_rows == len(plan.token_ids) == len(plan.sample_rows)
            and num_rows <= self._sizes[-1]
            and not plan.prompt_logprobs
            # The table lacks the plan's own page changes, so this is a good guess; the backend
            # decides once more when it plans the step.
            and not self._backend.wants_eager(
                plan.slots, plan.start_positions, self._tables.host_page_table
            )
        )

    def forward(self, plan: StepPlan) -> tuple[StepInputs, torch.Tensor]:
        """Issue the forward pass -> its inputs, and hidden states, [N, E], the rows' first."""
        num_rows = len(plan.slots)
        captured = self._captured[int(self._sizes[np.searchsorted(self._sizes, num_rows)])]
        inputs = self._tables.prepare_captured(plan, captured.packed)
        self._backend.plan_captured(inputs.attention)
        captured.graph.replay()
        return inputs, captured.hidden

    @torch.inference_mode()
    def _capture(self, size: int) -> _Captured:
        packed = self._packed[: PACKED_ROWS * size].view(PACKED_ROWS, size)
        self._backend.plan_captured(self._tables.prepare_captured(padding_only(), packed).attention)
        # The first run loads kernels and makes handles, which a capture may not.
        hidden = self._run(packed)
        if self._hidden is None:
            self._hidden = torch.empty_like(hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._hidden[:size].copy_(self._run(packed))
        return _Captured(graph, packed, self._hidden[:size])

    def _run(self, packed: torch.Tensor) -> torch.Tensor:
        token_ids = self._tables.resolve(packed[0], packed[1])
        places = StepPlaces(self._pool, packed[3])
        return self._model.forward(token_ids, packed[2], places, self._backend)


def decode_graph_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 to 256 and every 16 to 512, up to the first that holds `max_rows`."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    return sizes[: np.searchsorted(sizes, max(max_rows, 8)) + 1]
