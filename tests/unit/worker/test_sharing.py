"""Groups of rows that read a common prefix once: found, worth it, and found anew in time."""

import itertools

import numpy as np
import pytest

from services.worker.engine.attention.sharing import PrefixFinder, PrefixGroups

PAGE_SIZE = 16
# So many bytes that the smallest gain is enough.
TOKEN_BYTES = 256 * 1024**2


class Batch:
    """Rows of a few tokens over a table of unique pages, in which neighbours are made to share."""

    def __init__(self, num_rows: int, max_pages: int = 64) -> None:
        self.table = np.arange(num_rows * max_pages, dtype=np.int32).reshape(num_rows, -1)
        self.slots = np.arange(num_rows, dtype=np.int32)
        self.positions = np.full(num_rows, 3, np.int32)

    def share(self, first: int, stop: int, num_pages: int, own: int = 4) -> None:
        """These rows share full pages and see `own` tokens more."""
        self.table[first:stop, :num_pages] = self.table[first, :num_pages]
        self.positions[first:stop] = num_pages * PAGE_SIZE + own - 1

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
    batch = Batch(16)
    batch.share(1, 6, 8)
    batch.share(6, 10, 20)
    batch.share(11, 16, 63)
    groups = batch.find(make_finder())
    assert listed(groups) == [(1, 5, 8), (6, 4, 20), (11, 5, 63)]
    assert groups.pages_by_row(16).tolist() == [0, *[8] * 5, *[20] * 4, 0, *[63] * 5]


def test_slots_may_be_any_rows_of_the_table() -> None:
    batch = Batch(12)
    batch.share(1, 6, 12)
    batch.slots = np.array([3, 1, 5, 2, 9, 0], np.int32)
    batch.positions = batch.positions[batch.slots]
    assert listed(batch.find(make_finder())) == [(0, 4, 12)]


def test_only_full_pages_before_a_rows_own_token_are_shared() -> None:
    batch = Batch(5)
    batch.share(0, 5, 30)
    # The token at position 320 is on the page after 20 full ones; at 319 on the 20th.
    batch.positions[:] = 320
    assert listed(batch.find(make_finder())) == [(0, 5, 20)]
    batch.positions[1] = 319
    assert listed(batch.find(make_finder())) == [(0, 5, 19)]


def test_groups_that_gain_nothing_are_left_alone() -> None:
    batch = Batch(12)
    # Three rows read the cache as fast as one pass reads memory.
    batch.share(0, 3, 60)
    assert batch.find(make_finder()) is None
    # Rows that see far more of their own than is shared.
    batch.share(4, 8, 20, own=400)
    assert batch.find(make_finder()) is None
    batch.share(8, 12, 20)
    assert listed(batch.find(make_finder())) == [(8, 4, 20)]
    # Shorter than 64 tokens counts for nothing, however many rows share it.
    many = Batch(64)
    many.share(0, 64, 3)
    assert many.find(make_finder()) is None


