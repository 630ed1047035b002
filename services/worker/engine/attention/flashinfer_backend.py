"""Attention by FlashInfer's paged kernels (Ye et al., arXiv 2501.01005), for CUDA devices.

FlashInfer computes rows with several tokens (FA3 on Hopper, FA2 elsewhere and for FP8 keys and
values, which FA3 takes with FP8 queries only), and rows with one token that share long prefixes,
in two passes and a merge, which no graph captures. Other rows with one token are the Triton
backend's, which is faster at them (bench/results/attention_gpu.md), and so are layers with a
sliding window, a soft cap or an unusual scale (`can_run` is the rule). A mixed step is two calls a
layer.

A wrapper's plan is written to pinned memory and copied from there while the host goes on, so
plans of consecutive steps use different pinned memory; with two steps in flight, two are enough.

Shapes: T tokens, S rows, H query heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flashinfer
import torch

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.flashinfer_decode import CascadeCalls, DecodeCalls
from services.worker.engine.attention.page_lists import indptr_of, page_lists
from services.worker.engine.attention.sharing import PrefixFinder
from services.worker.engine.attention.triton_backend import TritonAttention
from services.worker.engine.attention.workspace import float_workspace_bytes
from services.worker.engine.batch import Int32Array
from services.worker.engine.kv.pool import PagePool

_STEPS_IN_FLIGHT = 2


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
        others: TritonAttention,
        has_other_layers: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the queries'; None: the pool's.

        `others`, over the same pool, computes what FlashInfer does not.
        """
        self._pool = pool
        self._dtype = dtype or pool.tensor.dtype
        self._others = others
        self._has_other_layers = has_other_layers
        self._others_take_all = False
        self._others_take_single = False
        self._num_heads = num_heads
        self._num_kv_heads, self._head_dim = pool.tensor.shape[-2:]
        device = pool.tensor.device
        num_bytes = float_workspace_bytes(
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            num_processors=torch.cuda.get_device_properties(device).multi_processor_count,
        )
        self._float_workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        shape = self._shape_arguments()
        self._cascade = CascadeCalls(
            self._float_workspace, DecodeCalls(self._float_workspace, shape), shape
        )
        self._prefixes = PrefixFinder(
            page_size=pool.page_size,
            token_bytes=2 * self._num_kv_heads * self._head_dim * pool.tensor.dtype.itemsize,
        )
        self._prefill = [
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._float_workspace, "NHD")
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._turn = 0
        self._num_tokens = 0
        self._parts: list[_Part] = []

    def plan(self, inputs: AttentionInputs) -> None:
        self._start(inputs)
        num_single = inputs.num_single
        single = slice(0, num_single)
        groups = self._prefixes.find(
            inputs.slots[single], inputs.start_positions[single], inputs.host_page_table
        )
        if groups is not None:
            self._parts.append(_Part(single, self._cascade.plan(inputs, num_single, groups)))
        self._others_take_single = groups is None
        if self._has_other_layers:
            self._others.plan(inputs)
        elif self._others_take_single:
            self._others.plan_single(inputs)
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
        self._start(inputs)
        self._others_take_all = True
        self._others.plan_captured(inputs)

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._others_take_all or not can_run(layer, self._head_dim):
            return self._others.run(q, layer, out)
        assert self._num_tokens, "plan() comes before run()"
        keys, values = self._pool.keys(layer.index), self._pool.values(layer.index)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self._others_take_single:
            self._others.run_single(q, layer, out)
        for part in self._parts:
            part.call.run(q[part.tokens], (keys, values), out=out[part.tokens])
        if len(q) > self._num_tokens:
            out[self._num_tokens :] = 0
        return out

    def _start(self, inputs: AttentionInputs) -> None:
        self._num_tokens = int(inputs.num_tokens.sum())
        self._others_take_all = False
        self._parts.clear()
        self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT

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


def can_run(layer: AttentionLayer, head_dim: int) -> bool:
    """Whether FlashInfer computes this layer here; the Triton backend does the others."""
    return (
        layer.sliding_window is None
        and layer.soft_cap is None
        and math.isclose(layer.scale, head_dim**-0.5)
    )
