"""The prefix hash: its value is a contract between services, so it is pinned here."""

import pytest

from services.common.prefix_hash import (
    HASH_VERSION,
    ROOT_HASH,
    cache_namespace,
    extend_prefix_hashes,
    namespace_seed,
    prefix_hashes,
)

NAMESPACE = cache_namespace("revision")


def test_hashes_of_version_1_never_change() -> None:
    assert HASH_VERSION == 1
    assert prefix_hashes(range(8), 4, "revision//") == [4118131189994164637, 7747375047711073991]


def test_only_full_pages_are_hashed() -> None:
    assert len(prefix_hashes(range(33), 16, NAMESPACE)) == 2
    assert prefix_hashes(range(15), 16, NAMESPACE) == []


def test_a_hash_names_everything_before_it() -> None:
    left = prefix_hashes([1, 2, 3, 4], 2, NAMESPACE)
    right = prefix_hashes([9, 2, 3, 4], 2, NAMESPACE)
    assert left[0] != right[0]
    assert left[1] != right[1]


def test_extending_a_prefix_equals_hashing_the_whole() -> None:
    ids = list(range(100, 164))
    whole = prefix_hashes(ids, 16, NAMESPACE)
    first = extend_prefix_hashes(namespace_seed(NAMESPACE), ids[:32], 16)
    assert first + extend_prefix_hashes(first[-1], ids[32:], 16) == whole


def test_namespaces_keep_prefixes_apart() -> None:
    salted = cache_namespace("revision", salt="tenant")
    assert prefix_hashes(range(16), 16, NAMESPACE) != prefix_hashes(range(16), 16, salted)


def test_no_hash_is_the_root() -> None:
    assert ROOT_HASH not in prefix_hashes(range(4096), 1, NAMESPACE)


def test_an_id_that_is_no_uint32_is_refused() -> None:
    with pytest.raises(OverflowError):
        prefix_hashes([2**32], 1, NAMESPACE)
