"""Steps of any kind as CUDA graphs of everything between attention layers.

Attention depends on the rows at hand and is launched by itself; the rest of a layer, the write of
keys and values included, depends only on the number of tokens, so it is captured once for each
number and replayed for steps padded to it (after the piecewise graphs of vLLM, without tracing:
the attention backend that the model is given during capture ends one graph and begins the next).

Shapes: T tokens of a step, N tokens of a captured one, H query heads, D head size, E hidden size.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.worker.engine.attention.backend import (
    AttentionBackend,
    AttentionInputs,
    AttentionLayer,
)
from services.worker.engine.batch import StepPlan
from services.worker.engine.kv.pool import PagePool, StepPlaces
from services.worker.engine.models.decoder import Decoder
from services.worker.engine.runner.inputs import (
    PACKED_ROWS,
    SlotTables,
    StepInputs,
    padded_view,
    padding_only,
)

logger = logging.getLogger(__name__)

_LARGEST = 1024


@dataclass(frozen=True, slots=True)
class _Attention:
    """One call between two graphs; the queries lie where the first of them writes."""

    q: torch.Tensor
    layer: AttentionLayer


@dataclass(frozen=True, slots=True)
class _Captured:
    """The graphs of one number of tokens; one more than attention layers."""

    graphs: list[torch.cuda.CUDAGraph]
    attentions: list[_Attention]
    # [N, E]
    hidden: torch.Tensor


class PieceGraphs:
    """Owns the graphs for each of `sizes`, numbers of tokens; all are captured at start.

    All share their memory: a step runs to its end before the next begins. A replay overwrites the
    last one's output, so what reads that must be issued before.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        backend: AttentionBackend,
        pool: PagePool,
        tables: SlotTables,
        sizes: tuple[int, ...],
        num_rows: int,
        device: torch.device,
    ) -> None:
        """`num_rows` is the most that steps sample, padding counted."""
        self._model = model
        self._backend = backend
        self._pool = pool
        self._tables = tables
        self._device = device
        self._sizes = np.array(sorted(sizes))
        self._memory = torch.cuda.graph_pool_handle()
        # One for all captures: memory that a stream has taken serves no other.
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        largest = int(self._sizes[-1])
        # What captures read, then what concerns the rows that sample.
        self._buffer = torch.zeros(
            PACKED_ROWS * largest + 2 * num_rows, dtype=torch.int64, device=device
        )
        # [largest N, H, D] and [largest N, E], made when their shapes are known.
        self._attended: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        started = time.monotonic()
        self._captured = {size: self._capture(size) for size in self._sizes[::-1].tolist()}
        logger.info(
            "event=piecewise_graphs_captured sizes=%s seconds=%.1f",
            len(self._captured),
            time.monotonic() - started,
        )

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is not too large for `forward`."""
        return len(plan.token_ids) <= int(self._sizes[-1])

    def forward(self, plan: StepPlan) -> tuple[StepInputs, torch.Tensor]:
        """Issue the forward pass -> its inputs, and the tokens' hidden states, [T, E]."""
        num_tokens = len(plan.token_ids)
        size = int(self._sizes[np.searchsorted(self._sizes, num_tokens)])
        captured = self._captured[size]
        inputs = self._tables.prepare_padded(plan, self._buffer, size)
        self._backend.plan(inputs.attention)
        assert self._attended is not None, "made by the first capture"
        attended = self._attended[:num_tokens]
        for graph, call in zip(captured.graphs, captured.attentions, strict=False):
            graph.replay()
            self._backend.run(call.q[:num_tokens], call.layer, attended)
        captured.graphs[-1].replay()
        return inputs, captured.hidden[:num_tokens]

    @torch.inference_mode()
    def _capture(self, size: int) -> _Captured:
        # What runs here writes keys and values where padding's go.
        self._tables.prepare_padded(padding_only(), self._buffer, size)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # The first run loads kernels and makes handles, which a capture may not.
            warm_up = _Uncaptured(self._attended)
            hidden = self._run(size, warm_up)
            if self._attended is None or self._hidden is None:
                self._attended = warm_up.out
                self._hidden = torch.empty_like(hidden)
            assert self._attended is not None, "a model has an attention layer"
            stream.synchronize()
            pieces = _Pieces(self._memory, self._attended[:size])
            pieces.begin()
            try:
                self._hidden[:size].copy_(self._run(size, pieces))
            finally:
                pieces.end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return _Captured(pieces.graphs, pieces.attentions(), self._hidden[:size])

    def _run(self, size: int, backend: AttentionBackend) -> torch.Tensor:
        token_ids, slots, positions, locations = padded_view(self._buffer, size)
        return self._model.forward(
            self._tables.resolve(token_ids, slots),
            positions,
            StepPlaces(self._pool, locations),
            backend,
        )


class _Uncaptured:
    """Stands for attention while kernels are loaded: leaves the result as it is."""

    def __init__(self, out: torch.Tensor | None) -> None:
        self.out = out

    def plan(self, inputs: AttentionInputs) -> None:
        pass

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.out is None:
            self.out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        return self.out[: len(q)]


class _Pieces:
    """Stands for attention during a capture: each call ends a graph and begins the next.

    The queries that a graph computes for the attention after it are remembered by address only.
    The model lets go of them as it goes on, so their memory serves later pieces, which run when
    that attention has read them.
    """

    def __init__(self, memory: Any, attended: torch.Tensor) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._memory = memory
        self._attended = attended
        self._calls: list[tuple[_Address, AttentionLayer]] = []

    def begin(self) -> None:
        """Start a graph."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
        self.graphs.append(graph)

    def end(self) -> None:
        """Finish the newest graph."""
        self.graphs[-1].capture_end()

    def plan(self, inputs: AttentionInputs) -> None:
        pass

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._calls.append((_Address(q), layer))
        self.end()
        self.begin()
        return self._attended

    def attentions(self) -> list[_Attention]:
        """The calls between the graphs."""
        return [_Attention(q.tensor(), layer) for q, layer in self._calls]


class _Address:
    """A tensor's place on the device without a claim on its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # The interface has no name for bfloat16; integers of the same size carry it.
        size = tensor.element_size()
        self._dtype = tensor.dtype
        self._device = tensor.device
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": f"<i{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "data": (tensor.data_ptr(), False),
            "stream": None,
        }

    def tensor(self) -> torch.Tensor:
        """A view of the place."""
        return torch.as_tensor(self, device=self._device).view(self._dtype)


def piece_graph_sizes(max_step_tokens: int) -> tuple[int, ...]:
    """Every 8 up to 64, every 16 to 256, every 32 to 1,024, as far as steps go."""
    sizes = (*range(8, 64, 8), *range(64, 256, 16), *range(256, _LARGEST + 1, 32))
    return tuple(size for size in sizes if size <= max(max_step_tokens, sizes[0]))
