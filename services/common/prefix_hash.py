"""The prefix hash: one 64-bit number that names a whole prefix of pages in a namespace.

Page i's hash is xxh3-64 over its token ids (little-endian uint32) seeded by page i-1's hash; the
first page is seeded by its namespace. Tokenizer, gateway and worker must agree on every bit, so
any change raises HASH_VERSION. Hashes route; they never prove: xxh3 is forgeable, and a worker's
match compares namespace and token ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

HASH_VERSION = 1

# Stands for "no parent" in cache events; no prefix hash has this value.
ROOT_HASH = 0


def cache_namespace(model_revision: str, adapter_digest: str = "", salt: str = "") -> str:
    """Prefixes are shared within one namespace only."""
    return f"{model_revision}/{adapter_digest}/{salt}"


def namespace_seed(namespace: str) -> int:
    """Seed of the first page's hash."""
    return xxh3_64_intdigest(namespace.encode(), seed=HASH_VERSION) or 1


def page_hash(parent: int, page: bytes) -> int:
    """Hash of one page, packed as little-endian uint32, after the one whose hash is `parent`."""
    return int(xxh3_64_intdigest(page, parent)) or 1


def prefix_hashes(token_ids: Sequence[int], page_size: int, namespace: str) -> list[int]:
    """Hashes of all full pages of `token_ids`, first page first.

    Raises OverflowError for an id that is not a uint32.
    """
    return extend_prefix_hashes(namespace_seed(namespace), token_ids, page_size)


def extend_prefix_hashes(parent: int, token_ids: Sequence[int], page_size: int) -> list[int]:
    """Hashes of the full pages of `token_ids` after the page whose hash (or seed) is `parent`."""
    packed = memoryview(array("I", token_ids)).cast("B")
    page_bytes = 4 * page_size
    hashes = []
    for start in range(0, len(token_ids) // page_size * page_bytes, page_bytes):
        parent = xxh3_64_intdigest(packed[start : start + page_bytes], parent) or 1
        hashes.append(parent)
    return hashes
