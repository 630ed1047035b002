"""Which workers hold which prefixes: one map from prefix hash to a bit mask. No I/O.

A prefix hash names a whole prefix, so a match needs no tree walk: along a chain of hashes the set
of workers that hold the page only shrinks, and the points where it does are found by bisection.
The map is cut into shards because a dict of a million entries stalls its caller for 60 ms when it
grows; a shard's growth takes less than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from services.cache_index.holders import (
    FIRST_SLOT_BIT,
    GPU,
    NUM_TIERS,
    THIS_AND_NEARER,
    Holder,
    HolderTable,
)
from services.common.prefix_hash import ROOT_HASH

# A page's value: how many pages of the map are its children (bits 0-28), whether it was stored
# again since the sweep last passed (bit 29), then three bits a slot, one a tier.
_NUM_CHILDREN = (1 << 29) - 1
_STORED_AGAIN = 1 << 29
_HELD = 1 << FIRST_SLOT_BIT
MAX_PREFIXES = _NUM_CHILDREN

_NUM_SHARDS = 256
_SHARD = _NUM_SHARDS - 1
# Pages of one shard looked at before the sweep goes to the next.
_SWEEP_PAGES = 64
# Pages looked at in one call before it spares no page for having been stored again.
_PATIENCE_PAGES = 8192
# A match finds the deepest ends of holdings exactly, at least this many.
_EXACT_DROPS = 4
# Other ends it finds up to this part of the chain: what it says of them may be short by so much.
_MAX_SPANS = 16
# Two pages of a chain, the holders' bits at the first, and those of them left at the second.
_Span = tuple[int, int, int, int]


class PrefixMatch(NamedTuple):
    """Leading pages of one chain, columnar: entry i belongs to worker_ids[i].

    A tier's count includes nearer tiers, so gpu_pages[i] <= host_pages[i] <= remote_pages[i].
    """

    worker_ids: Sequence[str]
    epochs: Sequence[int]
    gpu_pages: Sequence[int]
    host_pages: Sequence[int]
    remote_pages: Sequence[int]


class PrefixIndex:
    """Maps each prefix hash to the holders of that page, by tier.

    Invariant: a holder that has a page in some tier has its parent there or in a nearer tier, so
    each holding is a set of prefixes and masks never gain a bit along a chain. Events keep it:
    a page is announced with its parent held, and removed before its parent is. What would break
    it (a page whose parent the index does not know at that holder) is not stored but counted in
    `num_orphans`. At most `max_prefixes` pages are kept: beyond it the least recently stored
    branch is dropped, from its leaf up to where it forks, so what stays is still whole prefixes.
    """

    def __init__(self, max_prefixes: int) -> None:
        if not 1 <= max_prefixes <= MAX_PREFIXES:
            raise ValueError(f"max_prefixes must be in [1, {MAX_PREFIXES}], got {max_prefixes}")
        self.max_prefixes = max_prefixes
        self.num_prefixes = 0
        self.num_orphans = 0
        self.num_dropped = 0
        self._values: list[dict[int, int]] = [{} for _ in range(_NUM_SHARDS)]
        # Page -> parent page, oldest first: each shard's order is the sweep's.
        self._parents: list[dict[int, int]] = [{} for _ in range(_NUM_SHARDS)]
        self._sweep_shard = 0
        self._holders = HolderTable()
        self._has_lower_tiers = False
        self._retired: list[Holder] = []
        self._scrubbing: list[Holder] = []
        self._scrub_shard = 0

    def add_holder(self, worker_id: str, epoch: int, *, visible: bool = True) -> Holder:
        """A new, empty holder; `match` leaves it out until it is visible."""
        holder = self._holders.add(worker_id, epoch)
        if visible:
            self._holders.show(holder)
        return holder

    def show(self, holder: Holder) -> None:
        """Let `match` answer with this holder from now on. Idempotent."""
        self._holders.show(holder)

    def retire(self, holder: Holder) -> None:
        """Forget a holder: `match` leaves it out at once, `scrub` frees its slot."""
        self._holders.hide(holder)
        self._retired.append(holder)

    def store(self, holder: Holder, tier: int, parent: int, hashes: Sequence[int]) -> None:
        """Note a run of pages, each the child of the one before, the first one `parent`'s."""
        shards, parents = self._values, self._parents
        bit = holder.gpu_bit << tier
        shard = shards[parent & _SHARD]
        value = 0
        if parent != ROOT_HASH:
            value = shard.get(parent, 0)
            if not value & holder.gpu_bit * THIS_AND_NEARER[tier]:
                self.num_orphans += len(hashes)
                return
        # Shared, so that a run of pages only one worker has costs two integers, not one a page.
        bit_with_child, stored_again = bit + 1, bit | _STORED_AGAIN
        num_fresh = num_new = 0
        for page in hashes:
            index = page & _SHARD
            child_shard = shards[index]
            child_value = child_shard.get(page)
            if child_value is None:
                if parent:
                    shard[parent] = bit_with_child if value is bit else value + 1
                child_shard[page] = child_value = bit
                parents[index][page] = parent
                num_new += 1
            elif not child_value & bit:
                child_value |= stored_again
                child_shard[page] = child_value
                num_fresh += 1
            parent, value, shard = page, child_value, child_shard
        holder.num_pages[tier] += num_new + num_fresh
        self.num_prefixes += num_new
        self._has_lower_tiers = self._has_lower_tiers or tier != GPU
        if self.num_prefixes > self.max_prefixes:
            self._drop_oldest()

    def remove(self, holder: Holder, tier: int, hashes: Sequence[int]) -> None:
        """Note that pages are gone from a tier, children first. Unknown ones are ignored."""
        shards = self._values
        bit = holder.gpu_bit << tier
        num_gone = 0
        for page in hashes:
            shard = shards[page & _SHARD]
            value = shard.get(page, 0)
            if value & bit:
                num_gone += 1
                self._keep_or_erase(page, value ^ bit)
        holder.num_pages[tier] -= num_gone

    def match(self, chain: Sequence[int]) -> PrefixMatch:
        """Leading pages of `chain` at every visible holder that has its first page.

        Never too many. Exact where holdings end at no more than _EXACT_DROPS depths; with more,
        the deepest ends are, and others may be short by 1/_MAX_SPANS of the chain.
        """
        drops = self._drops(chain) if chain else []
        if self._has_lower_tiers:
            return self._by_tier(drops)
        worker_ids: list[str] = []
        epochs: list[int] = []
        pages: list[int] = []
        for depth, lost in drops:
            names = self._holders.names(lost)
            worker_ids += names.worker_ids
            epochs += names.epochs
            pages += [depth] * len(names.epochs)
        return PrefixMatch(worker_ids, epochs, pages, pages, pages)

    def scrub(self) -> bool:
        """Clear the bits of retired holders in one shard; True while there is more to do."""
        if not self._scrubbing:
            if not self._retired:
                return False
            self._scrubbing, self._retired = self._retired, []
        stale = sum(holder.bits for holder in self._scrubbing)
        shard = self._values[self._scrub_shard]
        for page in [page for page, value in shard.items() if value & stale]:
            self._keep_or_erase(page, shard[page] & ~stale)
        self._scrub_shard = (self._scrub_shard + 1) % _NUM_SHARDS
        if self._scrub_shard == 0:
            self._holders.free(self._scrubbing)
            self._scrubbing = []
        return bool(self._scrubbing or self._retired)

    def check(self) -> None:
        """Assert every invariant, slowly; for tests."""
        values = {page: value for shard in self._values for page, value in shard.items()}
        parents = {page: parent for shard in self._parents for page, parent in shard.items()}
        assert values.keys() == parents.keys(), "each page has a parent"
        assert len(values) == self.num_prefixes, "pages are counted"
        num_children = dict.fromkeys(values, 0)
        for parent in parents.values():
            if parent != ROOT_HASH:
                num_children[parent] += 1
        for page, value in values.items():
            assert value & _NUM_CHILDREN == num_children[page], "children are counted"
            assert value >= _HELD or num_children[page], "somebody needs each page"
        for holder in set(self._holders) - {*self._retired, *self._scrubbing}:
            for tier in range(NUM_TIERS):
                held = [page for page, value in values.items() if value & holder.gpu_bit << tier]
                assert len(held) == holder.num_pages[tier], "a holder's pages are counted"
        used = sum(holder.bits for holder in self._holders)
        for value in values.values():
            assert not value >> FIRST_SLOT_BIT << FIRST_SLOT_BIT & ~used, "no bit is unowned"

    def _drops(self, chain: Sequence[int]) -> list[tuple[int, int]]:
        """Where holders fall off: (leading pages, bits lost there), deepest first.

        With lower tiers a bit stands for its tier or a nearer one; without, only GPU bits are
        given. Bisection between pages whose bits differ takes about log2(n) look-ups a drop, each
        a few cache misses. So it first only narrows the drops down to spans of 1/_MAX_SPANS of the
        chain, and looks into these from the deepest on, until _EXACT_DROPS are known.
        """
        first_bits = self._bits(chain[0])
        if not first_bits:
            return []
        last = len(chain) - 1
        last_bits = self._bits(chain[-1]) & first_bits
        whole = (0, first_bits, last, last_bits)
        spans = self._narrow(chain, whole, -(-last // _MAX_SPANS))
        # Past its end nobody holds the chain.
        drops = [(last + 1, last_bits)] if last_bits else []
        for span in reversed(spans):
            low, low_bits, high, high_bits = span
            if high - low > 1 and len(drops) < _EXACT_DROPS:
                exact = self._narrow(chain, span, 1)
                drops += [(end, before & ~after) for _, before, end, after in reversed(exact)]
            else:
                drops.append((low + 1, low_bits & ~high_bits))
        return drops

    def _narrow(self, chain: Sequence[int], span: _Span, max_len: int) -> list[_Span]:
        """The parts of `span`, of at most `max_len` pages, over which bits are lost; in order."""
        shards, has_lower_tiers = self._values, self._has_lower_tiers
        low, low_bits, high, high_bits = span
        found: list[_Span] = []
        # Known points beyond `high`, nearest last.
        beyond: list[tuple[int, int]] = []
        while True:
            if high_bits == low_bits or high - low <= max_len:
                if high_bits != low_bits:
                    found.append((low, low_bits, high, high_bits))
                if not high_bits or not beyond:
                    return found
                low, low_bits = high, high_bits
                high, high_bits = beyond.pop()
            else:
                beyond.append((high, high_bits))
                high = (low + high) >> 1
                page = chain[high]
                if has_lower_tiers:
                    high_bits = self._bits(page) & low_bits
                else:
                    # `low_bits` are visible ones, so this is the same.
                    high_bits = shards[page & _SHARD].get(page, 0) & low_bits

    def _bits(self, page: int) -> int:
        """Bits of visible holders of a page; with lower tiers, each also sets those below it."""
        bits = self._values[page & _SHARD].get(page, 0) & self._holders.visible_bits
        if self._has_lower_tiers:
            visible_gpu = self._holders.visible_gpu
            bits |= (bits & visible_gpu) << 1
            bits |= (bits & visible_gpu << 1) << 1
        return bits

    def _by_tier(self, drops: list[tuple[int, int]]) -> PrefixMatch:
        """The match where a holder's tiers may end at different depths."""
        pages: dict[Holder, list[int]] = {}
        for depth, lost in drops:
            for holder, tier in self._holders.holdings(lost):
                pages.setdefault(holder, [0] * NUM_TIERS)[tier] = depth
        gpu, host, remote = zip(*pages.values(), strict=True) if pages else ((), (), ())
        return PrefixMatch(
            [holder.worker_id for holder in pages],
            [holder.epoch for holder in pages],
            gpu,
            host,
            remote,
        )

    def _keep_or_erase(self, page: int, value: int) -> None:
        """Write a page's value after it lost holders, or forget it when it has none left.

        A page without holders stays while it has children, which only a worker that removes a
        parent first can cause; it goes with its last child.
        """
        if value >= _HELD or value & _NUM_CHILDREN:
            self._values[page & _SHARD][page] = value
            return
        while True:
            parent = self._erase(page)
            if parent == ROOT_HASH:
                return
            value = self._values[parent & _SHARD][parent]
            if value >= _HELD or value & _NUM_CHILDREN:
                return
            page = parent

    def _erase(self, page: int) -> int:
        """Forget a page without children; returns its parent, which has one child less."""
        index = page & _SHARD
        del self._values[index][page]
        parent = self._parents[index].pop(page)
        self.num_prefixes -= 1
        if parent != ROOT_HASH:
            self._values[parent & _SHARD][parent] -= 1
        return parent

    def _drop_oldest(self) -> None:
        """Drop least recently stored branches until the bound holds.

        The sweep is a clock (Corbato 1968) over pages in the order they were stored, shard by
        shard: a page with children or stored again since goes to the end of the order; a leaf is
        dropped together with its ancestors up to the first that has another child or was stored
        again. Pages passed this way go with their branch, so a drop costs O(1) pages over time.
        One call spares only so many pages for having been stored again, so that it ends soon.
        """
        spared = _NUM_CHILDREN | _STORED_AGAIN
        num_seen = 0
        while self.num_prefixes > self.max_prefixes:
            index = self._sweep_shard
            values, parents = self._values[index], self._parents[index]
            for page in list(islice(parents, _SWEEP_PAGES)):
                value = values.get(page)
                if value is None:
                    continue
                if value & spared:
                    values[page] = value & ~_STORED_AGAIN
                    parents[page] = parents.pop(page)
                elif self.num_prefixes > self.max_prefixes:
                    self._drop_branch(page, value, spared)
            self._sweep_shard = (index + 1) % _NUM_SHARDS
            num_seen += _SWEEP_PAGES
            if num_seen > _PATIENCE_PAGES:
                spared = _NUM_CHILDREN

    def _drop_branch(self, page: int, value: int, spared: int) -> None:
        """Drop a leaf, and its ancestors up to the first whose value has a bit of `spared`."""
        while not value & spared:
            self._uncount(value & -_HELD)
            self.num_dropped += 1
            page = self._erase(page)
            if page == ROOT_HASH:
                return
            value = self._values[page & _SHARD][page]

    def _uncount(self, bits: int) -> None:
        """Take one page off the counts of the holders in `bits`."""
        for holder, tier in self._holders.holdings(bits):
            holder.num_pages[tier] -= 1
