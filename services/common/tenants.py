"""Tenants: what each one's share and bounds are, from the operator's file.

The scheduler and the gateways read the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidRequestError

# The entry of all tenants that have none of their own.
OTHERS = "*"
# Who names no tenant is this one.
NOBODY = ""
_MAX_TENANTS = 1000
_COUNTS = ("max_queued", "requests_per_minute", "tokens_per_minute")
_WHOLE_NUMBERS = (*_COUNTS, "max_priority")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantPolicy:
    """One tenant's share of the service, relative to others', and its bounds.

    The scheduler keeps the first two, gateways the rest.
    """

    weight: float = 1.0
    # Requests that wait in one pool; None leaves the pool's bound only.
    max_queued: int | None = None
    # Over all gateways that share a store; None is no limit.
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    # Highest that its requests may ask for; None is any.
    max_priority: int | None = None

    def __post_init__(self) -> None:
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight must be in [0.001, 1000], got {self.weight}")
        for name in _COUNTS:
            bound = getattr(self, name)
            if bound is not None and bound < 1:
                raise ValueError(f"{name} must be >= 1, got {bound}")
        if self.max_priority is not None and not 0 <= self.max_priority < 2**31:
            # Below 0 whoever names no priority could not be served.
            raise ValueError(f"max_priority must be in [0, 2**31), got {self.max_priority}")


class TenantSet:
    """Policies by tenant. Any name may come; only listed ones are told apart in metrics."""

    def __init__(self, policies: Mapping[str, TenantPolicy] | None = None) -> None:
        self._policies = dict(policies or {})
        self._others = self._policies.pop(OTHERS, TenantPolicy())

    def of(self, tenant: str) -> TenantPolicy:
        return self._policies.get(tenant, self._others)

    def weight(self, tenant: str) -> float:
        return self.of(tenant).weight

    def check_priority(self, tenant: str, priority: int) -> None:
        """Raise InvalidRequestError for a higher one than the tenant may ask for."""
        most = self.of(tenant).max_priority
        if most is not None and priority > most:
            raise InvalidRequestError(
                f"priority is {priority}, this tenant may ask for {most} at most", "priority"
            )

    def label(self, tenant: str) -> str:
        """Its name in metrics: there are no more of them than the operator listed, and two."""
        if tenant in self._policies:
            return tenant
        return "other" if tenant else "none"


def read_tenants(path: Path) -> TenantSet:
    """Tenants from a JSON file: an object of name to an object of TenantPolicy's fields.

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
    unknown = entry.keys() - {"weight", *_WHOLE_NUMBERS}
    if unknown:
        raise ValueError(f"{where} has an unknown field {min(unknown)!r}")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"{where}: weight must be a number")
    bounds = {name: entry.get(name) for name in _WHOLE_NUMBERS}
    for name, bound in bounds.items():
        if bound is not None and type(bound) is not int:
            raise ValueError(f"{where}: {name} must be a whole number")
    try:
        return TenantPolicy(weight=float(weight), **bounds)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
