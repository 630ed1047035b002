"""What evicting the next pages would cost to compute again: E2's M_i (arXiv 2407.00023, 3.2).

A page's cost is the time to prefill it times the share of requests that use it. Times are the
front's business (it fits them), so the work is counted here: tokens, and pairs of a token with one
before it.
"""

from __future__ import annotations

from services.worker.engine.kv.radix import RadixTree
from services.worker.engine.messages import EvictionWork

# A walk over so many pages takes about two milliseconds.
MAX_PAGES = 2048


def eviction_work(tree: RadixTree, page_size: int, max_pages: int = MAX_PAGES) -> EvictionWork:
    """The work, times request share, in the next 2^k pages to go, k = 0, 1, 2 ...

    Ends with the last power of two that the tree can give back, at most `max_pages`.
    """
    tokens: list[float] = []
    pairs: list[float] = []
    num_tokens = num_pairs = 0.0
    due = 1
    for number, (node, share) in enumerate(tree.eviction_order(), 1):
        num_tokens += share * page_size
        num_pairs += share * page_size * (node.depth - 0.5) * page_size
        if number == due:
            tokens.append(num_tokens)
            pairs.append(num_pairs)
            due *= 2
            if due > max_pages:
                break
    return EvictionWork(tokens=tokens, pairs=pairs)