def test_all_groups_together_make_up_for_the_launches() -> None:
    batch = Batch(10)
    batch.share(0, 5, 20)
    # 3 * 4 * 320 - 2 * 5 * 324 tokens.
    gain = 600
    enough = -(-256 * 1024**2 // gain)
    assert batch.find(make_finder(token_bytes=enough)) is not None
    assert batch.find(make_finder(token_bytes=enough - 1)) is None
    batch.share(5, 10, 20)
    assert listed(batch.find(make_finder(token_bytes=enough // 2 + 1))) == [(0, 5, 20), (5, 5, 20)]
    assert batch.find(make_finder(token_bytes=enough // 2 - 1)) is None


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fewer_than_two_rows_share_nothing(num_rows: int) -> None:
    batch = Batch(2)
    batch.slots, batch.positions = batch.slots[:num_rows], batch.positions[:num_rows]
    assert batch.find(make_finder()) is None


def test_the_answer_stays_the_same_object_while_rows_grow_a_little() -> None:
    batch = Batch(8)
    batch.share(0, 8, 60)
    finder = make_finder()
    groups = batch.find(finder)
    for _ in range(40):
        batch.positions += 1
        assert batch.find(finder) is groups


def test_rows_that_grow_long_of_their_own_end_the_sharing() -> None:
    batch = Batch(8)
    batch.share(0, 8, 20)
    finder = make_finder()
    for _ in range(600):
        batch.positions += 1
        groups = batch.find(finder)
        # 3 * 7 * 320 - 2 * 8 * length, reviewed after 64 tokens at the latest.
        length = int(batch.positions[0]) + 1
        if length <= 420:
            assert listed(groups) == [(0, 8, 20)]
        if length >= 420 + 64:
            assert groups is None


def test_a_changed_row_is_seen() -> None:
    finder = make_finder()
    batch = Batch(10)
    batch.share(0, 8, 20)
    assert listed(batch.find(finder)) == [(0, 8, 20)]
    # A row leaves.
    left = Batch(10)
    left.table, left.slots = batch.table, batch.slots[[0, 1, 3, 4, 5, 6, 7, 8, 9]]
    left.positions = batch.positions[left.slots]
    assert listed(left.find(finder)) == [(0, 7, 20)]
    assert listed(batch.find(finder)) == [(0, 8, 20)]
    # Another sequence in the same slot.
    batch.table[5] += 10_000
    assert listed(batch.find(finder)) == [(0, 5, 20)]
    # A newcomer whose tokens end within what was shared.
    batch.positions[1] = 18 * PAGE_SIZE
    assert listed(batch.find(finder)) == [(0, 5, 18)]
    # A row that shared nothing is now one of them.
    batch.share(0, 10, 15)
    assert listed(batch.find(finder)) == [(0, 10, 15)]


def best_gain(common: list[int], lengths: list[int], page_size: int) -> int:
    """What a run gains as a whole, or its parts where those share more and gain more."""
    if not common:
        return 0
    least = min(common)
    cuts = [-1, *(index for index, length in enumerate(common) if length == least), len(common)]
    parts = sum(
        best_gain(common[first + 1 : stop], lengths[first + 1 : stop + 1], page_size)
        for first, stop in itertools.pairwise(cuts)
    )
    return max(0, 3 * len(common) * least * page_size - 2 * sum(lengths), parts)


def gain_of(groups: PrefixGroups | None, lengths: list[int], page_size: int) -> int:
    return sum(
        3 * (count - 1) * num_pages * page_size - 2 * sum(lengths[first : first + count])
        for first, count, num_pages in listed(groups) or []
    )


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_random_trees_are_grouped_as_well_as_can_be(page_size: int) -> None:
    random = np.random.default_rng(page_size)
    least = -(-64 // page_size)
    num_found = 0
    for _ in range(300):
        num_rows = int(random.integers(2, 40))
        # Lengths in common with the next row, as nested as a tree's.
        common = random.choice([0, 3, 4, 4, 5, 5, 5], num_rows - 1) * least
        table = np.arange(num_rows * 8 * least, dtype=np.int32).reshape(num_rows, -1)
        for row, length in enumerate(common.tolist()):
            table[row + 1, :length] = table[row, :length]
        most = np.maximum(np.append(common, 0), np.insert(common, 0, 0))
        lengths = most * page_size + random.integers(1, 64, num_rows)
        finder = make_finder(page_size)
        slots = np.arange(num_rows, dtype=np.int32)
        groups = finder.find(slots, (lengths - 1).astype(np.int32), table)
        expected = best_gain(common.tolist(), lengths.tolist(), page_size)
        assert gain_of(groups, lengths.tolist(), page_size) == expected
        if groups is None:
            continue
        num_found += 1
        stop = 0
        for first, count, num_pages in listed(groups):
            assert first >= stop
            stop = first + count
            shared = table[first:stop, :num_pages]
            assert (shared == shared[0]).all()
        assert stop <= num_rows
    assert num_found > 100


def test_common_lengths_are_exact_for_every_length() -> None:
    for length, limit in itertools.product(range(4, 40), (17, 63)):
        batch = Batch(16)
        batch.share(0, 16, length)
        batch.positions[:] = min(limit, length) * PAGE_SIZE
        assert listed(batch.find(make_finder())) == [(0, 16, min(length, limit))]
