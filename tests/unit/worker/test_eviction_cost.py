"""What the next evictions would cost, beside what eviction then does."""

import random

import pytest

from services.worker.cost_model import CostCoefficients, eviction_cost_ns
from services.worker.engine.kv.events import CacheEventCollector
from services.worker.engine.kv.eviction_cost import eviction_work
from services.worker.engine.kv.radix import Node, RadixTree, page_keys
from services.worker.engine.messages import EvictionWork

PAGE_SIZE = 2


class Prompts:
    """A tree that sequences come to and leave; pages are numbered as they are stored."""

    def __init__(self) -> None:
        self.tree = RadixTree(PAGE_SIZE, CacheEventCollector())
        self._num_pages = 0

    def hold(self, token_ids: list[int]) -> Node:
        keys = page_keys("", token_ids, PAGE_SIZE)
        node = self.tree.match(keys, len(keys))
        self.tree.lock(node)
        for key in keys[node.depth :]:
            self._num_pages += 1
            node = self.tree.insert(node, key, self._num_pages)
        return node

    def use(self, token_ids: list[int]) -> None:
        self.tree.unlock(self.hold(token_ids))


def test_the_order_is_that_of_eviction() -> None:
    source = random.Random(4)
    for _ in range(30):
        prompts = Prompts()
        for _ in range(40):
            prompts.use([source.randrange(2) for _ in range(source.randint(2, 16))])
        held = [prompts.hold([source.randrange(2) for _ in range(6)]) for _ in range(2)]
        expected = [node.page for node, _ in prompts.tree.eviction_order()]
        assert len(expected) == prompts.tree.num_evictable
        prompts.tree.check(held)
        assert prompts.tree.evict(len(expected)) == expected


def test_a_page_has_the_share_of_those_that_went_through_it() -> None:
    prompts = Prompts()
    for last in (1, 2, 2, 3):
        prompts.use([9, 9, 8, 8, last, last])
    shares = [(node.depth, share) for node, share in prompts.tree.eviction_order()]
    assert [depth for depth, _ in shares] == [3, 3, 3, 2, 1]
    assert [share for _, share in shares] == pytest.approx([0.25, 0.5, 0.25, 1, 1], rel=0.01)


def test_evicting_a_leaf_leaves_its_uses_with_its_parent() -> None:
    prompts = Prompts()
    for last in (1, 2, 2, 3):
        prompts.use([9, 9, last, last])
    prompts.tree.evict(2)
    assert [share for _, share in prompts.tree.eviction_order()] == pytest.approx(
        [0.25, 1], rel=0.01
    )


def test_old_uses_count_less() -> None:
    prompts = Prompts()
    prompts.use([1, 1])
    for _ in range(3000):
        prompts.use([2, 2])
    shares = [share for _, share in prompts.tree.eviction_order()]
    assert shares[0] < 0.01
    assert shares[1] > 0.99


def test_work_adds_up_tokens_and_pairs_at_powers_of_two() -> None:
    prompts = Prompts()
    prompts.use([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    work = eviction_work(prompts.tree, PAGE_SIZE)
    assert work.tokens == pytest.approx([2, 4, 8])
    # The last page has 4 others before it and half of itself, the next one 3.5 ...
    assert work.pairs == pytest.approx([2 * 9, 2 * (9 + 7), 2 * (9 + 7 + 5 + 3)])
    assert eviction_work(prompts.tree, PAGE_SIZE, max_pages=2).tokens == pytest.approx([2, 4])


def test_locked_pages_cost_nothing_because_they_stay() -> None:
    prompts = Prompts()
    prompts.hold([1, 2, 3, 4])
    assert eviction_work(prompts.tree, PAGE_SIZE) == EvictionWork()


def test_times_are_the_fitted_ones() -> None:
    costs = CostCoefficients(
        prefill_base_ns=99.0,
        prefill_token_ns=10.0,
        prefill_context_ns=2.0,
        decode_base_ns=0.0,
        decode_sequence_ns=0.0,
        decode_context_ns=0.0,
    )
    work = EvictionWork(tokens=[1.0, 3.0], pairs=[5.0, 6.0])
    assert eviction_cost_ns(work, costs) == [20.0, 42.0]
