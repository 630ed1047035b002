"""The prefix tree over cached pages: who may share what, and what goes first when space is short.

The idea of caching prefixes in a radix tree with least-recently-used eviction of leaves is
SGLang's RadixAttention (arXiv 2312.07104, section 3); a node here is exactly one page, so nothing
is ever split and a match is one dictionary lookup a page.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence

from services.common.prefix_hash import ROOT_HASH, namespace_seed, page_hash
from services.worker.engine.kv.events import CacheEventCollector

_BYTES_PER_ID = 4
# Entries of the eviction heap that may be out of date before it is rebuilt.
_HEAP_SLACK = 1024
# Uses of a page are counted over about so many of the newest: 1 / (1 - _KEEP).
_KEEP = 1 - 1 / 1024


def page_keys(namespace: str, token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """The tree's keys of all full pages of `token_ids`, which start at position 0.

    A key is the page's ids packed as uint32; the first one begins with the namespace, so that
    prefixes of different namespaces part at the root. Raises OverflowError for an id that is not
    a uint32.
    """
    step = page_size * _BYTES_PER_ID
    packed = array("I", token_ids).tobytes()
    stop = len(packed) // step * step
    keys = [packed[start : start + step] for start in range(0, stop, step)]
    if keys:
        keys[0] = namespace.encode() + keys[0]
    return keys


class Node:
    """One cached page: its ids under one exact prefix. Compared by identity."""

    __slots__ = (
        "children",
        "counted_at",
        "depth",
        "in_tree",
        "key",
        "last_used",
        "num_locks",
        "page",
        "parent",
        "prefix_hash",
        "uses",
    )

    def __init__(self, parent: Node | None, key: bytes, page: int, prefix_hash: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.prefix_hash = prefix_hash
        # Pages from the root to here; 0 is the root.
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, Node] = {}
        # Locks held on this node itself, plus its children that are locked.
        self.num_locks = 0
        self.last_used = 0
        # Locks that ended here or under a child that was evicted since, older ones counting
        # less; as of `counted_at`.
        self.uses = 0.0
        self.counted_at = 0
        self.in_tree = True

    def path(self) -> Iterator[Node]:
        """This node and its ancestors below the root, deepest first."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class RadixTree:
    """Owns the pages of all cached prefixes; free ones are the allocator's.

    A lock on a node keeps its whole path. Invariant: a node is locked as long as one of its
    descendants is, so the unlocked nodes form subtrees that can be evicted leaf by leaf.
    Keys are compared whole: prefix hashes are only announced, they never decide a match.
    """

    def __init__(self, page_size: int, events: CacheEventCollector) -> None:
        self.root = Node(None, b"", -1, ROOT_HASH)
        self._key_bytes = page_size * _BYTES_PER_ID
        self._events = events
        self._num_pages = 0
        self._num_locked = 0
        # Counts unlocks.
        self._clock = 0
        # All uses there were, older ones counting less.
        self._num_uses = 0.0
        # (last used, order of entry, node) of unlocked leaves; entries go out of date in place.
        self._leaves: list[tuple[int, int, Node]] = []
        self._num_pushes = 0

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return self._num_pages

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` can give back."""
        return self._num_pages - self._num_locked

    def match(self, keys: Sequence[bytes], max_pages: int, after: Node | None = None) -> Node:
        """The deepest node, at most `max_pages` deep, whose path is a prefix of `keys`.

        Changes nothing. `after` is where an earlier match of the same keys ended; it saves the
        way to there if it is still in the tree and not too deep.
        """
        if after is None or not after.in_tree or after.depth > max_pages:
            after = self.root
        node = after
        for key in keys[node.depth : max_pages]:
            child = node.children.get(key)
            if child is None:
                break
            node = child
        return node

    def num_unlocked(self, node: Node) -> int:
        """Pages on the path to `node` that a lock on it would take from the evictable ones."""
        count = 0
        for ancestor in node.path():
            if ancestor.num_locks:
                break
            count += 1
        return count

    def lock(self, node: Node) -> None:
        """Keep the path to `node` until the matching `unlock`."""
        current: Node | None = node
        while current is not None:
            current.num_locks += 1
            if current.num_locks > 1 or current.parent is None:
                return
            self._num_locked += 1
            current = current.parent

    def unlock(self, node: Node) -> None:
        """Give up one lock on `node`; what nobody else locks was used last now."""
        self._clock += 1
        self._num_uses = self._num_uses * _KEEP + 1
        node.uses = self._uses_of(node) + 1
        node.counted_at = self._clock
        current: Node | None = node
        while current is not None:
            assert current.num_locks > 0, "unlocking a node that is not locked"
            current.num_locks -= 1
            if current.num_locks or current.parent is None:
                return
            self._num_locked -= 1
            current.last_used = self._clock
            if not current.children:
                self._push(current)
            current = current.parent

    def insert(self, node: Node, key: bytes, page: int) -> Node:
        """Put `page` under `node` and return its node; one lock on `node` moves to it.

        Where that node is there already it stays with its own page, and the caller keeps `page`.
        """
        assert node.num_locks > 0, "a page is inserted under a locked one"
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Node(node, key, page, self._hash_of(node, key))
            self._num_pages += 1
            self._events.store(node.prefix_hash, child.prefix_hash)
        # What was the caller's lock on `node` is now the one that its locked child means.
        child.num_locks += 1
        if child.num_locks == 1:
            self._num_locked += 1
        else:
            node.num_locks -= 1
        return child

    def evict(self, num_pages: int) -> list[int]:
        """Remove unlocked pages, least recently used leaves first; returns at most `num_pages`."""
        pages: list[int] = []
        leaves = self._leaves
        while len(pages) < num_pages and leaves:
            last_used, _, node = heapq.heappop(leaves)
            if node.last_used != last_used or not _is_evictable(node):
                continue
            parent = self._remove(node)
            pages.append(node.page)
            # Up the path while it is next in turn, which spares the heap.
            while _is_evictable(parent):
                if len(pages) == num_pages or (leaves and leaves[0][0] < parent.last_used):
                    self._push(parent)
                    break
                node, parent = parent, self._remove(parent)
                pages.append(node.page)
        return pages

    def eviction_order(self) -> Iterator[tuple[Node, float]]:
        """The pages that `evict` would remove, in its order, each with the share of uses it had.

        Changes nothing, and the tree must not change meanwhile.
        """
        leaves = list(self._leaves)
        num_pushes = self._num_pushes
        # Of pages with a child that has come up: children still to come, and uses of the others.
        num_children: dict[Node, int] = {}
        uses_below: dict[Node, float] = {}
        seen: set[Node] = set()
        while leaves:
            last_used, _, node = heapq.heappop(leaves)
            parent = node.parent
            if parent is None or node in seen or node.num_locks or node.last_used != last_used:
                continue
            if num_children.get(node, len(node.children)):
                continue
            seen.add(node)
            uses = self._uses_of(node) + uses_below.get(node, 0.0)
            yield node, uses / self._num_uses
            uses_below[parent] = uses_below.get(parent, 0.0) + uses
            left = num_children[parent] = num_children.get(parent, len(parent.children)) - 1
            if not left and not parent.num_locks and parent.parent is not None:
                num_pushes += 1
                heapq.heappush(leaves, (parent.last_used, num_pushes, parent))

    def clear(self) -> list[int]:
        """Remove every unlocked page."""
        if self._num_locked:
            return self.evict(self.num_evictable)
        nodes = list(self._nodes())
        for node in nodes:
            node.in_tree = False
            node.parent = None
        self.root.children.clear()
        self._leaves.clear()
        self._num_pages = 0
        if nodes:
            self._events.clear()
        return [node.page for node in nodes]

    def pages(self) -> list[int]:
        """Ids of all pages held."""
        return [node.page for node in self._nodes()]

    def check(self, locked: Sequence[Node]) -> None:
        """Raise AssertionError unless the tree is sound and exactly `locked` hold locks."""
        num_locks: dict[Node, int] = {}
        for node in locked:
            num_locks[node] = num_locks.get(node, 0) + 1
        num_pages = num_locked = 0
        evictable = {node for used, _, node in self._leaves if node.last_used == used}
        nodes = list(self._nodes())
        for node in (*nodes, self.root):
            for key, child in node.children.items():
                assert child.parent is node, "a child that does not know its parent"
                assert child.key == key, "a child under another key than its own"
                assert child.depth == node.depth + 1, "a depth that is off"
                assert child.prefix_hash == self._hash_of(node, key), "a prefix hash that is off"
            held = num_locks.pop(node, 0) + sum(child.num_locks > 0 for child in _children(node))
            assert node.num_locks == held, f"{node.num_locks} locks counted, {held} held"
        for node in nodes:
            assert node.in_tree, "an evicted node is still in the tree"
            num_pages += 1
            num_locked += node.num_locks > 0
            if _is_evictable(node):
                assert node in evictable, "an unlocked leaf that eviction cannot find"
        assert not num_locks, "a lock on a page that is gone"
        assert num_pages == self._num_pages, "a wrong number of pages"
        assert num_locked == self._num_locked, "a wrong number of locked pages"
        hashes = {node.prefix_hash for node in nodes}
        assert hashes == self._events.held_hashes, "pages were not announced as they are"

    def _remove(self, leaf: Node) -> Node:
        """Take a leaf out; returns its parent."""
        parent = leaf.parent
        assert parent is not None, "the root is never evicted"
        del parent.children[leaf.key]
        leaf.in_tree = False
        leaf.parent = None
        # Who used the leaf used its parent.
        parent.uses = self._uses_of(parent) + self._uses_of(leaf)
        parent.counted_at = self._clock
        self._num_pages -= 1
        self._events.remove(leaf.prefix_hash)
        return parent

    def _uses_of(self, node: Node) -> float:
        """The node's count, as of now."""
        if not node.uses:
            return 0.0
        return node.uses * _KEEP ** (self._clock - node.counted_at)

    def _push(self, leaf: Node) -> None:
        if len(self._leaves) > 2 * self._num_pages + _HEAP_SLACK:
            self._leaves[:] = [
                entry
                for entry in self._leaves
                if _is_evictable(entry[2]) and entry[2].last_used == entry[0]
            ]
            heapq.heapify(self._leaves)
        self._num_pushes += 1
        heapq.heappush(self._leaves, (leaf.last_used, self._num_pushes, leaf))

    def _hash_of(self, parent: Node, key: bytes) -> int:
        if parent is not self.root:
            return page_hash(parent.prefix_hash, key)
        namespace = key[: -self._key_bytes].decode()
        return page_hash(namespace_seed(namespace), key[-self._key_bytes :])

    def _nodes(self) -> Iterator[Node]:
        """All nodes below the root, parents first."""
        waiting = _children(self.root)
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())


def _children(node: Node) -> list[Node]:
    return list(node.children.values())


def _is_evictable(node: Node) -> bool:
    return node.in_tree and not node.num_locks and not node.children and node.parent is not None
