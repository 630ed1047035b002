"""Attention of rows with one token each over paged keys and values, in Triton.

A row's keys are cut in parts (flash decoding: https://pytorch.org/blog/flash-decoding), one program
for each and for the query heads that share a key/value head; the program that ends last adds the
parts of its row up. The longest parts come first (Graham, Bounds on Multiprocessing Timing
Anomalies, 1969), so that no long one starts when the others are done. What there is to do is read
on the device, so a launch may be captured and replayed with other rows.

Shapes: S rows, P parts, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from services.worker.engine.batch import Int32Array
from services.worker.engine.kernels.launch import Launcher
from services.worker.engine.kernels.paged_attention import (
    HIDDEN,
    Softmax,
    accumulate,
    heads_of_program,
    load_block,
    padded_head_dim,
    score,
)

# Of a row; a power of two.
_MAX_PARTS = tl.constexpr(32)
# Query heads of a program, bounded by its registers.
_MAX_HEADS = 32
# So few rows do with programs of fewer threads.
_FEW_ROWS = 16
# Parts are as long as would make so many programs for each processor, of few rows and of more.
_PROGRAMS_OF_FEW, _PROGRAMS_OF_MANY = 1, 2
# What is listed of a part: row, slot, position of the row's token, which part of how many, and the
# number of the row's first part.
PART_FIELDS = 6
_PART_FIELDS = tl.constexpr(PART_FIELDS)
# Numbers of the parts that a program adds up at a time, bounded by its registers.
_MERGED_NUMBERS = 8192


class _Tiles(NamedTuple):
    """How a program walks over its keys: so many at a time, loaded so many stages ahead."""

    keys: int
    warps: int
    stages: int


def _tiles(dtype: torch.dtype, heads: int, columns: int, num_rows: int) -> _Tiles:
    """What fits registers and shared memory, by measurement."""
    if dtype == torch.float32:
        return _Tiles(keys=16, warps=4, stages=2)
    # Page ids are loaded a stage before what they lead to, so five stages hold two tiles.
    if heads * columns > 4096:
        return _Tiles(keys=64 if columns <= 128 else 32, warps=4, stages=5)
    if num_rows <= _FEW_ROWS:
        return _Tiles(keys=64, warps=2, stages=5)
    return _Tiles(keys=64, warps=4, stages=3)


@triton.jit
def _decode(
    q, keys, values, out, parts, page_table, partial, partial_max, partial_sum, arrivals,
    q_stride, table_stride, window, scale, soft_cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, MERGED: tl.constexpr, HAS_CAP: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    listed = parts + tl.program_id(1) * _PART_FIELDS
    row, slot = tl.load(listed), tl.load(listed + 1)
    length = tl.load(listed + 2).to(tl.int32) + 1
    part, wanted_parts = tl.load(listed + 3).to(tl.int32), tl.load(listed + 4).to(tl.int32)
    # A window may leave fewer blocks than parts were wanted.
    first = tl.maximum(length - window, 0)
    first_block = first // BLOCK_N
    num_blocks = tl.cdiv(length, BLOCK_N) - first_block
    blocks_per_part = tl.cdiv(num_blocks, wanted_parts)
    num_parts = tl.cdiv(num_blocks, blocks_per_part)
    if part >= num_parts:
        return
    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = lane // head_blocks
    in_group = lane % head_blocks * HEADS + tl.arange(0, BLOCK_H)
    is_head = (tl.arange(0, BLOCK_H) < HEADS) & (in_group < GROUP)
    heads = kv_head * GROUP + in_group
    columns = tl.arange(0, BLOCK_D)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    queries = tl.load(
        q + row * q_stride + heads[:, None] * HEAD_DIM + columns[None, :],
        is_head[:, None] & (columns < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    table = page_table + slot * table_stride
    top = tl.full([BLOCK_H], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    start = first_block + part * blocks_per_part
    stop = tl.minimum(start + blocks_per_part, first_block + num_blocks)
    for block in range(start, stop):
        positions = block * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = (positions >= first) & (positions < length)
        k = load_block(
            keys, table, positions, kv_head, visible, queries.dtype, KV_HEADS, HEAD_DIM, BLOCK_D,
            PAGE, MASKED=True,
        )  # fmt: skip
        v = load_block(
            values, table, positions, kv_head, visible, queries.dtype, KV_HEADS, HEAD_DIM, BLOCK_D,
            PAGE, MASKED=True,
        )  # fmt: skip
        scores = score(queries, k, scale, soft_cap, HAS_CAP)
        scores = tl.where(visible[None, :], scores, HIDDEN)
        acc, total, top = accumulate(acc, total, top, scores, v, WEIGHT_PARTS)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    target = out + row * (KV_HEADS * GROUP * HEAD_DIM)
    if num_parts == 1:
        tl.store(
            target + heads[:, None] * HEAD_DIM + columns[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            is_head[:, None] & (columns < HEAD_DIM)[None, :],
        )
        return
    num_lanes: tl.constexpr = KV_HEADS * head_blocks
    # The parts of a row and lane lie side by side.
    first_part = tl.load(listed + 5) * num_lanes + lane * wanted_parts
    in_part = tl.arange(0, BLOCK_H)
    held = in_part < BLOCK_G
    place = (first_part + part) * BLOCK_G + in_part
    tl.store(partial_max + place, top, held)
    tl.store(partial_sum + place, total, held)
    tl.store(partial + place[:, None] * BLOCK_D + columns[None, :], acc, held[:, None])
    # All threads have stored before one of them counts the program; the count orders the stores
    # before the loads of the program that counts last.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + row * num_lanes + lane, 1, sem="acq_rel")
    if arrived == num_parts - 1:
        tl.store(arrivals + row * num_lanes + lane, 0)
        _merge(
            target, partial, partial_max, partial_sum, first_part, num_parts,
            kv_head * GROUP + lane % head_blocks * HEADS,
            tl.minimum(HEADS, GROUP - lane % head_blocks * HEADS),
            HEAD_DIM, BLOCK_G, BLOCK_D, MERGED,
        )  # fmt: skip


@triton.jit
def _merge(
    target, partial, partial_max, partial_sum, first_part, num_parts, first_head, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The parts of one row's group of heads, MERGED at a time."""
    heads, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    parts = tl.arange(0, _MAX_PARTS)
    places = (first_part + parts)[:, None] * BLOCK_G + heads[None, :]
    exists = (parts < num_parts)[:, None]
    tops = tl.load(partial_max + places, exists, other=HIDDEN, cache_modifier=".cg")
    sums = tl.load(partial_sum + places, exists, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp2(tops - top[None, :]), 0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for done in range(0, num_parts, MERGED):
        parts_here = done + tl.arange(0, MERGED)
        places_here = (first_part + parts_here)[:, None] * BLOCK_G + heads[None, :]
        exists_here = (parts_here < num_parts)[:, None]
        tops_here = tl.load(
            partial_max + places_here, exists_here, other=HIDDEN, cache_modifier=".cg"
        )
        sums_here = tl.load(
            partial + places_here[:, :, None] * BLOCK_D + columns[None, None, :],
            exists_here[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += tl.sum(sums_here * tl.exp2(tops_here - top[None, :])[:, :, None], 0)
    tl.store(
        target + (first_head + heads)[:, None] * HEAD_DIM + columns[None, :],
        (acc / total[:, None]).to(target.dtype.element_ty),
        (heads < num_heads)[:, None] & (columns < HEAD_DIM)[None, :],
    )


class PagedDecode:
    """Owns the parts' sums and the count of ended programs; launches the kernel for one shape.

    The count is zero between launches: the program that ends last sets it back.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        weight_parts: int,
    ) -> None:
        group = num_heads // num_kv_heads
        heads = heads_of_program(group, _MAX_HEADS)
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._num_lanes = num_kv_heads * triton.cdiv(group, heads)
        self._page_size = page_size
        self._weight_parts = weight_parts
        self._overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self._processors = 1
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._heads, self._block_g = heads, triton.next_power_of_2(heads)
        self._dtype = dtype
        self._launchers: dict[_Tiles, Launcher] = {}
        self._block_h = max(16, self._block_g)
        columns = padded_head_dim(head_dim)
        size = self.most_parts(max_rows) * self._num_lanes * self._block_g
        self._sums = torch.empty(size * columns, dtype=torch.float32, device=device)
        self._maxima = torch.empty(size, dtype=torch.float32, device=device)
        self._totals = torch.empty(size, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(max_rows * self._num_lanes, dtype=torch.int32, device=device)

    def most_parts(self, num_rows: int) -> int:
        """P at most, of so many rows."""
        return num_rows + self._num_wanted(num_rows)

    def list_parts(
        self, slots: Int32Array, positions: Int32Array, *, padded: bool = False
    ) -> npt.NDArray[np.int64]:
        """[S] rows of the page table and positions of the tokens -> [P, 6] parts for `run`.

        Parts of all rows are about as long, so that one long row does not outlast the others.
        Padded ones are `most_parts`: parts that do not exist fill up.
        """
        num_rows = len(slots)
        lengths = positions.astype(np.int64) + 1
        keys = max(
            -(-int(lengths.sum()) // max(self._num_wanted(num_rows), 1)),
            self._tiles(num_rows).keys,
        )
        # To the nearest number: a row a little longer than a part is not worth a merge.
        num_parts = np.clip((lengths + keys // 2) // keys, 1, _MAX_PARTS.value)
        firsts = np.cumsum(num_parts) - num_parts
        order = np.argsort(-(lengths // num_parts), kind="stable")
        rows = np.repeat(order, num_parts[order])
        number = np.arange(len(rows))
        ordered_firsts = np.cumsum(num_parts[order]) - num_parts[order]
        size = self.most_parts(num_rows) if padded else len(rows)
        parts = np.zeros((size, PART_FIELDS), np.int64)
        # The second part of one: no such part.
        parts[:, 3:5] = 1
        listed = parts[: len(rows)]
        listed[:, 0] = rows
        listed[:, 1] = slots[rows]
        listed[:, 2] = positions[rows]
        listed[:, 3] = number - np.repeat(ordered_firsts, num_parts[order])
        listed[:, 4] = num_parts[rows]
        listed[:, 5] = firsts[rows]
        return parts

    def _num_wanted(self, num_rows: int) -> int:
        """Parts that all rows' keys make together, beside what rounding up for each row adds."""
        programs = _PROGRAMS_OF_FEW if num_rows <= _FEW_ROWS else _PROGRAMS_OF_MANY
        return programs * self._processors // self._num_lanes

    def _tiles(self, num_rows: int) -> _Tiles:
        return _tiles(self._dtype, self._block_h, padded_head_dim(self._head_dim), num_rows)

    def run(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        parts: torch.Tensor,
        page_table: torch.Tensor,
        softmax: Softmax,
        *,
        num_rows: int,
    ) -> None:
        """q and out [S, H, D], keys and values [pages, page size, K, D], parts [P, 6] int64.

        The parts are those of `list_parts` of `num_rows` rows, on the device.
        """
        columns, tiles = padded_head_dim(self._head_dim), self._tiles(num_rows)
        window, has_cap = softmax.window, softmax.soft_cap != 0
        strides = q.stride(0), page_table.stride(0)
        variant = (
            *(tiles, has_cap, window % 16 == 0, window == 1, strides[1] == 1),
            *(stride % 16 == 0 for stride in strides),
            *(tensor.data_ptr() % 16 == 0 for tensor in (q, keys, values, out, parts)),
        )
        launcher = self._launchers.get(tiles)
        if launcher is None:
            options = {"launch_pdl": True} if self._overlaps else {}
            launcher = self._launchers[tiles] = Launcher(
                _decode, num_warps=tiles.warps, num_stages=tiles.stages, **options
            )
        launcher(
            (self._num_lanes, len(parts), 1), variant,
            q, keys, values, out, parts, page_table, self._sums, self._maxima, self._totals,
            self._arrivals, *strides, window, softmax.scale, softmax.soft_cap,
            # Constants, in the kernel's order.
            self._num_kv_heads, self._num_heads // self._num_kv_heads, self._heads, self._head_dim,
            self._page_size, tiles.keys, self._block_h, self._block_g, columns,
            max(1, min(_MAX_PARTS.value, _MERGED_NUMBERS // (self._block_g * columns))),
            has_cap, self._weight_parts, self._overlaps,
        )  # fmt: skip
