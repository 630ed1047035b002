"""Random lives of sequences over one tree, with a vocabulary of 2 so that prefixes collide."""

import random

import pytest

from services.worker.engine.kv.events import CacheEventCollector
from services.worker.engine.kv.pages import PageAllocator
from services.worker.engine.kv.radix import Node, RadixTree, page_keys
from tests.fakes.engine_driver import HeldHashes

PAGE_SIZE = 2
NUM_PAGES = 24
NAMESPACES = ("one", "two")


class World:
    """A tree and an allocator under random operations, beside a model of what they hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.events = CacheEventCollector()
        self.tree = RadixTree(PAGE_SIZE, self.events)
        self.allocator = PageAllocator(NUM_PAGES)
        self.listener = HeldHashes()
        self.locked: list[Node] = []
        # Every path in the tree, as its keys, and the page at its end.
        self.model: dict[tuple[bytes, ...], int] = {}

    def keys(self) -> list[bytes]:
        num_tokens = self.random.randint(0, 14)
        token_ids = [self.random.randrange(2) for _ in range(num_tokens)]
        return page_keys(self.random.choice(NAMESPACES), token_ids, PAGE_SIZE)

    def match(self) -> None:
        keys = self.keys()
        max_pages = self.random.randint(0, len(keys))
        found = self.tree.match(keys, max_pages)
        expected = 0
        while expected < max_pages and tuple(keys[: expected + 1]) in self.model:
            expected += 1
        assert found.depth == expected
        pages = [node.page for node in found.path()][::-1]
        assert pages == [self.model[tuple(keys[: n + 1])] for n in range(expected)]

    def insert(self) -> None:
        keys = self.keys()
        node = self.tree.match(keys, len(keys))
        self.tree.lock(node)
        missing = len(keys) - node.depth
        self.reclaim(missing)
        for depth in range(node.depth, len(keys)):
            if self.allocator.num_free == 0:
                break
            (page,) = self.allocator.allocate(1)
            node = self.tree.insert(node, keys[depth], page)
            self.model[tuple(keys[: depth + 1])] = page
        self.locked.append(node)

    def insert_again(self) -> None:
        """Offer another page for a path that is there: the tree keeps its own."""
        if not self.model or self.allocator.num_free == 0:
            return
        path = self.random.choice(list(self.model))
        node = self.tree.root
        self.tree.lock(node)
        (page,) = self.allocator.allocate(1)
        for depth, key in enumerate(path):
            node = self.tree.insert(node, key, page)
            assert node.page == self.model[path[: depth + 1]]
        self.allocator.free([page])
        self.locked.append(node)

    def unlock(self) -> None:
        if self.locked:
            self.tree.unlock(self.locked.pop(self.random.randrange(len(self.locked))))

    def evict(self) -> None:
        self.reclaim(self.random.randint(0, 6) + self.allocator.num_free)

    def clear(self) -> None:
        if self.random.random() < 0.1:
            self.forget(self.tree.clear())

    def reclaim(self, num_free: int) -> None:
        lacking = num_free - self.allocator.num_free
        evictable = self.tree.num_evictable
        pages = self.tree.evict(max(0, lacking))
        assert len(pages) == min(max(0, lacking), evictable)
        self.forget(pages)

    def forget(self, pages: list[int]) -> None:
        locked = {node.page for tail in self.locked for node in tail.path()}
        assert not locked & set(pages), "a locked page was evicted"
        self.model = {path: page for path, page in self.model.items() if page not in set(pages)}
        self.allocator.free(pages)

    def check(self) -> None:
        self.tree.check(self.locked)
        self.allocator.check(self.tree.pages())
        assert sorted(self.tree.pages()) == sorted(self.model.values())
        locked = {node for tail in self.locked for node in tail.path()}
        assert self.tree.num_evictable == len(self.model) - len(locked)
        self.listener.apply(self.events.take())
        assert set(self.listener.parents) == self.events.held_hashes


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_keep_every_invariant(seed):
    world = World(seed)
    operations = [
        world.match,
        world.insert,
        world.insert,
        world.insert_again,
        world.unlock,
        world.unlock,
        world.evict,
        world.clear,
    ]
    for _ in range(250):
        world.random.choice(operations)()
        world.check()
    while world.locked:
        world.unlock()
    world.check()
    world.reclaim(NUM_PAGES)
    assert world.allocator.num_free == NUM_PAGES
    assert world.tree.num_pages == 0
