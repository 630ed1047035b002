"""An API server that only keeps objects: enough for decisions, no stand-in for a real one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Awaitable, Callable, Mapping

from services.common.kubernetes_api import Json, KubernetesApi, KubernetesError


class FakeKubernetes(KubernetesApi):
    """Objects by path. Writes of an old resourceVersion are conflicts; `is_down` answers nobody.

    `calls` are those that changed something. `meanwhile` runs once, before the next of them.
    """

    def __init__(self) -> None:
        self.namespace = "test"
        self.objects: dict[str, Json] = {}
        self.calls: list[tuple[str, str, Json | None]] = []
        self.is_down = False
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self._versions = itertools.count(1)

    async def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        if self.is_down:
            raise KubernetesError(0, "it does not answer")
        if method != "GET":
            if self.meanwhile is not None:
                meanwhile, self.meanwhile = self.meanwhile, None
                await meanwhile()
            self.calls.append((method, path, copy.deepcopy(body)))
        if method == "POST":
            assert body is not None
            return self._create(f"{path}/{body['metadata'].get('name', 'generated')}", body)
        if path not in self.objects:
            raise KubernetesError(404, f"{path} is not there")
        if method == "PUT":
            assert body is not None
            return self._replace(path, body)
        if method == "DELETE":
            return self.objects.pop(path)
        return copy.deepcopy(self.objects[path])

    async def aclose(self) -> None:
        pass

    def _create(self, path: str, body: Json) -> Json:
        if path in self.objects:
            raise KubernetesError(409, "it is there")
        return self._store(path, body)

    def _replace(self, path: str, body: Json) -> Json:
        ours = self.objects[path]["metadata"]["resourceVersion"]
        if body["metadata"].get("resourceVersion") != ours:
            raise KubernetesError(409, "it was changed meanwhile")
        return self._store(path, body)

    def _store(self, path: str, body: Json) -> Json:
        stored = copy.deepcopy(body)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[path] = stored
        return copy.deepcopy(stored)
