"""Pools: which workers may serve each other's requests, and what a stranger differs in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from services.common.rpc import MAX_PROTOCOL_REVISION, MIN_PROTOCOL_REVISION


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolIdentity:
    """What workers of one pool agree on (common.v1.PoolIdentity)."""

    served_model_name: str
    model_revision: str
    tokenizer_digest: str
    template_digest: str
    page_size: int
    hash_version: int


@dataclass(frozen=True, slots=True)
class ProtocolRange:
    """Wire revisions a process speaks (common.v1.ProtocolRange)."""

    min_revision: int
    max_revision: int

    def highest_common(self, other: ProtocolRange) -> int | None:
        highest = min(self.max_revision, other.max_revision)
        return highest if highest >= max(self.min_revision, other.min_revision) else None

    def __str__(self) -> str:
        return f"{self.min_revision}-{self.max_revision}"


OUR_PROTOCOL = ProtocolRange(MIN_PROTOCOL_REVISION, MAX_PROTOCOL_REVISION)

_FIELD_TYPES: Mapping[str, type] = {
    field.name: int if field.name in ("page_size", "hash_version") else str
    for field in fields(PoolIdentity)
}


@dataclass(frozen=True, slots=True)
class Mismatch:
    field: str
    worker_value: str
    pool_value: str


class Pool:
    """One pool's declaration.

    `declared` are the fields the operator fixed. The first worker accepted fixes the others, for
    as long as the pool has workers; an empty pool takes on the identity of the next that fits.
    """

    def __init__(self, declared: Mapping[str, str | int]) -> None:
        self.declared = declared
        self.identity: PoolIdentity | None = None

    @property
    def name(self) -> str | None:
        """The served model's name; None while nobody has said it."""
        if self.identity is not None:
            return self.identity.served_model_name
        name = self.declared.get("served_model_name")
        return None if name is None else str(name)

    def mismatches(self, identity: PoolIdentity, has_workers: bool) -> list[Mismatch]:
        """Every field in which `identity` differs from what is fixed."""
        expected = dict(self.declared)
        if has_workers and self.identity is not None:
            expected = {name: getattr(self.identity, name) for name in _FIELD_TYPES}
        return [
            Mismatch(name, str(getattr(identity, name)), str(value))
            for name, value in expected.items()
            if getattr(identity, name) != value
        ]


class PoolSet:
    """All pools: the operator's, or a single one that the first registration declares."""

    def __init__(self, declarations: Sequence[Mapping[str, str | int]] = ()) -> None:
        self.pools = [Pool(declared) for declared in declarations] or [Pool({})]

    def for_worker(self, identity: PoolIdentity) -> Pool | None:
        """The pool that a worker with `identity` would join; None where none has its name."""
        if len(self.pools) == 1:
            return self.pools[0]
        return self.by_name(identity.served_model_name)

    def by_name(self, name: str) -> Pool | None:
        return next((pool for pool in self.pools if pool.name == name), None)

    @property
    def names(self) -> list[str]:
        return [pool.name for pool in self.pools if pool.name is not None]


def protocol_mismatch(protocol: ProtocolRange) -> list[Mismatch]:
    """Empty when the worker and this scheduler have a wire revision in common."""
    if OUR_PROTOCOL.highest_common(protocol) is not None:
        return []
    return [Mismatch("protocol", str(protocol), str(OUR_PROTOCOL))]


def read_declarations(path: Path) -> list[dict[str, str | int]]:
    """Pools from a JSON file: a list of objects with the fields of PoolIdentity.

    Only `served_model_name` is required; the first registration fixes what is left out.
    Raises ValueError, naming what is wrong.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read pools from {path}: {error}") from error
    if not isinstance(loaded, list) or not loaded:
        raise ValueError(f"{path} must hold a list of at least one pool")
    declarations = [_declaration(path, entry) for entry in loaded]
    _require_distinct(path, (str(declared["served_model_name"]) for declared in declarations))
    return declarations


def _declaration(path: Path, entry: object) -> dict[str, str | int]:
    if not isinstance(entry, dict) or not entry.get("served_model_name"):
        raise ValueError(f"each pool in {path} must be an object with served_model_name")
    for name, value in entry.items():
        if name not in _FIELD_TYPES:
            raise ValueError(f"{path}: unknown pool field {name!r}")
        if type(value) is not _FIELD_TYPES[name]:
            raise ValueError(f"{path}: {name} must be {_FIELD_TYPES[name].__name__}")
    return dict(entry)


def _require_distinct(path: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path} declares {name!r} twice")
        seen.add(name)
