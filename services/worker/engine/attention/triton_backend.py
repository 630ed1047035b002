"""Attention by kernels of our own in Triton, for CUDA devices and every shape.

Rows with one token go through the decode kernel, rows with several through the prefill kernel, so
a mixed step is two launches a layer. Head sizes to 256, any number of query heads to a key/value
head, windows, soft caps and scales; 16-bit types and float32.

Shapes: T tokens, S rows, H query heads, D head size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.upload import upload, upload_into
from services.worker.engine.batch import Int32Array
from services.worker.engine.kernels.paged_attention import Softmax, parts_of_weights
from services.worker.engine.kernels.paged_decode import PagedDecode
from services.worker.engine.kernels.paged_prefill import PagedPrefill
from services.worker.engine.kv.pool import PagePool


class TritonAttention:
    """Owns the lists of a step's rows on the device.

    `dtype` is the queries'. With `reduce_in_fp32`, softmax probabilities are multiplied with
    values as float32 numbers instead of rounded to the queries' type.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        num_heads: int,
        max_rows: int,
        dtype: torch.dtype,
        reduce_in_fp32: bool = False,
    ) -> None:
        page_size, num_kv_heads, head_dim = pool.tensor.shape[-3:]
        device = pool.tensor.device
        self._pool = pool
        weight_parts = parts_of_weights(dtype, in_fp32=reduce_in_fp32)
        self._decode = PagedDecode(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            max_rows=max_rows,
            dtype=dtype,
            device=device,
            weight_parts=weight_parts,
        )
        self._prefill = PagedPrefill(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            dtype=dtype,
            device=device,
            weight_parts=weight_parts,
        )
        self._captured_rows = torch.zeros(max_rows, 3, dtype=torch.int64, device=device)
        self._inputs: AttentionInputs | None = None
        self._num_tokens = 0
        # [S, 3] of the rows with one token, which are the step's first.
        self._rows = self._captured_rows[:0]
        # [blocks, 4] of the other rows, as the prefill kernel takes them.
        self._blocks: torch.Tensor | None = None

    def plan(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._num_tokens = int(inputs.num_tokens.sum())
        several = np.flatnonzero(inputs.num_tokens > 1)
        # Batches put rows with one token first; one among the others is a block of one token.
        num_single = int(several[0]) if several.size else len(inputs.slots)
        rows = self._decode.list_rows(
            inputs.slots[:num_single], inputs.start_positions[:num_single]
        )
        blocks = self._list_blocks(inputs, num_single)
        rows_there, blocks_there = upload(self._pool.tensor.device, rows.ravel(), blocks.ravel())
        self._rows = rows_there.view(-1, 3)
        self._blocks = blocks_there.view(-1, 4) if len(blocks) else None

    def wants_eager(
        self, slots: Int32Array, start_positions: Int32Array, host_page_table: Int32Array
    ) -> bool:
        return False

    def plan_captured(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._num_tokens = len(inputs.slots)
        self._blocks = None
        self._rows = self._captured_rows[: len(inputs.slots)]
        upload_into(self._rows, self._decode.list_rows(inputs.slots, inputs.start_positions))

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = self._inputs
        assert inputs is not None, "plan() comes before run()"
        keys, values = self._pool.keys(layer.index), self._pool.values(layer.index)
        softmax = Softmax.of(layer.scale, layer.soft_cap, layer.sliding_window)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if len(self._rows):
            self._decode.run(q, keys, values, out, self._rows, inputs.page_table, softmax)
        if self._blocks is not None:
            self._prefill.run(
                q,
                keys,
                values,
                out,
                self._blocks,
                inputs.page_table,
                softmax,
                has_window=layer.sliding_window is not None,
            )
        if len(q) > self._num_tokens:
            out[self._num_tokens :] = 0
        return out

    def _list_blocks(self, inputs: AttentionInputs, first_row: int) -> npt.NDArray[np.int64]:
        """Rows from `first_row` on, cut in blocks; those that see most come first."""
        num_tokens = inputs.num_tokens[first_row:].astype(np.int64)
        size = self._prefill.block_tokens
        num_blocks = -(-num_tokens // size)
        rows = np.repeat(np.arange(len(num_tokens)), num_blocks)
        first_blocks = np.cumsum(num_blocks) - num_blocks
        offsets = (np.arange(len(rows)) - first_blocks[rows]) * size
        first_tokens = first_row + np.cumsum(num_tokens) - num_tokens
        positions = inputs.start_positions[first_row:].astype(np.int64)[rows] + offsets
        blocks = np.stack(
            [
                first_tokens[rows] + offsets,
                np.minimum(num_tokens[rows] - offsets, size),
                positions,
                inputs.slots[first_row:][rows],
            ],
            1,
        )
        return blocks[np.argsort(-positions, kind="stable")]
