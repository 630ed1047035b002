"""Calls to a Kubernetes API server, in JSON as it is; connection and credentials are the official
client's.

Its models are not used: they refuse answers of servers whose fields they do not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient, ApiException, Configuration

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_S = 5.0

Json = dict[str, Any]


class KubernetesError(Exception):
    """The API server did not answer (`status` 0), or refused with this HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KubernetesApi:
    """Owns the connections to one API server; `namespace` is the one that is worked in."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._client = client

    async def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        """What the server answers to `path`, such as `/api/v1/namespaces/x/pods`.

        Raises KubernetesError, after 5 s at the latest.
        """
        async with _errors_mapped(), asyncio.timeout(_TIMEOUT_S):
            response = await self._open(method, path, body, query, content_type, _TIMEOUT_S)
            data = await response.read()
        return _parse(data)

    async def watch(
        self, path: str, query: Mapping[str, str], *, timeout_s: int
    ) -> AsyncGenerator[Json, None]:
        """Events `{"type": ..., "object": ...}` until the server or `timeout_s` ends the call.

        Raises KubernetesError, also for an event that is an error (410: too old to go on from).
        """
        query = {**query, "watch": "true", "timeoutSeconds": str(timeout_s)}
        async with _errors_mapped():
            response = await self._open("GET", path, None, query, "", timeout_s + _TIMEOUT_S)
            try:
                async for line in response.response.content:
                    event = _parse(line)
                    if event.get("type") == "ERROR":
                        status = event.get("object", {})
                        raise KubernetesError(status.get("code", 0), status.get("message", ""))
                    yield event
            finally:
                response.response.close()

    async def aclose(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    async def _open(
        self,
        method: str,
        path: str,
        body: Json | None,
        query: Mapping[str, str] | None,
        content_type: str,
        timeout_s: float,
    ) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        request = await self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        # A single number is the whole call's limit.
        response: Any = await self._client.call_api(
            *request, _request_timeout=aiohttp.ClientTimeout(total=timeout_s)
        )
        if not 200 <= response.status < 300:
            status = _parse(await response.read())
            raise KubernetesError(response.status, str(status.get("message", response.reason)))
        return response


async def open_kubernetes(kubeconfig: Path | None) -> KubernetesApi:
    """Connect when first asked: as the pod's service account, or as a kubeconfig file has it.

    Raises ValueError, naming what is wrong.
    """
    settings = Configuration()
    settings.retries = False
    try:
        if kubeconfig is None:
            kubernetes_config.load_incluster_config(settings)  # type: ignore[no-untyped-call]
            namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        else:
            loader = await kubernetes_config.load_kube_config(  # type: ignore[no-untyped-call]
                str(kubeconfig), client_configuration=settings, persist_config=False
            )
            namespace = loader.current_context["context"].get("namespace") or "default"
        client = ApiClient(settings)
    except Exception as error:
        # The loader raises whatever a file that is none of its own leads to.
        where = "this pod's service account" if kubeconfig is None else str(kubeconfig)
        raise ValueError(f"cannot reach Kubernetes as {where} says: {error}") from error
    return KubernetesApi(client, namespace)


@contextlib.asynccontextmanager
async def _errors_mapped() -> AsyncIterator[None]:
    try:
        yield
    except ApiException as error:
        raise KubernetesError(error.status or 0, str(error.reason)) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise KubernetesError(0, f"{type(error).__name__}: {error}") from error


def _parse(data: bytes) -> Json:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise KubernetesError(0, f"the answer is not JSON: {data[:100]!r}") from error
    if not isinstance(parsed, dict):
        raise KubernetesError(0, f"the answer is no object: {data[:100]!r}")
    return parsed
