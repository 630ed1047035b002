"""The gateway's edge: API keys over HTTP and gRPC, TLS, and files that change."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc import aio
from openai import APIStatusError, AsyncOpenAI

from rhizome.inference.v1.inference_service_pb2 import (
    EmbedRequest,
    GenerateRequest,
    ListModelsRequest,
)
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.edge_flags import EdgeFlags
from services.common.errors import UnauthenticatedError
from services.common.rpc import open_channel
from services.gateway.access import Need
from services.gateway.config import GatewayConfig
from services.gateway.edge import following_edge
from services.gateway.gateway import running_gateway
from services.gateway.metrics import GatewayMetrics
from tests.fakes.certificates import Authority, TlsFiles, files_of
from tests.fakes.gateway_stack import GatewayStack, gateway_stack, until
from tests.fakes.peers import LOOK_S, shown_expiry_s

AUTHORITY = Authority()
CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


def entry(name: str, key: str, **more: object) -> dict[str, object]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    entries = [entry("a", "key-a", tenant="tenant-a"), entry("any", "key-any")]
    path.write_text(json.dumps([*entries, entry("ops", "key-ops", admin=True)]))
    return path


@pytest.fixture
async def stack(keys_file: Path) -> AsyncIterator[GatewayStack]:
    async with gateway_stack(edge=EdgeFlags(api_keys=keys_file)) as stack:
        yield stack


def client(stack: GatewayStack, key: str | None = None, **headers: str) -> httpx.AsyncClient:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=20)


def tenants(stack: GatewayStack) -> list[str]:
    """Of the requests that reached the worker, in their order."""
    return [submit.tenant for submit in stack.workers[0].submits]


async def test_pain_25_h_every_endpoint_but_health_and_metrics_wants_a_key(
    stack: GatewayStack,
) -> None:
    async with client(stack) as http:
        for path in ("/health", "/health_generate", "/metrics"):
            assert (await http.get(path)).status_code == 200
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("POST", "/generate"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/scripted"),
            ("GET", "/get_model_info"),
            ("GET", "/model_info"),
            ("GET", "/get_server_info"),
            ("GET", "/server_info"),
            ("POST", "/flush_cache"),
            ("POST", "/start_profile"),
            ("POST", "/stop_profile"),
        ):
            answer = await http.request(method, path, json=CHAT)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_openai_clients_send_their_key(stack: GatewayStack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="key-any") as openai:
        answer = await openai.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="wrong", max_retries=0) as openai:
        with pytest.raises(APIStatusError) as refused:
            await openai.chat.completions.create(**CHAT)
        assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")


async def test_endpoints_that_change_state_want_an_administrators_key(
    stack: GatewayStack,
) -> None:
    async with client(stack, "key-any") as http:
        for path in ("/flush_cache", "/start_profile", "/stop_profile"):
            answer = await http.post(path)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "permission_denied"
    async with client(stack, "key-ops") as http:
        assert (await http.post("/flush_cache")).status_code == 200


async def test_a_keys_tenant_is_the_requests(stack: GatewayStack) -> None:
    async with client(stack, "key-a") as http:
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert tenants(stack)[-1] == "tenant-a"
    async with client(stack, "key-any", **{"x-tenant-id": "tenant-b"}) as http:
        assert (await http.post("/generate", json={"text": "Hi"})).status_code == 200
    assert tenants(stack)[-1] == "tenant-b"
    async with client(stack, "key-a", **{"x-tenant-id": "tenant-b"}) as http:
        for path, body in (("/v1/chat/completions", CHAT), ("/generate", {"text": "Hi"})):
            assert (await http.post(path, json=body)).status_code == 403
    assert tenants(stack).count("tenant-b") == 1


async def test_pain_25_h_grpc_wants_the_same_keys(stack: GatewayStack) -> None:
    async with open_channel(stack.grpc_address) as channel:
        stub: Any = InferenceServiceStub(channel)

        async def code(call: Any) -> grpc.StatusCode:
            if hasattr(call, "read"):
                async for _ in call:
                    pass
            status: grpc.StatusCode = await call.code()
            return status

        async def generate(*metadata: tuple[str, str]) -> grpc.StatusCode:
            request = GenerateRequest(model="scripted", text="Hi")
            try:
                return await code(stub.Generate(request, metadata=metadata))
            except aio.AioRpcError as error:
                return error.code()

        assert await generate() is grpc.StatusCode.UNAUTHENTICATED
        assert await generate(("authorization", "Bearer no")) is grpc.StatusCode.UNAUTHENTICATED
        key_a = ("authorization", "Bearer key-a")
        assert await generate(key_a) is grpc.StatusCode.OK
        assert tenants(stack)[-1] == "tenant-a"
        refused = await generate(key_a, ("x-tenant-id", "tenant-b"))
        assert refused is grpc.StatusCode.PERMISSION_DENIED
        unauthenticated = grpc.StatusCode.UNAUTHENTICATED
        assert await code(stub.ListModels(ListModelsRequest())) is unauthenticated
        assert await code(stub.Embed(EmbedRequest())) is unauthenticated
        assert await code(stub.ListModels(ListModelsRequest(), metadata=[key_a])) is (
            grpc.StatusCode.OK
        )


async def test_keys_are_in_no_log_line_and_no_metric(
    stack: GatewayStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for key in ("key-a", "key-wrong"):
        async with client(stack, key) as http:
            await http.post("/v1/chat/completions", json=CHAT)
            await http.post("/flush_cache")
            text = (await http.get("/metrics")).text
    assert "event=request_refused" in caplog.text
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("services")]
    assert not any("key-a" in line or "key-wrong" in line for line in ours)
    assert 'rhizome_gateway_refused_keys_total{reason="unknown"}' in text
    assert "key-a" not in text


async def test_a_file_of_keys_is_followed_and_a_broken_one_changes_nothing(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with following_edge(EdgeFlags(api_keys=keys_file), GatewayMetrics(), LOOK_S) as edge:

        def opens(key: str) -> bool:
            try:
                edge.access.admit(Need.KEY, f"Bearer {key}".encode(), "")
            except UnauthenticatedError:
                return False
            return True

        assert opens("key-a")
        keys_file.write_text(json.dumps([entry("new", "key-new")]))
        await until(lambda: opens("key-new"))
        assert not opens("key-a")
        keys_file.write_text('[{"name": "half')
        await until(lambda: "files_refused" in caplog.text)
        assert opens("key-new")
        keys_file.unlink()
        await until(lambda: "cannot read" in caplog.text)
        assert opens("key-new")
        keys_file.write_text("[]")
        await until(lambda: not opens("key-new"))


async def test_a_bad_file_of_keys_ends_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{}")
    config = GatewayConfig(
        schedulers=("x",), tokenizers=("x",), port=0, edge=EdgeFlags(api_keys=path)
    )
    with pytest.raises(ValueError, match=f"{path}: the keys must be a list"):
        async with running_gateway(config):
            pass


@pytest.fixture
def edge_files(tmp_path: Path) -> TlsFiles:
    return files_of(tmp_path / "edge", AUTHORITY)


def ssl_flags(files: TlsFiles) -> EdgeFlags:
    return EdgeFlags(ssl_certfile=files.cert, ssl_keyfile=files.key)


def trusting(files: TlsFiles) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(files.ca))


async def test_http_and_grpc_speak_tls(edge_files: TlsFiles) -> None:
    async with gateway_stack(edge=ssl_flags(edge_files)) as stack:
        port = stack.url.rpartition(":")[2]
        # By name and by address: clients send no name for the latter.
        for host in ("localhost", "127.0.0.1"):
            async with httpx.AsyncClient(verify=trusting(edge_files)) as http:
                async with http.stream(
                    "POST",
                    f"https://{host}:{port}/v1/chat/completions",
                    json={**CHAT, "stream": True},
                ) as answer:
                    lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 5
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.RemoteProtocolError):
                await http.get(f"{stack.url}/health")
        credentials = grpc.ssl_channel_credentials(AUTHORITY.certificate)
        async with aio.secure_channel(stack.grpc_address, credentials) as channel:
            stub: Any = InferenceServiceStub(channel)
            models = await stub.ListModels(ListModelsRequest(), timeout=10)
            assert [model.name for model in models.models] == ["scripted"]
        async with open_channel(stack.grpc_address) as channel:
            with pytest.raises(aio.AioRpcError):
                await InferenceServiceStub(channel).ListModels(ListModelsRequest(), timeout=10)


async def test_new_connections_see_a_new_certificate(edge_files: TlsFiles) -> None:
    async with gateway_stack(edge=ssl_flags(edge_files)) as stack:
        ports = [int(address.rpartition(":")[2]) for address in (stack.url, stack.grpc_address)]
        async with httpx.AsyncClient(verify=trusting(edge_files)) as old:
            url = f"https://localhost:{ports[0]}/health"
            assert (await old.get(url)).status_code == 200
            # Of another type of key: nothing of the old pair may be left.
            newer = AUTHORITY.issue(days=90, rsa=True)
            edge_files.write(newer, AUTHORITY.certificate)
            async with asyncio.timeout(20):
                for port in ports:
                    while await shown_expiry_s(port) != newer.expires_s:
                        await asyncio.sleep(0.1)
            # The connection that was there goes on.
            assert (await old.get(url)).status_code == 200
            expiry = "rhizome_tls_certificate_expiry_timestamp_seconds"
            labels = {"certificate": "edge"}
            registry = stack.pipeline.metrics.registry
            assert registry.get_sample_value(expiry, labels) == newer.expires_s
        async with httpx.AsyncClient(verify=trusting(edge_files)) as fresh:
            assert (await fresh.get(url)).status_code == 200
