"""Tenants: what each one's share and bounds are, from the operator's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The entry of all tenants that have none of their own.
OTHERS = "*"
# Who names no tenant is this one.
NOBODY = ""
_MAX_TENANTS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantPolicy:
    """One tenant's share of the service, relative to others', and how many of its requests wait."""

    weight: float = 1.0
    # In one pool; None leaves the pool's bound only.
    max_queued: int | None = None

    def __post_init__(self) -> None:
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight must be in [0.001, 1000], got {self.weight}")
        if self.max_queued is not None and self.max_queued < 1:
            raise ValueError(f"max_queued must be >= 1, got {self.max_queued}")


class TenantSet:
    """Policies by tenant. Any name may come; only listed ones are told apart in metrics."""

    def __init__(self, policies: Mapping[str, TenantPolicy] | None = None) -> None:
        self._policies = dict(policies or {})
        self._others = self._policies.pop(OTHERS, TenantPolicy())

    def of(self, tenant: str) -> TenantPolicy:
        return self._policies.get(tenant, self._others)

    def weight(self, tenant: str) -> float:
        return self.of(tenant).weight

    def label(self, tenant: str) -> str:
        """Its name in metrics: there are no more of them than the operator listed, and two."""
        if tenant in self._policies:
            return tenant
        return "other" if tenant else "none"


def read_tenants(path: Path) -> TenantSet:
    """Tenants from a JSON file: an object of name to {"weight", "max_queued"}.

    "*" stands for all that are not listed, "" for requests that name no tenant. Raises ValueError,
    naming what is wrong.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read tenants from {path}: {error}") from error
    if not isinstance(loaded, dict) or len(loaded) > _MAX_TENANTS:
        raise ValueError(f"{path} must hold an object of at most {_MAX_TENANTS} tenants")
    return TenantSet({name: _policy(path, name, entry) for name, entry in loaded.items()})


def _policy(path: Path, name: str, entry: object) -> TenantPolicy:
    where = f"{path}: tenant {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object")
    unknown = entry.keys() - {"weight", "max_queued"}
    if unknown:
        raise ValueError(f"{where} has an unknown field {min(unknown)!r}")
    weight, max_queued = entry.get("weight", 1.0), entry.get("max_queued")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"{where}: weight must be a number")
    if max_queued is not None and type(max_queued) is not int:
        raise ValueError(f"{where}: max_queued must be a whole number")
    try:
        return TenantPolicy(weight=float(weight), max_queued=max_queued)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
