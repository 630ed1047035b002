"""The whole system with certificates everywhere and API keys, from its client to its worker."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from openai import AuthenticationError, DefaultHttpxClient, InternalServerError, OpenAI

from rhizome.inference.v1.inference_service_pb2 import ListModelsRequest
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.secure_system import SERVER_NAME, SecureSystem, secure_system
from tests.e2e.system import running_system
from tests.fakes.certificates import Authority, Issued, TlsFiles, files_of

AUTHORITY = Authority()
SERVICES = ("scheduler", "cache_index", "tokenizer", "worker", "gateway")
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
KEY = "a-clients-key"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secure")


@pytest.fixture(scope="module")
def edge(directory: Path) -> TlsFiles:
    return files_of(directory / "edge", Authority("the clients' CA"))


@pytest.fixture(scope="module")
def files(directory: Path) -> dict[str, TlsFiles]:
    return {
        service: files_of(directory / service, AUTHORITY, issued(AUTHORITY, service))
        for service in SERVICES
    }


@pytest.fixture(scope="module")
def keys(directory: Path) -> Path:
    path = directory / "keys.json"
    write_keys(path, KEY)
    return path


@pytest.fixture(scope="module")
def system(
    directory: Path, files: dict[str, TlsFiles], edge: TlsFiles, keys: Path
) -> Iterator[SecureSystem]:
    flags = ("--ssl-certfile", str(edge.cert), "--ssl-keyfile", str(edge.key))
    with secure_system(
        directory,
        files,
        *flags,
        *("--api-keys", str(keys)),
        RHIZOME__GATEWAY__ADMIN_API_KEY="admins",
    ) as system:
        yield system


def issued(authority: Authority, service: str, days: float = 30) -> Issued:
    # One name for all: they are called by addresses that no certificate has.
    return authority.issue(service, dns_names=[SERVER_NAME], days=days)


def write_keys(path: Path, *keys: str) -> None:
    entries = [
        {"name": f"key {i}", "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for i, key in enumerate(keys)
    ]
    path.write_text(json.dumps(entries))


def trusting(edge: TlsFiles) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(edge.ca))


def client(system: SecureSystem, edge: TlsFiles, key: str = KEY) -> OpenAI:
    return OpenAI(
        base_url=f"https://localhost:{system.port('gateway')}/v1",
        api_key=key,
        max_retries=0,
        http_client=DefaultHttpxClient(verify=trusting(edge), timeout=60),
    )


def expiry_s(system: SecureSystem, service: str, edge: TlsFiles) -> float:
    """When the certificate ends that a service shows the others, as its metrics say."""
    url, context = f"http://localhost:{system.port(service, 'metrics')}/metrics", None
    if service == "gateway":
        url, context = f"https://localhost:{system.port(service)}/metrics", trusting(edge)
    with urllib.request.urlopen(url, context=context, timeout=10) as response:
        text = response.read().decode()
    name = "rhizome_tls_certificate_expiry_timestamp_seconds"
    found = re.search(rf'^{name}{{certificate="services"}} (\S+)$', text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def replace_certificates(
    system: SecureSystem,
    files: dict[str, TlsFiles],
    edge: TlsFiles,
    authority: Authority,
    *trusted: Authority,
    days: float,
) -> None:
    """Give every service a certificate of `authority`, and wait until all have it."""
    certificates = b"".join(each.certificate for each in trusted)
    ends: dict[str, float] = {}
    for service in SERVICES:
        pair = issued(authority, service, days)
        ends[service] = pair.expires_s
        files[service].write(pair, certificates)
    wait_for(lambda: all(expiry_s(system, each, edge) == ends[each] for each in SERVICES))


def ask(openai: OpenAI, **options: Any) -> str:
    answer = openai.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, **options
    )
    return answer.choices[0].message.content or ""


def test_a_chat_goes_over_tls_with_a_key(system: SecureSystem, edge: TlsFiles) -> None:
    with client(system, edge) as openai:
        assert "Paris" in ask(openai)
    with client(system, edge, "another key") as stranger, pytest.raises(AuthenticationError):
        ask(stranger)


def test_the_index_hears_the_workers_over_tls(system: SecureSystem, edge: TlsFiles) -> None:
    url = f"http://localhost:{system.port('cache_index', 'metrics')}/metrics"

    def follows() -> bool:
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        return bool(re.search(r"^rhizome_cache_index_following{.*} 1\.0$", text, re.MULTILINE))

    wait_for(follows)


def test_the_public_grpc_api_speaks_tls_and_wants_a_key(
    system: SecureSystem, edge: TlsFiles
) -> None:
    credentials = grpc.ssl_channel_credentials(edge.ca.read_bytes())
    target = f"localhost:{system.port('gateway', 'grpc')}"
    with grpc.secure_channel(target, credentials) as channel:
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListModels(ListModelsRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {KEY}"),)
        assert stub.ListModels(ListModelsRequest(), timeout=10, metadata=metadata).models


def test_an_administrators_key_flushes_the_cache(system: SecureSystem, edge: TlsFiles) -> None:
    for key, status in ((KEY, 403), ("admins", 200)):
        with client(system, edge, key) as openai:
            url = f"https://localhost:{system.port('gateway')}/flush_cache"
            headers = {"authorization": f"Bearer {key}"}
            answer = openai._client.post(url, headers=headers)
            assert answer.status_code == status


def test_keys_are_replaced_without_a_restart(
    system: SecureSystem, edge: TlsFiles, keys: Path
) -> None:
    write_keys(keys, KEY, "a-new-key")

    def opens() -> bool:
        with client(system, edge, "a-new-key") as openai:
            try:
                return bool(openai.models.list().data)
            except AuthenticationError:
                return False

    wait_for(opens)


def test_new_certificates_and_a_new_authority_fail_no_request(
    system: SecureSystem, files: dict[str, TlsFiles], edge: TlsFiles
) -> None:
    newer = Authority("the next CA")
    finishes: list[str | None] = []
    over = threading.Event()

    def stream_on() -> None:
        with client(system, edge) as openai:
            while not over.is_set():
                chunks = openai.chat.completions.create(
                    model="default",
                    messages=QUESTION,
                    stream=True,
                    max_tokens=400,
                    extra_body={"ignore_eos": True},
                )
                last = [choice for chunk in chunks for choice in chunk.choices][-1]
                finishes.append(last.finish_reason)

    with ThreadPoolExecutor(2) as pool:
        streaming = [pool.submit(stream_on) for _ in range(2)]
        replace_certificates(system, files, edge, AUTHORITY, AUTHORITY, newer, days=40)
        replace_certificates(system, files, edge, newer, AUTHORITY, newer, days=50)
        replace_certificates(system, files, edge, newer, newer, days=60)
        over.set()
        for each in streaming:
            each.result(60)
    assert set(finishes) == {"length"}
    url = f"https://localhost:{system.port('gateway')}/metrics"
    with urllib.request.urlopen(url, context=trusting(edge), timeout=10) as response:
        assert b"\nrhizome_gateway_migrations_total 0.0" in response.read()
    # Who starts again meets the others with the new authority alone.
    system.restart("tokenizer")
    system.restart("worker")
    with client(system, edge) as openai:
        wait_for(lambda: answers(openai))


def answers(openai: OpenAI) -> bool:
    try:
        return "Paris" in ask(openai)
    except InternalServerError:
        return False


def test_nobody_logged_a_key(system: SecureSystem) -> None:
    for service in SERVICES:
        log = system.log(service)
        assert "PRIVATE KEY" not in log
        assert KEY not in log
        assert "a-new-key" not in log
        assert "Traceback" not in log


def test_rhizome_serve_speaks_https_and_asks_for_a_key(
    edge: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHIZOME__SERVE__API_KEY", KEY)
    # Between its services it needs no certificates, but takes them.
    own = files_of(tmp_path, AUTHORITY)
    flags = (
        *("--ssl-certfile", str(edge.cert), "--ssl-keyfile", str(edge.key)),
        *("--tls-cert-file", str(own.cert), "--tls-key-file", str(own.key)),
        *("--tls-ca-file", str(own.ca)),
    )
    with running_system(*flags) as system:
        url = f"https://127.0.0.1:{system.port}/v1"
        assert any(f"Rhizome is ready: {url.removesuffix('/v1')}" in line for line in system.log)
        with DefaultHttpxClient(verify=trusting(edge), timeout=60) as http:
            with OpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=http) as openai:
                assert "Paris" in ask(openai)
                with pytest.raises(AuthenticationError):
                    ask(openai.with_options(api_key="another"))
        command_lines = [
            " ".join(child.cmdline()) for child in psutil.Process(system.process.pid).children()
        ]
        assert len(command_lines) > 4
        assert not any(KEY in line for line in command_lines)
        assert not any(KEY in line for line in system.log)
