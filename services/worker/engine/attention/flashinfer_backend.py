"""Attention by FlashInfer's paged kernels (Ye et al., arXiv 2501.01005), for CUDA devices.

Rows with one token go through the decode wrapper (with tensor cores), rows with several through
the prefill wrapper (FA3 on Hopper, FA2 elsewhere and for FP8 keys and values, which FA3 takes
with FP8 queries only), so a mixed step is two calls a layer. Decode rows that share long prefixes
take two passes and a merge, which no graph captures. Layers with a sliding window, a soft cap or
an unusual scale (`can_run` is the rule) are computed by the Triton backend, in graphs too; so are
all layers of captured steps of few rows, where it is faster.

A wrapper's plan is written to pinned memory and copied from there while the host goes on, so
plans of consecutive steps use different pinned memory; with two steps in flight, two are enough.

Shapes: T tokens, S rows, H query heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flashinfer
import numpy as np
import torch
from flashinfer.decode import fast_decode_plan

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.flashinfer_decode import CascadeCalls, DecodeCalls
from services.worker.engine.attention.page_lists import PageLists, indptr_of, page_lists
from services.worker.engine.attention.sharing import PrefixFinder
from services.worker.engine.attention.triton_backend import TritonAttention
from services.worker.engine.attention.upload import upload_into
from services.worker.engine.attention.workspace import float_workspace_bytes
from services.worker.engine.batch import Int32Array
from services.worker.engine.kv.pool import PagePool

_STEPS_IN_FLIGHT = 2
_INT_WORKSPACE_BYTES = 8 * 1024**2
# Up to so many rows the Triton backend's one launch takes less time than FlashInfer's two.
_FEW_ROWS = 8


@dataclass(frozen=True, slots=True)
class _Part:
    """A range of the step's tokens that one planned call computes."""

    tokens: slice
    # A wrapper or a PlannedCascade.
    call: Any


