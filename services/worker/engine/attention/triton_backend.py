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
from services.worker.engine.kernels.paged_decode import PART_FIELDS, PagedDecode
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
        self._captured_parts = torch.zeros(
            self._decode.most_parts(max_rows), PART_FIELDS, dtype=torch.int64, device=device
        )
        self._inputs: AttentionInputs | None = None
        self._num_tokens = 0
        # Rows with one token, which are the step's first, and their keys' parts as the decode
        # kernel takes them.
        self._num_single = 0
        self._parts = self._captured_parts[:0]
        # [blocks, 4] of the other rows, as the prefill kernel takes them.
        self._blocks: torch.Tensor | None = None

    def plan(self, inputs: AttentionInputs) -> None:
        num_single = inputs.num_single
        self._plan(inputs, num_single, self._list_blocks(inputs, num_single))

    def plan_single(self, inputs: AttentionInputs) -> None:
        """Prepare for the rows with one token alone, which `run_single` computes."""
        self._plan(inputs, inputs.num_single, np.zeros((0, 4), np.int64))

    def _plan(
        self, inputs: AttentionInputs, num_single: int, blocks: npt.NDArray[np.int64]
    ) -> None:
        self._inputs, self._num_single = inputs, num_single
        self._num_tokens = int(inputs.num_tokens.sum())
        rows = slice(0, num_single)
        parts = self._decode.list_parts(inputs.slots[rows], inputs.start_positions[rows])
        parts_there, blocks_there = upload(self._pool.tensor.device, parts.ravel(), blocks.ravel())
        self._parts = parts_there.view(-1, PART_FIELDS)
        self._blocks = blocks_there.view(-1, 4) if len(blocks) else None

    def wants_eager(
        self, slots: Int32Array, start_positions: Int32Array, host_page_table: Int32Array
    ) -> bool:
        return False

    def plan_captured(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._num_tokens = len(inputs.slots)
        self._blocks = None
        self._num_single = len(inputs.slots)
        parts = self._decode.list_parts(inputs.slots, inputs.start_positions, padded=True)
        self._parts = self._captured_parts[: len(parts)]
        upload_into(self._parts, parts)

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = self._inputs
        assert inputs is not None, "plan() comes before run()"
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self.run_single(q, layer, out)
        if self._blocks is not None:
            self._prefill.run(
                q,
                self._pool.keys(layer.index),
                self._pool.values(layer.index),
                out,
                self._blocks,
                inputs.page_table,
                Softmax.of(layer.scale, layer.soft_cap, layer.sliding_window),
                has_window=layer.sliding_window is not None,
            )
        if len(q) > self._num_tokens:
            out[self._num_tokens :] = 0
        return out

    def run_single(self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor) -> None:
        """The planned rows with one token, whose keys and values are written, into `out`."""
        if not self._num_single:
            return
        assert self._inputs is not None, "plan() comes before run()"
        self._decode.run(
            q,
            self._pool.keys(layer.index),
            self._pool.values(layer.index),
            out,
            self._parts,
            self._inputs.page_table,
            Softmax.of(layer.scale, layer.soft_cap, layer.sliding_window),
            num_rows=self._num_single,
        )

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
