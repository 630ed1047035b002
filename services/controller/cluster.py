"""What the controller does to a cluster: deletes pods, sets replicas, writes events."""

from __future__ import annotations

import logging
import secrets
import time
from datetime import UTC, datetime

from services.common.kubernetes_api import Json, KubernetesApi, KubernetesError
from services.controller.metrics import ControllerMetrics
from services.controller.records import Pod, WorkerSet, is_ready

logger = logging.getLogger(__name__)

_NOT_FOUND, _CONFLICT = 404, 409
_COMPONENT = "rhizome-controller"


class Cluster:
    """Calls that change something. None raises for what the API server refuses or misses: it is
    logged and counted, and whoever decides sees that nothing changed and decides again."""

    def __init__(self, api: KubernetesApi, metrics: ControllerMetrics, instance: str) -> None:
        self._api = api
        self._metrics = metrics
        self._instance = instance

    async def delete_pod(self, pod: Pod, *, by_force: bool = False) -> bool:
        """This pod, not one of the same name that came after it. True once it is gone or going."""
        body: Json = {"preconditions": {"uid": pod.uid}}
        if by_force:
            body["gracePeriodSeconds"] = 0
        path = f"/api/v1/namespaces/{self._api.namespace}/pods/{pod.name}"
        # Another uid is a conflict.
        return await self._change("DELETE", path, body, fine=(_NOT_FOUND, _CONFLICT))

    async def scale(self, worker_set: WorkerSet, replicas: int) -> bool:
        """Set the replicas, unless somebody changed the StatefulSet since it was seen."""
        path = (
            f"/apis/apps/v1/namespaces/{self._api.namespace}/statefulsets/{worker_set.name}/scale"
        )
        body = {
            "metadata": {"resourceVersion": worker_set.resource_version},
            "spec": {"replicas": replicas},
        }
        return await self._change("PATCH", path, body, "application/merge-patch+json")

    async def is_node_ready(self, name: str) -> bool:
        """Also true while nobody knows."""
        try:
            node = await self._api.call("GET", f"/api/v1/nodes/{name}")
        except KubernetesError as error:
            if error.status == _NOT_FOUND:
                return False
            self._note(error, f"nodes/{name}")
            return True
        return is_ready(node.get("status", {}))

    async def tell(self, worker_set: WorkerSet, reason: str, message: str, *, warn: bool) -> None:
        """An event on a StatefulSet, for those who describe it."""
        namespace = self._api.namespace
        now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        event = {
            "metadata": {
                "name": f"{worker_set.name}.{secrets.token_hex(8)}",
                "namespace": namespace,
            },
            "involvedObject": {
                "apiVersion": "apps/v1",
                "kind": "StatefulSet",
                "name": worker_set.name,
                "namespace": namespace,
                "uid": worker_set.uid,
            },
            "reason": reason,
            "message": message[:1024],
            "type": "Warning" if warn else "Normal",
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": _COMPONENT},
            "reportingComponent": _COMPONENT,
            "reportingInstance": self._instance,
        }
        await self._change("POST", f"/api/v1/namespaces/{namespace}/events", event)

    async def _change(
        self,
        method: str,
        path: str,
        body: Json,
        content_type: str = "application/json",
        fine: tuple[int, ...] = (),
    ) -> bool:
        try:
            await self._api.call(method, path, body, content_type=content_type)
        except KubernetesError as error:
            if error.status in fine:
                return True
            self._note(error, path)
            return False
        return True

    def _note(self, error: KubernetesError, path: str) -> None:
        self._metrics.kubernetes_failures.inc()
        logger.warning(
            "event=kubernetes_refused path=%s status=%d detail=%r", path, error.status, str(error)
        )
