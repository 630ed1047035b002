"""Keeps a copy of the release's pods and StatefulSets, as the API server tells of changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from services.common.kubernetes_api import Json, KubernetesApi, KubernetesError
from services.common.process import background
from services.controller.records import (
    Pod,
    Snapshot,
    WorkerSet,
    read_pod,
    read_set,
    worker_selector,
)

logger = logging.getLogger(__name__)

_Record = TypeVar("_Record", bound=Pod | WorkerSet)

# The server ends a watch after so long, and it is opened again.
_WATCH_S = 60
_RETRY_S = 1.0
_PAUSE_S = 0.1


class _Collection(Generic[_Record]):
    """One kind of object: listed once, then watched from there; None before the first list."""

    def __init__(
        self,
        api: KubernetesApi,
        path: str,
        selector: str,
        read: Callable[[Json], _Record | None],
        on_change: Callable[[], None],
    ) -> None:
        self.records: dict[str, _Record] | None = None
        self._api = api
        self._path = path
        self._query = {"labelSelector": selector}
        self._read = read
        self._on_change = on_change
        self._version = ""

    async def follow(self) -> None:
        """For ever."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                # A server that ends it at once is not asked at once.
                await asyncio.sleep(_PAUSE_S)
            except KubernetesError as error:
                # What was missed meanwhile is in a new list.
                self._version = ""
                if error.status != 410:
                    logger.warning(
                        "event=kubernetes_not_followed path=%s status=%d detail=%r",
                        *(self._path, error.status, str(error)),
                    )
                    await asyncio.sleep(_RETRY_S)
            except Exception:
                self._version = ""
                logger.exception("event=follow_failed path=%s", self._path)
                await asyncio.sleep(_RETRY_S)

    async def _list(self) -> None:
        listed = await self._api.call("GET", self._path, query=self._query)
        records: dict[str, _Record] = {}
        for item in listed.get("items") or ():
            self._take(records, item)
        self.records = records
        self._version = listed["metadata"]["resourceVersion"]
        self._on_change()

    async def _watch(self) -> None:
        assert self.records is not None, "it was listed"
        query = {**self._query, "resourceVersion": self._version, "allowWatchBookmarks": "true"}
        async with contextlib.aclosing(
            self._api.watch(self._path, query, timeout_s=_WATCH_S)
        ) as events:
            async for event in events:
                item = event["object"]
                self._version = item["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                if event["type"] == "DELETED":
                    self.records.pop(item["metadata"]["name"], None)
                else:
                    self._take(self.records, item)
                self._on_change()

    def _take(self, records: dict[str, _Record], item: Json) -> None:
        name = item["metadata"]["name"]
        try:
            record = self._read(item)
        except ValueError as error:
            logger.warning("event=object_not_understood name=%s detail=%r", name, str(error))
            record = None
        if record is None:
            records.pop(name, None)
        else:
            records[name] = record


class Follower:
    """Pods and StatefulSets of one release's workers; `changed` is set after every change."""

    def __init__(self, api: KubernetesApi, release: str) -> None:
        self.changed = asyncio.Event()
        selector = worker_selector(release)
        notify = self.changed.set
        core = f"/api/v1/namespaces/{api.namespace}"
        apps = f"/apis/apps/v1/namespaces/{api.namespace}"
        self._pods = _Collection(api, f"{core}/pods", selector, read_pod, notify)
        self._sets = _Collection(api, f"{apps}/statefulsets", selector, read_set, notify)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Until the block ends."""
        async with background(*(each.follow() for each in (self._pods, self._sets))):
            yield

    @property
    def snapshot(self) -> Snapshot | None:
        """What is known now; None before both were listed."""
        pods, sets = self._pods.records, self._sets.records
        return None if pods is None or sets is None else Snapshot(dict(sets), dict(pods))