class FlashInferAttention:
    """Owns FlashInfer's wrappers and workspaces."""

    def __init__(
        self,
        pool: PagePool,
        *,
        num_heads: int,
        max_captured_rows: int,
        max_pages: int,
        others: TritonAttention,
        has_other_layers: bool,
        few_rows: int = _FEW_ROWS,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the queries'; None: the pool's.

        `others`, over the same pool, computes the layers that FlashInfer does not take; of captured
        steps of at most `few_rows` rows, it computes every layer.
        """
        self._pool = pool
        self._dtype = dtype or pool.tensor.dtype
        self._others = others
        self._has_other_layers = has_other_layers
        self._few_rows = few_rows
        self._others_take_all = False
        self._num_heads = num_heads
        self._num_kv_heads, self._head_dim = pool.tensor.shape[-2:]
        device = pool.tensor.device
        num_bytes = float_workspace_bytes(
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            max_captured_rows=max_captured_rows,
            num_processors=torch.cuda.get_device_properties(device).multi_processor_count,
        )
        self._float_workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._decode = DecodeCalls(self._float_workspace, self._shape_arguments())
        self._cascade = CascadeCalls(self._float_workspace, self._decode, self._shape_arguments())
        self._prefixes = PrefixFinder(
            page_size=pool.page_size,
            token_bytes=2 * self._num_kv_heads * self._head_dim * pool.tensor.dtype.itemsize,
        )
        self._prefill = [
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._float_workspace, "NHD")
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._captured = _CapturedDecode(
            self._float_workspace, max_rows=max_captured_rows, max_pages=max_pages
        )
        self._turn = 0
        self._parts: list[_Part] = []

    def plan(self, inputs: AttentionInputs) -> None:
        self._start()
        if self._has_other_layers:
            self._others.plan(inputs)
        several = np.flatnonzero(inputs.num_tokens > 1)
        # Batches put decode rows first; a row with one token among the others is computed as a
        # prefill of one token.
        num_single = int(several[0]) if several.size else len(inputs.slots)
        if num_single:
            self._parts.append(_Part(slice(0, num_single), self._plan_decode(inputs, num_single)))
        if num_single < len(inputs.slots):
            rows = slice(num_single, len(inputs.slots))
            wrapper = self._prefill[self._turn]
            pages = page_lists(inputs, rows, self._pool.page_size)
            first_tokens = indptr_of(inputs.num_tokens[rows])
            wrapper.plan(
                first_tokens,
                pages.indptr,
                self._on_device(pages.indices),
                pages.last_page_len,
                self._num_heads,
                self._num_kv_heads,
                self._head_dim,
                self._pool.page_size,
                causal=True,
                q_data_type=self._dtype,
                kv_data_type=self._pool.tensor.dtype,
            )
            tokens = slice(num_single, num_single + int(first_tokens[-1]))
            self._parts.append(_Part(tokens, wrapper))

    def wants_eager(
        self, slots: Int32Array, start_positions: Int32Array, host_page_table: Int32Array
    ) -> bool:
        return self._prefixes.find(slots, start_positions, host_page_table) is not None

    def plan_captured(self, inputs: AttentionInputs) -> None:
        self._start()
        self._others_take_all = len(inputs.slots) <= self._few_rows
        if self._others_take_all or self._has_other_layers:
            self._others.plan_captured(inputs)
        if self._others_take_all:
            return
        pages = page_lists(inputs, slice(0, len(inputs.slots)), self._pool.page_size)
        wrapper = self._captured.plan(pages, self._turn, **self._shape_arguments())
        self._parts.append(_Part(slice(0, len(inputs.slots)), wrapper))

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._others_take_all or not can_run(layer, self._head_dim):
            return self._others.run(q, layer, out)
        assert self._parts, "plan() comes before run()"
        keys, values = self._pool.keys(layer.index), self._pool.values(layer.index)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for part in self._parts:
            part.call.run(q[part.tokens], (keys, values), out=out[part.tokens])
        num_tokens = self._parts[-1].tokens.stop
        if len(q) > num_tokens:
            out[num_tokens:] = 0
        return out

    def _start(self) -> None:
        self._others_take_all = False
        self._parts.clear()
        self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT

    def _plan_decode(self, inputs: AttentionInputs, num_rows: int) -> Any:
        rows = slice(0, num_rows)
        groups = self._prefixes.find(
            inputs.slots[rows], inputs.start_positions[rows], inputs.host_page_table
        )
        if groups is not None:
            return self._cascade.plan(inputs, num_rows, groups)
        return self._decode.plan(page_lists(inputs, rows, self._pool.page_size))

    def _on_device(self, indices: Int32Array) -> torch.Tensor:
        pinned = torch.from_numpy(indices).pin_memory()
        return pinned.to(self._float_workspace.device, non_blocking=True)

    def _shape_arguments(self) -> dict[str, Any]:
        return {
            "num_qo_heads": self._num_heads,
            "num_kv_heads": self._num_kv_heads,
            "head_dim": self._head_dim,
            "page_size": self._pool.page_size,
            "q_data_type": self._dtype,
            "kv_data_type": self._pool.tensor.dtype,
        }


class _CapturedDecode:
    """Owns a decode wrapper for each number of rows, over buffers whose addresses never change.

    The wrappers share the device's buffers, since one runs at a time; pinned memory goes in turn.
    Relies on the wrapper's private names for its staging, which FlashInfer's own fast plan uses.
    """

    def __init__(self, float_workspace: torch.Tensor, *, max_rows: int, max_pages: int) -> None:
        device = float_workspace.device
        self._float_workspace = float_workspace
        self._max_rows = max_rows
        # Row starts, tokens on last pages, page ids: side by side, so that one copy fills them.
        self._buffer = torch.zeros(
            2 * max_rows + 1 + max_rows * max_pages, dtype=torch.int32, device=device
        )
        self._int_workspace = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._staging = [
            torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True)
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._wrappers: dict[int, Any] = {}

    def plan(self, pages: PageLists, turn: int, **shape: Any) -> Any:
        """The wrapper for as many rows, ready to run."""
        num_rows = len(pages.last_page_len)
        last_start, indices_start = self._max_rows + 1, 2 * self._max_rows + 1
        host = np.zeros(indices_start + len(pages.indices), np.int32)
        host[: num_rows + 1] = pages.indptr
        host[last_start : last_start + num_rows] = pages.last_page_len
        host[indices_start:] = pages.indices
        upload_into(self._buffer[: len(host)], host)
        indices = self._buffer[indices_start : len(host)]
        wrapper = self._wrappers.get(num_rows)
        if wrapper is not None:
            wrapper._pin_memory_int_workspace_buffer = self._staging[turn]
            fast_decode_plan(
                wrapper,
                pages.indptr,
                indices,
                pages.last_page_len,
                global_override_indptr_cpu=pages.indptr,
                **shape,
            )
            return wrapper
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._float_workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._buffer[: num_rows + 1],
            paged_kv_indices_buffer=self._buffer[indices_start:],
            paged_kv_last_page_len_buffer=self._buffer[last_start : last_start + num_rows],
        )
        wrapper._int_workspace_buffer = self._int_workspace
        wrapper._pin_memory_int_workspace_buffer = self._staging[turn]
        # The full plan chooses the kernels, which the fast one takes as chosen.
        wrapper.plan(pages.indptr, indices, pages.last_page_len, **shape)
        self._wrappers[num_rows] = wrapper
        return wrapper


def can_run(layer: AttentionLayer, head_dim: int) -> bool:
    """Whether FlashInfer computes this layer here; the Triton backend does the others."""
    return (
        layer.sliding_window is None
        and layer.soft_cap is None
        and math.isclose(layer.scale, head_dim**-0.5)
    )
