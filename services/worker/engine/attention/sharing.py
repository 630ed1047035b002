"""Which neighbouring decode rows have so long a common prefix that it should be read once.

Attention over a common prefix can be computed for all its rows together and be merged with what
each row sees of its own (cascade attention; the idea is in Juravsky et al., "Hydragen", arXiv
2402.05099, section 3.2). That reads the prefix once instead of once a row, and costs a second
pass and a merge.

Rows are compared by page ids alone. A page is shared only as the same page of a prefix: rows with
the same page at an index have the same pages at all lower ones, which is what a prefix tree gives.

What it gains. Neighbours that read the same pages find them in the second-level cache, which is
about three times as fast as memory; so a layer takes either the time of reading what each row sees
from there, or the time of reading everything once from memory and a second pass and a merge. Per
group, with n rows that share P tokens and see L in sum, that is a gain of
L - 3 (L - (n - 1) P) = 3 (n - 1) P - 2 L token reads from the cache, and all groups together must
make up for the launches. Groups of fewer than four rows never gain.

Shapes: S rows, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.batch import Int32Array

# Reads from the cache, in a layer, during the 35 us that the launches take beyond their reading.
# Measured, as the factor of three, on an H100: bench/results/shared_prefix_gpu.md.
MIN_GAINED_BYTES = 256 * 1024**2
_CACHE_SPEEDUP = 3
# A shorter prefix fills no tile of a kernel.
_MIN_PREFIX_TOKENS = 64
# Tokens by which rows grow until the gain is calculated anew.
_REVIEW_TOKENS = 64

_Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """Rows first_rows[g] to first_rows[g] + num_rows[g] - 1 share their first num_pages[g] pages.

    Groups do not overlap and are in the order of their rows. Every row has at least one page
    beyond the shared ones, and those are full of tokens before the row's own.
    """

    # [G]
    first_rows: _Rows
    num_rows: _Rows
    num_pages: _Rows

    def pages_by_row(self, num_rows: int) -> _Rows:
        """[S] shared pages of each row; 0 for those in no group."""
        pages = np.zeros(num_rows, np.intp)
        pages[self._rows()] = np.repeat(self.num_pages, self.num_rows)
        return pages

    def _rows(self) -> _Rows:
        starts = np.cumsum(self.num_rows) - self.num_rows
        rows: _Rows = np.repeat(self.first_rows - starts, self.num_rows)
        rows += np.arange(len(rows))
        return rows


@dataclass(frozen=True, slots=True)
class _Found:
    """The last answer, and what it was given for."""

    groups: PrefixGroups | None
    # [S] all three; a row in no group is watched at its first page.
    slots: Int32Array
    watched_indices: _Rows
    watched_pages: Int32Array
    # [S] tokens in a row's shared pages.
    prefix_lens: _Rows
    # Sum of positions from which on the answer is to be reviewed.
    review_at: int


class PrefixFinder:
    """Owns the last answer, which stands while the same rows share the same pages."""

    def __init__(self, *, page_size: int, token_bytes: int) -> None:
        """`token_bytes`: one layer's keys and values of a token."""
        self._page_size = page_size
        self._token_bytes = token_bytes
        self._min_pages = -(-_MIN_PREFIX_TOKENS // page_size)
        self._found: _Found | None = None

    def find(
        self, slots: Int32Array, start_positions: Int32Array, page_table: Int32Array
    ) -> PrefixGroups | None:
        """Groups of decode rows, [S] slots and positions of their tokens; None if not worth it.

        `page_table` [slots, pages] is the host's. While the answer stays, so does its identity.
        """
        if len(slots) < 2:
            return None
        found = self._found
        if found is None or not self._stands(found, slots, start_positions, page_table):
            found = self._found = self._search(slots, start_positions, page_table)
        return found.groups

    def _stands(
        self,
        found: _Found,
        slots: Int32Array,
        start_positions: Int32Array,
        page_table: Int32Array,
    ) -> bool:
        return (
            np.array_equal(slots, found.slots)
            and bool((start_positions >= found.prefix_lens).all())
            and int(start_positions.sum(dtype=np.int64)) < found.review_at
            and np.array_equal(page_table[slots, found.watched_indices], found.watched_pages)
        )

    def _search(
        self, slots: Int32Array, start_positions: Int32Array, page_table: Int32Array
    ) -> _Found:
        common = _common_pages(slots, start_positions // self._page_size, page_table)
        common[common < self._min_pages] = 0
        lengths = start_positions.astype(np.int64) + 1
        best, gain = _best_groups(common, lengths, self._page_size)
        num_pages = np.zeros(len(slots), np.intp)
        groups = None
        if gain * self._token_bytes >= MIN_GAINED_BYTES:
            groups, num_pages = best, best.pages_by_row(len(slots))
        watched = np.maximum(num_pages - 1, 0)
        return _Found(
            groups,
            slots.copy(),
            watched,
            page_table[slots, watched],
            num_pages * self._page_size,
            int(lengths.sum()) + _REVIEW_TOKENS * len(slots),
        )


def _common_pages(slots: Int32Array, num_full: Int32Array, page_table: Int32Array) -> _Rows:
    """[S - 1] leading pages that each row has in common with the next, of its full ones."""
    # Indexing one dimension is several times faster than indexing two.
    flat = page_table.reshape(-1)
    starts = slots.astype(np.intp) * page_table.shape[1]
    limits = np.minimum(num_full[:-1], num_full[1:]).astype(np.intp)
    common = np.zeros(len(limits), np.intp)
    pages = flat[starts]
    pairs = np.flatnonzero((limits > 0) & (pages[:-1] == pages[1:]))
    left, right = starts[pairs] - 1, starts[pairs + 1] - 1
    # Bisection: the first `low` pages are the same, those beyond the first `high` are not.
    low, high = np.ones(len(pairs), np.intp), limits[pairs]
    while (low < high).any():
        middle = (low + high + 1) // 2
        same = flat[left + middle] == flat[right + middle]
        low = np.where(same, middle, low)
        high = np.where(same, high, middle - 1)
    common[pairs] = low
    return common


@dataclass(slots=True)
class _Open:
    """Neighbours from `first_row` on that all have `num_pages` pages in common so far."""

    num_pages: int
    first_row: int
    # Groups among them that share more pages, and what those gain.
    groups: list[tuple[int, int, int]]
    gain: int


def _best_groups(
    common: _Rows, lengths: npt.NDArray[np.int64], page_size: int
) -> tuple[PrefixGroups, int]:
    """Disjoint groups that gain most, and their gain in token reads from the cache.

    From the [S - 1] pages in common and the [S] tokens that each row sees. Any neighbours share
    the least of what lies between them, so candidates are nested like the prefix tree itself; a
    candidate is taken whole unless its parts gain more, and then the rows between the parts share
    nothing.
    """
    # Within a run of equal numbers nothing opens or closes.
    changes = np.flatnonzero(np.diff(common, prepend=0, append=0))
    heights = np.append(common, 0)[changes].tolist()
    seen = np.cumsum(lengths) - lengths
    opened = [_Open(0, 0, [], 0)]
    for row, height in zip(changes.tolist(), heights, strict=True):
        first, groups, gain = row, list[tuple[int, int, int]](), 0
        while opened[-1].num_pages > height:
            closed = opened.pop()
            first = closed.first_row
            groups, gain = closed.groups + groups, closed.gain + gain
            spared = (row - first) * closed.num_pages * page_size
            visible = int(seen[row] - seen[first] + lengths[row])
            whole = _CACHE_SPEEDUP * spared - (_CACHE_SPEEDUP - 1) * visible
            if whole > 0 and whole >= gain:
                groups, gain = [(first, row + 1 - first, closed.num_pages)], whole
        if opened[-1].num_pages < height:
            opened.append(_Open(height, first, groups, gain))
        else:
            opened[-1].groups += groups
            opened[-1].gain += gain
    table = np.array(opened[0].groups, np.intp).reshape(-1, 3)
    return PrefixGroups(table[:, 0], table[:, 1], table[:, 2]), opened[0].gain
