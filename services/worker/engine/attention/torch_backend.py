"""Attention in plain torch: the CPU's backend and the reference for every other one.

Rows are put in groups that share one gather and one call: rows with one new token by the rounded
number of their visible pages, other rows alone and in blocks of query positions. A
row's padding then depends on its own length only, never on its neighbours, which keeps the
order of its sums, and so its last bits, out of the batch's reach.

Shapes: T tokens, S rows of a group, Q new tokens a row, N pages a row, L = N * page size,
K key/value heads, G query heads to each of them, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.batch import Int32Array
from services.worker.engine.kv.pool import PagePool, gather_pages

# Query positions of one call: bounds scores and masks of a long prefill.
_QUERY_BLOCK = 128
# Keys that rows with one new token gather in one call: bounds the copies.
_GATHERED_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows computed by one call: Q consecutive tokens each, over N pages each."""

    # [S * Q] tokens of the step; a slice where they are consecutive.
    tokens: torch.Tensor | slice
    num_rows: int
    # [S * N], padded with pages of the same row.
    pages: torch.Tensor
    # [S, 1, Q, L] to be added to the scores: 0 where visible, -inf elsewhere.
    mask: torch.Tensor


class TorchAttention:
    """Gathers keys and values by page table and attends densely.

    With `reduce_in_fp32`, scores and probabilities of 16-bit types are float32 numbers throughout.
    """

    def __init__(
        self, pool: PagePool, dtype: torch.dtype | None = None, *, reduce_in_fp32: bool = False
    ) -> None:
        """`dtype` is the queries', in which products are taken; None: the pool's."""
        self._pool = pool
        self._dtype = dtype or pool.tensor.dtype
        self._reduce_in_fp32 = reduce_in_fp32
        self._inputs: AttentionInputs | None = None
        # The step's groups by sliding window, made when the first such layer runs.
        self._groups: dict[int | None, list[_Group]] = {}

    def plan(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._groups.clear()

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self._inputs is not None, "plan() comes before run()"
        keys, values = self._pool.keys(layer.index), self._pool.values(layer.index)
        groups = self._groups.get(layer.sliding_window)
        if groups is None:
            groups = self._plan_groups(self._inputs, layer.sliding_window)
            self._groups[layer.sliding_window] = groups
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in groups:
            out[group.tokens] = _attend(
                q[group.tokens], keys, values, group, layer, in_fp32=self._reduce_in_fp32
            )
        out[self._inputs.num_tokens.sum() :] = 0
        return out

    def _plan_groups(self, inputs: AttentionInputs, window: int | None) -> list[_Group]:
        single = inputs.num_tokens == 1
        first_tokens = np.cumsum(inputs.num_tokens, dtype=np.int64) - inputs.num_tokens
        groups = self._plan_single(inputs, np.flatnonzero(single), first_tokens, window)
        for row in np.flatnonzero(~single):
            groups += self._plan_blocks(inputs, int(row), int(first_tokens[row]), window)
        return groups

    def _plan_single(
        self,
        inputs: AttentionInputs,
        rows: npt.NDArray[np.intp],
        first_tokens: npt.NDArray[np.int64],
        window: int | None,
    ) -> list[_Group]:
        """Rows with one new token, grouped by rounded number of visible pages."""
        if not rows.size:
            return []
        page_size = self._pool.page_size
        last = inputs.start_positions[rows].astype(np.int64)
        first_page = np.zeros_like(last) if window is None else _first_visible(last, window)
        first_page //= page_size
        num_pages = last // page_size + 1 - first_page
        rounded = _round_up(num_pages)
        groups = []
        for width, member in _batches(rounded, _GATHERED_TOKENS // page_size):
            index = first_page[member, None] + np.minimum(
                np.arange(width), num_pages[member, None] - 1
            )
            positions = first_page[member, None] * page_size + np.arange(width * page_size)
            visible = positions <= last[member, None]
            if window is not None:
                visible &= positions > last[member, None] - window
            member_rows = rows[member]
            groups.append(
                self._group(
                    inputs,
                    _tokens(first_tokens[member_rows]),
                    inputs.slots[member_rows],
                    index,
                    visible[:, None, None, :],
                )
            )
        return groups

    def _plan_blocks(
        self, inputs: AttentionInputs, row: int, first_token: int, window: int | None
    ) -> list[_Group]:
        """A row with several new tokens, cut at multiples of the block size."""
        page_size = self._pool.page_size
        start = int(inputs.start_positions[row])
        stop = start + int(inputs.num_tokens[row])
        groups = []
        block_start = start
        while block_start < stop:
            block_stop = min(stop, (block_start // _QUERY_BLOCK + 1) * _QUERY_BLOCK)
            first_page = 0 if window is None else max(0, block_start - window + 1) // page_size
            index = np.arange(first_page, (block_stop - 1) // page_size + 1)
            queries = np.arange(block_start, block_stop)[:, None]
            positions = np.arange(first_page * page_size, (int(index[-1]) + 1) * page_size)
            visible = positions <= queries
            if window is not None:
                visible &= positions > queries - window
            offset = first_token - start
            groups.append(
                self._group(
                    inputs,
                    slice(block_start + offset, block_stop + offset),
                    inputs.slots[row : row + 1],
                    index[None],
                    visible[None, None],
                )
            )
            block_start = block_stop
        return groups

    def _group(
        self,
        inputs: AttentionInputs,
        tokens: torch.Tensor | slice,
        slots: Int32Array,
        page_index: npt.NDArray[np.int64],
        visible: npt.NDArray[np.bool_],
    ) -> _Group:
        device = self._pool.tensor.device
        table_rows = torch.from_numpy(slots.astype(np.int64)).to(device)[:, None]
        pages = inputs.page_table[table_rows, torch.from_numpy(page_index).to(device)]
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=device)
        mask.masked_fill_(torch.from_numpy(~visible).to(device), float("-inf"))
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.to(device)
        return _Group(tokens, len(slots), pages.flatten(), mask)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: _Group,
    layer: AttentionLayer,
    *,
    in_fp32: bool,
) -> torch.Tensor:
    """q [S * Q, H, D] -> the same shape."""
    num_kv_heads, head_dim = keys.shape[2:]
    rows = group.num_rows
    per_head = q.shape[1] // num_kv_heads
    # Query heads that share a key/value head become more queries of that head: [S, K, G * Q, D].
    queries = q.reshape(rows, -1, num_kv_heads, per_head, head_dim).permute(0, 2, 3, 1, 4)
    num_queries = queries.shape[3]
    queries = queries.reshape(rows, num_kv_heads, per_head * num_queries, head_dim)
    shape = (rows, -1, num_kv_heads, head_dim)
    k = gather_pages(keys, group.pages, q.dtype).view(shape).transpose(1, 2)
    v = gather_pages(values, group.pages, q.dtype).view(shape).transpose(1, 2)
    if num_queries == 1:
        mask = group.mask.expand(-1, -1, per_head, -1)
    else:
        mask = group.mask.repeat(1, 1, per_head, 1)
    if layer.soft_cap is None and (not in_fp32 or q.dtype == torch.float32):
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=layer.scale)
    else:
        scores = queries.float() @ k.float().transpose(2, 3) * layer.scale
        if layer.soft_cap is not None:
            scores = torch.tanh(scores / layer.soft_cap) * layer.soft_cap
        out = ((scores + mask).softmax(-1) @ v.float()).to(q.dtype)
    out = out.view(rows, num_kv_heads, per_head, num_queries, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(q.shape)


def _batches(
    widths: npt.NDArray[np.int64], max_pages: int
) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """Indices of equal widths, as many at a time as gather at most `max_pages`."""
    for width in np.unique(widths).tolist():
        member = np.flatnonzero(widths == width)
        size = max(1, max_pages // width)
        for start in range(0, len(member), size):
            yield width, member[start : start + size]


def _tokens(first: npt.NDArray[np.int64]) -> torch.Tensor | slice:
    """The indices, as a slice where they are consecutive: slices are views, indexing copies."""
    if int(first[-1]) - int(first[0]) + 1 == len(first):
        return slice(int(first[0]), int(first[-1]) + 1)
    return torch.from_numpy(first.astype(np.int64))


def _first_visible(last: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
    return np.maximum(last - window + 1, 0)


def _round_up(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """To 1, 2, 3, 4, 6, 8, 12, 16, 24...: at most half as much again, in few distinct widths."""
    exponents = np.floor(np.log2(counts)).astype(np.int64)
    quantum = np.left_shift(np.int64(1), np.maximum(exponents - 1, 0))
    return -(-counts // quantum) * quantum
