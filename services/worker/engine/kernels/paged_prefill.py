"""Attention of rows with several tokens over paged keys and values, in Triton.

A program takes a block of consecutive tokens of one row, for all query heads that share a
key/value head, and walks over the keys that the block sees (Dao, FlashAttention-2,
arXiv 2307.08691, section 3). Blocks of keys that every token sees are computed without a mask.

Shapes: T tokens, B blocks of tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

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

# Bytes of shared memory from which on two blocks of keys can be loaded ahead.
_AMPLE_SHARED_BYTES = 160 * 1024


class _Tiles(NamedTuple):
    """A program's query rows, and the keys it takes at a time, loaded so many stages ahead."""

    rows: int
    keys: int
    stages: int


def _tiles(dtype: torch.dtype, columns: int, shared_bytes: int) -> _Tiles:
    """What fits registers and shared memory, by measurement."""
    if dtype == torch.float32:
        return _Tiles(rows=16, keys=16, stages=2)
    # Page ids are loaded a stage before what they lead to.
    stages = 5 if shared_bytes >= _AMPLE_SHARED_BYTES else 3
    return _Tiles(rows=64, keys=64 if columns <= 128 else 32, stages=stages)


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
        self._columns = padded_head_dim(head_dim)
        shared_bytes = 0
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            shared_bytes = properties.shared_memory_per_block_optin
        self._tiles = _tiles(dtype, self._columns, shared_bytes)
        self._heads = heads_of_program(self._group, self._tiles.rows)
        self._num_lanes = num_kv_heads * triton.cdiv(self._group, self._heads)
        self._weight_parts = weight_parts
        # Most tokens of a block.
        self.block_tokens = self._tiles.rows // self._heads

    def run(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        blocks: torch.Tensor,
        page_table: torch.Tensor,
        softmax: Softmax,
        *,
        has_window: bool,
    ) -> None:
        """q and out [T, H, D], keys and values [pages, page size, K, D], blocks [B, 4] int64.

        A block is its first token, its number of tokens (at most `block_tokens`), the first
        token's position, and the row's slot (its row of `page_table`).
        """
        tiles = self._tiles
        _prefill[(len(blocks) * self._num_lanes,)](
            q, keys, values, out, blocks, page_table, q.stride(0), page_table.stride(0),
            softmax.window, softmax.scale, softmax.soft_cap, KV_HEADS=self._num_kv_heads,
            GROUP=self._group, HEADS=self._heads, HEAD_DIM=self._head_dim, PAGE=self._page_size,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_D=self._columns, HAS_WINDOW=has_window,
            HAS_CAP=softmax.soft_cap != 0, WEIGHT_PARTS=self._weight_parts,
            num_warps=4, num_stages=tiles.stages,
        )  # fmt: skip
