"""The index against a naive model, and each of its rules alone."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from services.cache_index.holders import GPU, HOST, NUM_TIERS, REMOTE, Holder
from services.cache_index.index import PrefixIndex
from services.common.prefix_hash import ROOT_HASH

CHAIN = [1001, 1002, 1003, 1004, 1005]


def scrub_all(index: PrefixIndex) -> None:
    while index.scrub():
        pass


def matched(index: PrefixIndex, chain: list[int]) -> dict[str, tuple[int, int, int]]:
    match = index.match(chain)
    assert len(match.worker_ids) == len(set(match.worker_ids)) == len(match.epochs)
    tiers = zip(match.gpu_pages, match.host_pages, match.remote_pages, strict=True)
    return dict(zip(match.worker_ids, tiers, strict=True))


def two_holders() -> tuple[PrefixIndex, Holder, Holder]:
    index = PrefixIndex(1000)
    return index, index.add_holder("a", 11), index.add_holder("b", 12)


def test_each_worker_matches_its_own_leading_pages() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    index.store(b, GPU, ROOT_HASH, CHAIN[:2])
    assert matched(index, CHAIN) == {"a": (5, 5, 5), "b": (2, 2, 2)}
    assert matched(index, CHAIN[:1]) == {"a": (1, 1, 1), "b": (1, 1, 1)}
    index.check()


def test_a_match_names_the_epoch_its_pages_belong_to() -> None:
    index, a, _ = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    assert index.match(CHAIN).epochs == [11]


@pytest.mark.parametrize("chain", [[], [7], [7, *CHAIN], [0], [0, *CHAIN]])
def test_an_unknown_chain_matches_nobody(chain: list[int]) -> None:
    index, a, _ = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    assert matched(index, chain) == {}


def test_a_match_ends_where_the_chain_leaves_what_is_known() -> None:
    index, a, _ = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    assert matched(index, [*CHAIN[:3], 7, 8, 9, 10, 11]) == {"a": (3, 3, 3)}


def test_removed_pages_no_longer_match() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    index.store(b, GPU, ROOT_HASH, CHAIN)
    index.remove(a, GPU, [1005, 1004])
    assert matched(index, CHAIN) == {"a": (3, 3, 3), "b": (5, 5, 5)}
    index.remove(b, GPU, CHAIN[::-1])
    assert matched(index, CHAIN) == {"a": (3, 3, 3)}
    assert index.num_prefixes == 3
    index.check()


def test_a_tier_counts_nearer_tiers_too() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN[:3])
    index.store(a, HOST, 1003, [1004])
    index.store(a, REMOTE, 1004, [1005])
    index.store(b, REMOTE, ROOT_HASH, CHAIN[:1])
    assert matched(index, CHAIN) == {"a": (3, 4, 5), "b": (0, 0, 1)}
    index.check()


def test_a_page_moved_to_host_memory_stays_matched_there() -> None:
    index, a, _ = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    index.store(a, HOST, 1004, [1005])
    index.remove(a, GPU, [1005])
    assert matched(index, CHAIN) == {"a": (4, 5, 5)}
    assert a.num_pages == [4, 1, 0]
    index.check()


def test_a_page_without_its_parent_is_not_stored() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN[:2])
    index.store(b, GPU, 1002, CHAIN[2:])
    index.store(a, GPU, 77, [78])
    assert index.num_orphans == 4
    assert matched(index, CHAIN) == {"a": (2, 2, 2)}
    index.check()


def test_a_page_whose_parent_is_in_a_farther_tier_is_not_stored() -> None:
    index, a, _ = two_holders()
    index.store(a, HOST, ROOT_HASH, CHAIN[:1])
    index.store(a, GPU, 1001, CHAIN[1:])
    assert index.num_orphans == 4
    assert matched(index, CHAIN) == {"a": (0, 1, 1)}


def test_storing_and_removing_twice_changes_nothing() -> None:
    index, a, _ = two_holders()
    for _ in range(2):
        index.store(a, GPU, ROOT_HASH, CHAIN)
    assert a.num_pages == [5, 0, 0]
    for _ in range(2):
        index.remove(a, GPU, [1005])
    assert a.num_pages == [4, 0, 0]
    index.check()


def test_a_worker_that_removes_parents_first_breaks_nothing_but_its_own_match() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    index.store(b, GPU, ROOT_HASH, CHAIN[:2])
    index.remove(b, GPU, CHAIN[:2])
    index.remove(a, GPU, CHAIN[:3])
    index.check()
    assert matched(index, CHAIN) == {}
    index.remove(a, GPU, CHAIN[3:])
    index.check()
    assert index.num_prefixes == 0


def test_a_retired_holder_vanishes_at_once_and_its_slot_returns_after_scrubbing() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    index.store(b, GPU, ROOT_HASH, CHAIN[:2])
    index.retire(a)
    assert matched(index, CHAIN) == {"b": (2, 2, 2)}
    before_scrub = index.add_holder("c", 13)
    assert before_scrub.slot not in (a.slot, b.slot)
    scrub_all(index)
    index.check()
    assert index.num_prefixes == 2
    assert index.add_holder("d", 14).slot == a.slot
    assert matched(index, CHAIN) == {"b": (2, 2, 2)}


def test_a_slot_retired_while_a_scrub_runs_waits_for_the_next_one() -> None:
    index, a, b = two_holders()
    index.store(a, GPU, ROOT_HASH, CHAIN)
    index.store(b, GPU, ROOT_HASH, CHAIN)
    index.retire(a)
    assert index.scrub()
    index.retire(b)
    scrub_all(index)
    index.check()
    assert index.num_prefixes == 0


def test_an_invisible_holder_is_left_out_until_it_is_shown() -> None:
    index, a, _ = two_holders()
    loading = index.add_holder("a", 11, visible=False)
    index.store(a, GPU, ROOT_HASH, CHAIN[:1])
    index.store(loading, GPU, ROOT_HASH, CHAIN)
    assert matched(index, CHAIN) == {"a": (1, 1, 1)}
    index.show(loading)
    index.retire(a)
    assert matched(index, CHAIN) == {"a": (5, 5, 5)}


def test_the_bound_drops_the_least_recently_stored_branch_and_keeps_whole_prefixes() -> None:
    index = PrefixIndex(1000)
    a = index.add_holder("a", 1)
    system_prompt = list(range(1, 11))
    index.store(a, GPU, ROOT_HASH, system_prompt)
    branches = [[10_000 + 100 * i + j for j in range(20)] for i in range(100)]
    for branch in branches:
        index.store(a, GPU, 10, branch)
        assert index.num_prefixes <= 1000
    index.check()
    assert index.num_dropped > 900
    lengths = [matched(index, [*system_prompt, *branch])["a"][0] for branch in branches]
    assert lengths[-1] == 30
    assert lengths[0] == 10
    # The older half kept less than the newer half; hashes choose shards, so not strictly by age.
    assert sum(lengths[:50]) < sum(lengths[50:])


def test_the_bound_prefers_pages_stored_again_by_another_worker() -> None:
    index = PrefixIndex(400)
    a, b = index.add_holder("a", 1), index.add_holder("b", 2)
    popular = [[1_000_003 * (20 * i + j + 1) for j in range(20)] for i in range(5)]
    for chain in popular:
        index.store(a, GPU, ROOT_HASH, chain)
        index.store(b, GPU, ROOT_HASH, chain)
    for i in range(15, 25):
        index.store(a, GPU, ROOT_HASH, [1_000_003 * (20 * i + j + 1) for j in range(20)])
        assert index.num_prefixes <= 400
    index.check()
    assert [matched(index, chain).get("b", (0,))[0] for chain in popular] == [20] * 5


def test_the_bound_holds_where_every_page_was_stored_again() -> None:
    index = PrefixIndex(20_000)
    holders = [index.add_holder("a", 1), index.add_holder("b", 2)]
    for i in range(1500):
        chain = [1_000_003 * (20 * i + j + 1) for j in range(20)]
        for holder in holders:
            index.store(holder, GPU, ROOT_HASH, chain)
        assert index.num_prefixes <= 20_000
    index.check()
    assert matched(index, chain) == {"a": (20, 20, 20), "b": (20, 20, 20)}


def test_a_single_chain_longer_than_the_bound_is_survived() -> None:
    index = PrefixIndex(50)
    a = index.add_holder("a", 1)
    index.store(a, GPU, ROOT_HASH, list(range(1, 201)))
    assert index.num_prefixes <= 50
    index.check()


@pytest.mark.parametrize("max_prefixes", [0, -1, 1 << 40])
def test_an_impossible_bound_is_refused(max_prefixes: int) -> None:
    with pytest.raises(ValueError, match="max_prefixes"):
        PrefixIndex(max_prefixes)


class NaiveWorker:
    """A conforming worker: a tree of pages in tiers, changed at random."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.tiers: dict[int, set[int]] = {}
        self.parents: dict[int, int] = {}
        self._rng = rng

    def store_run(self, chain: list[int]) -> tuple[int, int, list[int]]:
        """Stores the next pages of `chain` in one tier: (tier, parent, hashes)."""
        tier = self._rng.choice((GPU, GPU, GPU, HOST, REMOTE))
        start = 0
        while start < len(chain) and min(self.tiers.get(chain[start], {9})) <= tier:
            start += 1
        start -= self._rng.randint(0, min(2, start))
        run = chain[start : start + self._rng.randint(1, 4)]
        for position, page in enumerate(run, start):
            self.tiers.setdefault(page, set()).add(tier)
            self.parents[page] = chain[position - 1] if position else ROOT_HASH
        return tier, chain[start - 1] if start else ROOT_HASH, run

    def remove_some(self) -> tuple[int, list[int]]:
        """Removes pages of one tier, children first: (tier, hashes)."""
        tier = self._rng.randrange(NUM_TIERS)
        gone = []
        for _ in range(self._rng.randint(1, 6)):
            free = [page for page in self.tiers if self._may_leave(page, tier)]
            if not free:
                break
            page = self._rng.choice(free)
            gone.append(page)
            self.tiers[page].remove(tier)
            if not self.tiers[page]:
                del self.tiers[page], self.parents[page]
        return tier, gone

    def leading(self, chain: list[int], tier: int) -> int:
        for depth, page in enumerate(chain):
            if min(self.tiers.get(page, {9})) > tier:
                return depth
        return len(chain)

    def _may_leave(self, page: int, tier: int) -> bool:
        """Whether each child stays no nearer than its parent without this copy of the parent."""
        if tier not in self.tiers[page]:
            return False
        nearest = min(self.tiers[page] - {tier}, default=9)
        children = [child for child, parent in self.parents.items() if parent == page]
        return all(min(self.tiers[child]) >= nearest for child in children)


