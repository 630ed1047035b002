"""Who may call what, and for which tenant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import Enum

from services.common.edge_flags import EdgeFlags
from services.common.errors import PermissionDeniedError, UnauthenticatedError
from services.gateway.api_keys import Caller, KeySet
from services.gateway.metrics import GatewayMetrics

_SCHEME = b"bearer "


class Need(Enum):
    """What an endpoint asks of its caller."""

    NOTHING = 0
    # A key, where there are any for ordinary calls.
    KEY = 1
    # For what changes the server's state: an administrator's key, where there can be one.
    ADMIN = 2


class Access:
    """Admits callers by the keys of the flags and of the operator's file.

    The rules are SGLang's: an administrator's key alone leaves ordinary endpoints open; without
    one, whoever has a key may administer. With a file, only its administrators may.
    """

    def __init__(
        self, flags: EdgeFlags, metrics: GatewayMetrics, keys: Callable[[], KeySet] | None = None
    ) -> None:
        """`keys` gives those of the file as they are now."""
        self._metrics = metrics
        self._file = keys
        self._own = KeySet(
            (hashlib.sha256(key.encode()).digest(), caller)
            for key, caller in (
                (flags.api_key, Caller("api-key")),
                (flags.admin_api_key, Caller("admin-api-key", is_admin=True)),
            )
            if key is not None
        )
        has_admins = flags.admin_api_key is not None or flags.api_keys is not None
        # Whether a call with this need is checked at all, and whether its caller must be one.
        self._is_checked = {
            Need.NOTHING: False,
            Need.KEY: flags.asks_for_keys,
            Need.ADMIN: flags.asks_for_keys or has_admins,
        }
        self._wants_admin = {Need.NOTHING: False, Need.KEY: False, Need.ADMIN: has_admins}

    def admit(self, need: Need, authorization: bytes | None, tenant: str) -> str:
        """The tenant that a caller acts for who asks to act for `tenant` ("": names none).

        Raises UnauthenticatedError, and PermissionDeniedError for what a key is not for.
        """
        if not self._is_checked[need]:
            return tenant
        caller = self._caller(authorization)
        if self._wants_admin[need] and not caller.is_admin:
            self._refuse("not_admin")
            raise PermissionDeniedError("this API key may not do that; an administrator's may")
        if caller.tenant is None or caller.tenant == tenant:
            return tenant
        if tenant:
            self._refuse("other_tenant")
            raise PermissionDeniedError("this API key is another tenant's")
        return caller.tenant

    def _caller(self, authorization: bytes | None) -> Caller:
        if authorization is None:
            self._refuse("missing")
            raise UnauthenticatedError("an API key is needed: Authorization: Bearer KEY")
        if authorization[: len(_SCHEME)].lower() == _SCHEME:
            key = authorization[len(_SCHEME) :].strip()
            caller = self._own.find(key)
            if caller is None and self._file is not None:
                caller = self._file().find(key)
            if caller is not None:
                return caller
        self._refuse("unknown")
        raise UnauthenticatedError("this API key is not known")

    def _refuse(self, reason: str) -> None:
        self._metrics.refused_keys.labels(reason).inc()
