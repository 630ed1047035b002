"""A lease kept by Kubernetes, as an object of `coordination.k8s.io/v1`."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from services.common.kubernetes_api import Json, KubernetesApi, KubernetesError
from services.common.lease import LeaseUnknownError

logger = logging.getLogger(__name__)

DURATION_S = 10.0
_RENEW_INTERVAL_S = 2.0
_NOT_FOUND, _CONFLICT = 404, 409
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class KubernetesLease:
    """A `Lease` (services/common/lease.py). Its term is when the holder took it, in microseconds.

    Writes carry the resourceVersion that was read, so of two that see it free one gets it. Nobody's
    clock is compared with another's: a lease is over when it was seen unchanged for its duration.
    Only terms come from clocks, and a new one is above the one before in any case.
    """

    def __init__(
        self,
        api: KubernetesApi,
        name: str,
        *,
        duration_s: float = DURATION_S,
        renew_interval_s: float = _RENEW_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """The connection is the caller's to close."""
        self.duration_s = duration_s
        self.renew_interval_s = renew_interval_s
        # A pod's name first, for those who list leases.
        self.holder = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._api = api
        self._name = name
        self._clock = clock
        self._wall_clock = wall_clock
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{api.namespace}/leases"
        self._path = f"{self._collection}/{name}"
        # The last state of another's lease, and when it was first seen.
        self._seen: tuple[object, float] | None = None
        self._is_known: bool | None = None

    async def claim(self) -> int:
        try:
            term = await self._claim()
        except KubernetesError as error:
            self._note(error)
            raise LeaseUnknownError(str(error)) from error
        self._note(None)
        return term

    async def release(self) -> None:
        try:
            lease = await self._api.call("GET", self._path)
            if lease["spec"].get("holderIdentity") == self.holder:
                lease["spec"]["holderIdentity"] = ""
                await self._api.call("PUT", self._path, lease)
        except KubernetesError as error:
            if error.status not in (_CONFLICT, _NOT_FOUND):
                raise LeaseUnknownError(str(error)) from error

    async def check(self) -> None:
        """Nobody shows whether the API server answers, so it is not asked."""

    async def _claim(self) -> int:
        try:
            lease = await self._api.call("GET", self._path)
        except KubernetesError as error:
            if error.status != _NOT_FOUND:
                raise
            return await self._write("POST", self._collection, self._new())
        spec = lease.setdefault("spec", {})
        now = self._now()
        if spec.get("holderIdentity") == self.holder:
            spec["renewTime"] = _to_text(now)
            return await self._write("PUT", self._path, lease)
        if not self._is_over(spec):
            return 0
        # Above the last holder's, whatever this host's clock says.
        last = _from_text(spec["acquireTime"]) if spec.get("acquireTime") else 0
        spec.update(
            holderIdentity=self.holder,
            leaseDurationSeconds=max(1, round(self.duration_s)),
            acquireTime=_to_text(max(now, last + 1)),
            renewTime=_to_text(now),
            leaseTransitions=spec.get("leaseTransitions", 0) + 1,
        )
        return await self._write("PUT", self._path, lease)

    async def _write(self, method: str, path: str, lease: Json) -> int:
        try:
            written = await self._api.call(method, path, lease)
        except KubernetesError as error:
            if error.status == _CONFLICT:
                # Somebody else wrote since it was read.
                return 0
            raise
        return _from_text(written["spec"]["acquireTime"])

    def _is_over(self, spec: dict[str, Any]) -> bool:
        """Whether nobody holds it: given back, or not renewed while this replica looked."""
        if not spec.get("holderIdentity"):
            return True
        state = spec.get("holderIdentity"), spec.get("renewTime")
        if self._seen is None or self._seen[0] != state:
            self._seen = state, self._clock()
        duration_s = float(spec.get("leaseDurationSeconds", self.duration_s))
        return self._clock() - self._seen[1] > duration_s

    def _new(self) -> Json:
        now = _to_text(self._now())
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": {
                "holderIdentity": self.holder,
                "leaseDurationSeconds": max(1, round(self.duration_s)),
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": 0,
            },
        }

    def _now(self) -> int:
        return round(self._wall_clock() * 1e6)

    def _note(self, error: KubernetesError | None) -> None:
        """Say when the API server stops or begins to answer."""
        if self._is_known is not False and error is not None:
            logger.warning(
                "event=lease_unknown lease=%s status=%d detail=%r",
                *(self._name, error.status, str(error)),
            )
        elif self._is_known is False and error is None:
            logger.info("event=lease_known lease=%s", self._name)
        self._is_known = error is None


def _to_text(microseconds: int) -> str:
    """Kubernetes' MicroTime."""
    moment = _EPOCH + timedelta(microseconds=microseconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _from_text(text: str) -> int:
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)
