"""The operator's file of API keys."""

from __future__ import annotations

import hashlib
import json

import pytest

from services.gateway.api_keys import Caller, parse_keys


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_are_found_by_what_clients_send() -> None:
    entries = [
        {"name": "search", "sha256": sha256("k1"), "tenant": "search"},
        {"name": "ops", "sha256": sha256("k2").upper(), "admin": True},
    ]
    keys = parse_keys([json.dumps(entries).encode()])
    assert keys.find(b"k1") == Caller("search", "search")
    assert keys.find(b"k2") == Caller("ops", is_admin=True)
    for strange in (b"", b"k", b"k3", sha256("k1").encode(), b"K1", b"\xff"):
        assert keys.find(strange) is None


GOOD = {"name": "a", "sha256": sha256("secret-key")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no JSON"),
        ("[", "no JSON"),
        ("\udcff", "no JSON"),
        ("{}", "must be a list"),
        ("[1]", "entry 0 must be an object"),
        ([{**GOOD, "tenants": "a"}], "unknown field 'tenants'"),
        ([{"sha256": GOOD["sha256"]}], "entry 0 needs a name"),
        ([{**GOOD, "name": ""}], "entry 0 needs a name"),
        ([{"name": "a"}], "sha256 must be"),
        ([{"name": "a", "sha256": "secret-key"}], "sha256 must be"),
        ([{"name": "a", "sha256": "g" * 64}], "sha256 must be"),
        ([{**GOOD, "tenant": "\n"}], "tenant must be"),
        ([{**GOOD, "tenant": "x" * 129}], "tenant must be"),
        ([{**GOOD, "tenant": 5}], "tenant must be"),
        ([{**GOOD, "admin": 1}], "admin must be"),
        ([GOOD, {**GOOD, "name": "b"}], "entry 1 has the name or the key"),
        ([GOOD, {**GOOD, "sha256": sha256("other")}], "entry 1 has the name or the key"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_entry_and_no_key(
    content: object, reason: str
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(ValueError, match=reason) as refused:
        parse_keys([text.encode("utf-8", "surrogateescape")])
    assert "secret-key" not in str(refused.value)
    assert GOOD["sha256"] not in str(refused.value)
