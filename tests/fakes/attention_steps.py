"""Random steps over random pools: any attention backend against the torch backend.

Shapes: T tokens, S rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from services.worker.engine.attention.backend import (
    AttentionInputs,
    AttentionLayer,
    CapturableAttention,
)
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.kv.pool import PagePool, write_tokens


def write_step(
    pool: PagePool, inputs: AttentionInputs, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor
) -> None:
    """What a model does before it attends: the step's keys and values [T, K, D] to their places."""
    locations = []
    for slot, start, count in zip(
        inputs.slots, inputs.start_positions, inputs.num_tokens, strict=True
    ):
        where = np.arange(start, start + count)
        pages = inputs.host_page_table[slot][where // pool.page_size].astype(np.int64)
        locations.append(pages * pool.page_size + where % pool.page_size)
    there = torch.from_numpy(np.concatenate(locations)).to(k.device)
    write_tokens(pool.keys(layer.index), there, k)
    write_tokens(pool.values(layer.index), there, v)


class AttentionSteps:
    """A backend and, over an equal pool in float32, the torch backend."""

    def __init__(
        self,
        make_backend: Callable[[PagePool, int, int], CapturableAttention],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        num_slots: int = 12,
        max_len: int = 700,
        seed: int = 0,
    ) -> None:
        """`make_backend` takes the pool, the number of query heads and the most rows."""
        self.random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.num_slots, self.max_len, self.page_size = num_slots, max_len, page_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        max_pages = -(-max_len // page_size)
        self.pool, reference_pool = (
            PagePool(
                num_layers=2,
                num_pages=num_slots * max_pages,
                page_size=page_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=kept,
                device=self.device,
            )
            for kept in (dtype, torch.float32)
        )
        self.pool.tensor.copy_(torch.randn_like(self.pool.tensor))
        reference_pool.tensor.copy_(self.pool.tensor)
        self.reference = TorchAttention(reference_pool)
        self.reference_pool = reference_pool
        self.backend = make_backend(self.pool, num_heads, num_slots)
        table = self.random.permutation(num_slots * max_pages).reshape(num_slots, max_pages)
        self.table = table.astype(np.int32)
        self.table_there = torch.from_numpy(self.table).to(self.device)

    def inputs(self, num_tokens: list[int], starts: list[int]) -> AttentionInputs:
        """A step of rows in random slots."""
        return AttentionInputs(
            slots=self.random.permutation(self.num_slots)[: len(starts)].astype(np.int32),
            num_tokens=np.array(num_tokens, np.int32),
            start_positions=np.array(starts, np.int32),
            host_page_table=self.table,
            page_table=self.table_there,
        )

    def mixed(self, num_single: int, lengths: list[int]) -> AttentionInputs:
        """Rows with one token, then rows of `lengths`, at random positions."""
        num_tokens = [1] * num_single + lengths
        starts = [int(self.random.integers(0, self.max_len - n + 1)) for n in num_tokens]
        return self.inputs(num_tokens, starts)

    def tensors(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values as a model gives them: views of one tensor."""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        packed = torch.randn(num_tokens, sum(sizes), self.head_dim, device=self.device)
        q, k, v = packed.to(self.dtype).split(sizes, dim=1)
        return q, k, v

    def expected(
        self,
        inputs: AttentionInputs,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """The reference's result, in float32; both pools get the keys and values."""
        write_step(self.pool, inputs, layer, k, v)
        write_step(self.reference_pool, inputs, layer, k.float(), v.float())
        self.reference.plan(inputs)
        return self.reference.run(q.float(), layer)

    def worst_error(
        self, inputs: AttentionInputs, layer: AttentionLayer, *, captured: bool = False
    ) -> float:
        """Largest difference from the reference in one step, which may not write to its pool."""
        q, k, v = self.tensors(int(inputs.num_tokens.sum()))
        expected = self.expected(inputs, layer, q, k, v)
        if captured:
            self.backend.plan_captured(inputs)
        else:
            self.backend.plan(inputs)
        got = self.backend.run(q, layer)
        assert got.dtype == self.dtype
        assert torch.equal(self.pool.tensor.float(), self.reference_pool.tensor)
        return (got.float() - expected).abs().max().item()
