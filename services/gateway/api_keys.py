"""API keys: which callers there are, from flags and from the operator's file.

Keys are known by their SHA-256 only. They are looked up by a hash keyed with a secret of this
process, so how long that takes says nothing about a key.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.gateway.exchange import valid_tenant

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FIELDS = ("name", "sha256", "tenant", "admin")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever has one key. `tenant` is the only one it may act for; None is any."""

    name: str
    tenant: str | None = None
    is_admin: bool = False


class KeySet:
    """Callers by their keys."""

    def __init__(self, callers: Iterable[tuple[bytes, Caller]] = ()) -> None:
        """`callers` with the SHA-256 of their keys."""
        self._secret = secrets.token_bytes(32)
        self._callers = {self._place(digest): caller for digest, caller in callers}

    def find(self, key: bytes) -> Caller | None:
        """Whose key it is."""
        return self._callers.get(self._place(hashlib.sha256(key).digest()))

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def parse_keys(contents: Sequence[bytes]) -> KeySet:
    """Callers from one JSON file: a list of objects with name, sha256 (hexadecimal, of the key),
    tenant and admin, of which the last two may be absent. Raises ValueError naming what is wrong.
    """
    try:
        entries = json.loads(contents[0])
    except ValueError as error:
        raise ValueError("the keys are no JSON") from error
    if not isinstance(entries, list):
        raise ValueError("the keys must be a list of objects")
    callers = [_caller(number, entry) for number, entry in enumerate(entries)]
    names: set[str] = set()
    digests: set[bytes] = set()
    for number, (digest, caller) in enumerate(callers):
        if caller.name in names or digest in digests:
            raise ValueError(f"entry {number} has the name or the key of one before it")
        names.add(caller.name)
        digests.add(digest)
    return KeySet(callers)


def _caller(number: int, entry: object) -> tuple[bytes, Caller]:
    where = f"entry {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object")
    if unknown := entry.keys() - set(_FIELDS):
        raise ValueError(f"{where} has an unknown field {min(unknown)!r}")
    name, digest = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} needs a name")
    where = f"entry {number} ({name!r})"
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"{where}: sha256 must be the 64 hexadecimal digits of the key's SHA-256")
    tenant, is_admin = entry.get("tenant"), entry.get("admin", False)
    if tenant is not None and not (isinstance(tenant, str) and valid_tenant(tenant)):
        raise ValueError(f"{where}: tenant must be at most 128 printable ASCII characters")
    if not isinstance(is_admin, bool):
        raise ValueError(f"{where}: admin must be true or false")
    return bytes.fromhex(digest), Caller(name, tenant, is_admin)
