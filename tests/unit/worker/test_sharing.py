"""Groups of rows that read a common prefix once: found, worth it, and found anew in time."""

import itertools

import numpy as np
import pytest

from services.worker.engine.attention.sharing import PrefixFinder, PrefixGroups

PAGE_SIZE = 16
# So many bytes that 10 saved pages of PAGE_SIZE tokens are enough.
TOKEN_BYTES = 64 * 1024**2 // (10 * PAGE_SIZE)


class Batch:
    """Rows over a table of unique pages, in which neighbours are made to share."""

    def __init__(self, num_rows: int, max_pages: int = 64) -> None:
        self.table = np.arange(num_rows * max_pages, dtype=np.int32).reshape(num_rows, -1)
        self.slots = np.arange(num_rows, dtype=np.int32)
        self.positions = np.full(num_rows, max_pages * PAGE_SIZE - 1, np.int32)

    def share(self, first: int, stop: int, num_pages: int) -> None:
        self.table[first:stop, :num_pages] = self.table[first, :num_pages]

    def find(self, finder: PrefixFinder) -> PrefixGroups | None:
        return finder.find(self.slots, self.positions, self.table)


def make_finder(page_size: int = PAGE_SIZE, token_bytes: int = TOKEN_BYTES) -> PrefixFinder:
    return PrefixFinder(page_size=page_size, token_bytes=token_bytes)


def listed(groups: PrefixGroups | None) -> list[tuple[int, int, int]] | None:
    if groups is None:
        return None
    columns = (groups.first_rows, groups.num_rows, groups.num_pages)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_groups_are_runs_of_rows_with_equal_pages() -> None:
    batch = Batch(12)
    batch.share(1, 4, 8)
    batch.share(4, 6, 20)
    batch.share(9, 12, 63)
    groups = batch.find(make_finder())
    assert listed(groups) == [(1, 3, 8), (4, 2, 20), (9, 3, 63)]
    assert groups.saved_pages == 2 * 8 + 20 + 2 * 63
    assert groups.pages_by_row(12).tolist() == [0, 8, 8, 8, 20, 20, 0, 0, 0, 63, 63, 63]


def test_slots_may_be_any_rows_of_the_table() -> None:
    batch = Batch(12)
    batch.share(1, 4, 12)
    batch.slots = np.array([3, 1, 2, 9, 0], np.int32)
    batch.positions = batch.positions[:5]
    assert listed(batch.find(make_finder())) == [(0, 3, 12)]


def test_only_full_pages_before_a_rows_own_token_are_shared() -> None:
    batch = Batch(3)
    batch.share(0, 3, 30)
    # The token at position 320 is on the page after 20 full ones; at 319 on the 20th.
    batch.positions[:] = 320
    assert listed(batch.find(make_finder())) == [(0, 3, 20)]
    batch.positions[1] = 319
    assert listed(batch.find(make_finder())) == [(0, 3, 19)]


def test_little_that_is_shared_is_left_alone() -> None:
    batch = Batch(4)
    batch.share(0, 2, 9)
    assert batch.find(make_finder()) is None
    batch.share(2, 4, 4)
    assert listed(batch.find(make_finder())) == [(0, 2, 9), (2, 2, 4)]
    # Shorter than 64 tokens counts for nothing, however many rows share it.
    many = Batch(64)
    many.share(0, 64, 3)
    assert many.find(make_finder()) is None


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fewer_than_two_rows_share_nothing(num_rows: int) -> None:
    batch = Batch(2)
    batch.slots, batch.positions = batch.slots[:num_rows], batch.positions[:num_rows]
    assert batch.find(make_finder()) is None


def test_the_answer_stays_the_same_object_while_rows_grow() -> None:
    batch = Batch(4)
    batch.share(0, 3, 20)
    batch.positions[:] = 20 * PAGE_SIZE + 3
    finder = make_finder()
    groups = batch.find(finder)
    for _ in range(40):
        batch.positions += 1
        assert batch.find(finder) is groups


def test_a_changed_row_is_seen() -> None:
    finder = make_finder()
    batch = Batch(6)
    batch.share(0, 4, 20)
    assert listed(batch.find(finder)) == [(0, 4, 20)]
    # A row leaves.
    left = Batch(6)
    left.table, left.slots, left.positions = (
        batch.table, batch.slots[[0, 1, 3, 4, 5]], batch.positions[:5],
    )  # fmt: skip
    assert listed(left.find(finder)) == [(0, 3, 20)]
    assert listed(batch.find(finder)) == [(0, 4, 20)]
    # Another sequence in the same slot.
    batch.table[2] += 10_000
    assert listed(batch.find(finder)) == [(0, 2, 20)]
    # A newcomer whose tokens end within what was shared.
    batch.positions[1] = 15 * PAGE_SIZE
    assert listed(batch.find(finder)) == [(0, 2, 15)]
    # A row that shared nothing is now one of them.
    batch.share(0, 6, 15)
    assert listed(batch.find(finder)) == [(0, 6, 15)]


def best_saving(common: list[int]) -> int:
    """Page reads spared by a run as a whole or by its parts where they share more."""
    if not common:
        return 0
    least = min(common)
    parts: list[list[int]] = [[]]
    for length in common:
        if length == least:
            parts.append([])
        else:
            parts[-1].append(length)
    return max(len(common) * least, sum(best_saving(part) for part in parts))


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_random_trees_are_grouped_as_well_as_can_be(page_size: int) -> None:
    random = np.random.default_rng(page_size)
    least = -(-64 // page_size)
    for _ in range(150):
        num_rows = int(random.integers(2, 24))
        # Lengths in common with the next row, as nested as a tree's.
        common = random.choice([0, least, 2 * least, 3 * least, 5 * least], num_rows - 1)
        table = np.arange(num_rows * 8 * least, dtype=np.int32).reshape(num_rows, -1)
        for row, length in enumerate(common.tolist()):
            table[row + 1, :length] = table[row, :length]
        positions = np.full(num_rows, 8 * least * page_size - 1, np.int32)
        finder = make_finder(page_size, token_bytes=64 * 1024**2)
        groups = finder.find(np.arange(num_rows, dtype=np.int32), positions, table)
        assert (0 if groups is None else groups.saved_pages) == best_saving(common.tolist())
        if groups is None:
            continue
        stop = 0
        for first, count, num_pages in listed(groups):
            assert first >= stop
            assert count >= 2
            stop = first + count
            shared = table[first:stop, :num_pages]
            assert (shared == shared[0]).all()
        assert stop <= num_rows


def test_common_lengths_are_exact_for_every_length() -> None:
    for length, limit in itertools.product(range(4, 40), (17, 63)):
        batch = Batch(2)
        batch.share(0, 2, length)
        batch.positions[1] = limit * PAGE_SIZE
        finder = make_finder(token_bytes=64 * 1024**2)
        assert listed(batch.find(finder)) == [(0, 2, min(length, limit))]
