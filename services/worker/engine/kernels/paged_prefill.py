"""Attention of rows with several tokens over paged keys and values, in Triton.

A program takes a block of consecutive tokens of one row, for all query heads that share a
key/value head, and walks over the keys that the block sees (Dao, FlashAttention-2,
arXiv 2307.08691, section 3). Blocks of keys that every token sees are computed without a mask.

Shapes: T tokens, B blocks of tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.paged_attention import (
    HIDDEN,
    Softmax,
    accumulate,
    heads_of_program,
    load_block,
    padded_head_dim,
    score,
)


@triton.jit
def _attend(
    acc, total, top, queries, keys, values, table, kv_head, query_positions, start, stop, end,
    window, scale, soft_cap, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `start` to before `stop`."""
    for block in range(start, stop):
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = positions < end
        k = load_block(
            keys, table, positions, kv_head, exists, queries.dtype, KV_HEADS, HEAD_DIM, BLOCK_D,
            PAGE, MASKED,
        )  # fmt: skip
        v = load_block(
            values, table, positions, kv_head, exists, queries.dtype, KV_HEADS, HEAD_DIM, BLOCK_D,
            PAGE, MASKED,
        )  # fmt: skip
        scores = score(queries, k, scale, soft_cap, HAS_CAP)
        if MASKED:
            ahead = query_positions[:, None] - positions[None, :]
            scores = tl.where((ahead >= 0) & (ahead < window), scores, HIDDEN)
        acc, total, top = accumulate(acc, total, top, scores, v, WEIGHT_PARTS)
    return acc, total, top


@triton.jit
def _prefill(
    q, keys, values, out, blocks, page_table, q_stride, table_stride, window, scale, soft_cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, WEIGHT_PARTS: tl.constexpr,
):  # fmt: skip
    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    num_lanes: tl.constexpr = KV_HEADS * head_blocks
    lane = tl.program_id(0) % num_lanes
    entry = blocks + tl.program_id(0) // num_lanes * 4
    first_token = tl.load(entry)
    num_tokens = tl.load(entry + 1).to(tl.int32)
    first_position = tl.load(entry + 2).to(tl.int32)
    table = page_table + tl.load(entry + 3) * table_stride
    kv_head = lane // head_blocks
    # Row m of the tile is head m % HEADS of token m // HEADS.
    row = tl.arange(0, BLOCK_M)
    token, in_group = row // HEADS, lane % head_blocks * HEADS + row % HEADS
    heads = kv_head * GROUP + in_group
    columns = tl.arange(0, BLOCK_D)
    inside = ((token < num_tokens) & (in_group < GROUP))[:, None] & (columns < HEAD_DIM)[None, :]
    tokens = first_token + token
    queries = tl.load(
        q + (tokens * q_stride + heads * HEAD_DIM)[:, None] + columns[None, :], inside, other=0.0
    )
    end = first_position + num_tokens
    # Blocks of keys: all that some token sees, and among them those that every token sees.
    stop = tl.cdiv(end, BLOCK_N)
    start = tl.maximum(first_position - window + 1, 0) // BLOCK_N
    full_start = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N), stop)
    full_stop = tl.maximum((first_position + 1) // BLOCK_N, full_start)
    positions = first_position + token
    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_WINDOW:
        acc, total, top = _attend(
            acc, total, top, queries, keys, values, table, kv_head, positions, start, full_start,
            end, window, scale, soft_cap, KV_HEADS, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, HAS_CAP,
            WEIGHT_PARTS, MASKED=True,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, queries, keys, values, table, kv_head, positions, full_start, full_stop,
        end, window, scale, soft_cap, KV_HEADS, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, HAS_CAP,
        WEIGHT_PARTS, MASKED=False,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, queries, keys, values, table, kv_head, positions, full_stop, stop,
        end, window, scale, soft_cap, KV_HEADS, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, HAS_CAP,
        WEIGHT_PARTS, MASKED=True,
    )  # fmt: skip
    target = tokens * (KV_HEADS * GROUP * HEAD_DIM) + heads * HEAD_DIM
    tl.store(
        out + target[:, None] + columns[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        inside,
    )


class PagedPrefill:
    """Launches the kernel for one shape; owns nothing on the device."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        weight_parts: int,
    ) -> None:
        self._num_kv_heads, self._head_dim, self._page_size = num_kv_heads, head_dim, page_size
        self._group = num_heads // num_kv_heads
        self._heads = heads_of_program(self._group)
        self._num_lanes = num_kv_heads * triton.cdiv(self._group, self._heads)
        self._weight_parts = weight_parts
        self._is_wide = dtype == torch.float32
        self._processors = 1
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def block_tokens(self, num_tokens: int) -> int:
        """Tokens of a block when so many are to be computed: fewer where programs are few."""
        largest = self._tile_rows(is_large=True) // self._heads
        if triton.cdiv(num_tokens, largest) * self._num_lanes >= self._processors:
            return largest
        return self._tile_rows(is_large=False) // self._heads

    def run(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        blocks: torch.Tensor,
        block_tokens: int,
        page_table: torch.Tensor,
        softmax: Softmax,
        *,
        has_window: bool,
    ) -> None:
        """q and out [T, H, D], keys and values [pages, page size, K, D], blocks [B, 4] int64.

        A block is its first token, its number of tokens (at most `block_tokens`), the first
        token's position, and the row's slot (its row of `page_table`).
        """
        head_dim = self._head_dim
        columns = padded_head_dim(head_dim)
        is_large = block_tokens == self._tile_rows(is_large=True) // self._heads
        tile_rows = self._tile_rows(is_large=is_large)
        if self._is_wide:
            block_n, num_warps, num_stages = (32 if columns <= 128 else 16), 4, 2
        else:
            block_n, num_warps, num_stages = 64 if columns <= 128 else 32, tile_rows // 16, 3
        _prefill[(len(blocks) * self._num_lanes,)](
            q, keys, values, out, blocks, page_table, q.stride(0), page_table.stride(0),
            softmax.window, softmax.scale, softmax.soft_cap, KV_HEADS=self._num_kv_heads,
            GROUP=self._group, HEADS=self._heads, HEAD_DIM=head_dim, PAGE=self._page_size,
            BLOCK_M=tile_rows, BLOCK_N=block_n, BLOCK_D=columns, HAS_WINDOW=has_window,
            HAS_CAP=softmax.soft_cap != 0, WEIGHT_PARTS=self._weight_parts,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip

    def _tile_rows(self, *, is_large: bool) -> int:
        if self._is_wide:
            return 32
        return 128 if is_large else 64