def random_forest(rng: random.Random) -> list[list[int]]:
    """Chains over a vocabulary of 2, so that they share prefixes; a node's number is its hash."""
    numbers: dict[tuple[int, ...], int] = {}
    chains = []
    for _ in range(40):
        tokens = tuple(rng.choice((0, 0, 0, 1)) for _ in range(rng.randint(1, 40)))
        prefixes = [tokens[: n + 1] for n in range(len(tokens))]
        chains.append([numbers.setdefault(p, rng.getrandbits(64) | 1) for p in prefixes])
    return chains


def expected(workers: list[NaiveWorker], chain: list[int]) -> dict[str, tuple[int, ...]]:
    found = {
        worker.name: tuple(worker.leading(chain, tier) for tier in range(NUM_TIERS))
        for worker in workers
    }
    return {name: pages for name, pages in found.items() if pages[REMOTE]}


def check_match(
    got: Mapping[str, tuple[int, ...]], truth: Mapping[str, tuple[int, ...]], chain_len: int
) -> None:
    """Exact at the four deepest ends; elsewhere never more, and short by 1/16 of the chain."""
    assert got.keys() == truth.keys()
    deepest = sorted({count for counts in truth.values() for count in counts}, reverse=True)[:4]
    slack = max(0, -(-(chain_len - 1) // 16) - 1)
    for name, counts in truth.items():
        for seen, held in zip(got[name], counts, strict=True):
            shortfall = held - seen
            assert 0 <= shortfall <= (0 if held in deepest else slack)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chain_len", [1, 2, 16, 33, 256, 1000])
def test_holders_that_end_anywhere_are_found_near_there(chain_len: int, seed: int) -> None:
    rng = random.Random(seed)
    chain = [rng.getrandbits(64) | 1 for _ in range(chain_len)]
    index, truth = PrefixIndex(10_000), {}
    for number in range(rng.choice((3, 64))):
        held = rng.randint(1, chain_len)
        index.store(index.add_holder(f"w{number}", 1), GPU, ROOT_HASH, chain[:held])
        truth[f"w{number}"] = (held,) * NUM_TIERS
    check_match(matched(index, chain), truth, chain_len)


@pytest.mark.parametrize("seed", range(8))
def test_random_events_of_conforming_workers_match_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    chains = random_forest(rng)
    index = PrefixIndex(100_000)
    workers = [NaiveWorker(f"w{i}", rng) for i in range(12)]
    holders = {worker.name: index.add_holder(worker.name, 1) for worker in workers}
    for step in range(600):
        position = rng.randrange(len(workers))
        worker = workers[position]
        action = rng.random()
        if action < 0.7:
            index.store(holders[worker.name], *worker.store_run(rng.choice(chains)))
        elif action < 0.97:
            index.remove(holders[worker.name], *worker.remove_some())
        else:
            index.retire(holders[worker.name])
            workers[position] = NaiveWorker(worker.name, rng)
            holders[worker.name] = index.add_holder(worker.name, 2)
        if rng.random() < 0.3:
            index.scrub()
        chain = rng.choice(chains)
        check_match(matched(index, chain), expected(workers, chain), len(chain))
        if step % 50 == 0:
            index.check()
    scrub_all(index)
    index.check()
    assert index.num_orphans == 0


@pytest.mark.parametrize("seed", range(4))
def test_pain_12_k_beyond_its_bound_the_index_never_claims_more_than_a_worker_holds(
    seed: int,
) -> None:
    rng = random.Random(seed)
    chains = random_forest(rng)
    index = PrefixIndex(60)
    workers = [NaiveWorker(f"w{i}", rng) for i in range(4)]
    holders = {worker.name: index.add_holder(worker.name, 1) for worker in workers}
    for step in range(500):
        worker = rng.choice(workers)
        if rng.random() < 0.75:
            index.store(holders[worker.name], *worker.store_run(rng.choice(chains)))
        else:
            index.remove(holders[worker.name], *worker.remove_some())
        chain = rng.choice(chains)
        truth = expected(workers, chain)
        for name, pages in matched(index, chain).items():
            assert all(got <= held for got, held in zip(pages, truth[name], strict=True))
        assert index.num_prefixes <= 60
        if step % 50 == 0:
            index.check()
    assert index.num_dropped > 0
