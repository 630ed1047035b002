import pytest

from services.worker.engine.kv.pages import PageAllocator


def test_every_page_is_handed_out_once():
    allocator = PageAllocator(5)
    pages = allocator.allocate(2) + allocator.allocate(3)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    assert allocator.num_held == 5


def test_a_freed_page_is_handed_out_again_first():
    allocator = PageAllocator(5)
    pages = allocator.allocate(3)
    allocator.free([pages[1]])
    assert allocator.allocate(1) == [pages[1]]


def test_allocating_nothing_takes_nothing():
    allocator = PageAllocator(2)
    assert allocator.allocate(0) == []
    assert allocator.num_free == 2


def test_allocating_more_than_is_free_fails():
    allocator = PageAllocator(2)
    with pytest.raises(AssertionError, match="3 pages of 2 free"):
        allocator.allocate(3)


def test_freeing_more_than_was_held_fails():
    allocator = PageAllocator(2)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free([0])


def test_check_accepts_exactly_the_held_pages():
    allocator = PageAllocator(4)
    held = allocator.allocate(3)
    allocator.check(held)
    with pytest.raises(AssertionError, match="pages leaked: 1"):
        allocator.check(held[1:])
    with pytest.raises(AssertionError, match="held twice: 1"):
        allocator.check([*held, held[0]])


def test_a_pool_has_at_least_one_page():
    with pytest.raises(ValueError, match="num_pages must be >= 1, got 0"):
        PageAllocator(0)
