"""The clients' examples, built once, and the systems that they call."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from tests.clients.languages import LANGUAGES, Language
from tests.e2e.system import free_port, running_system
from tests.fakes.certificates import Authority, TlsFiles, files_of

API_KEY = "a-clients-key"


@dataclass(frozen=True)
class Watched:
    """A running system, what its services count, and how clients reach it."""

    port: int
    # Of the scheduler, and from there on those of the others.
    metrics_port: int
    # With TLS and a key where there are files.
    edge: TlsFiles | None = None

    @property
    def grpc_port(self) -> int:
        return self.port + 1

    def arguments(self, grpc_port: int | None = None) -> list[str]:
        """What the examples are given to reach it, maybe by another port."""
        target = ["--target", f"localhost:{grpc_port or self.grpc_port}"]
        if self.edge is None:
            return target
        return [*target, "--ca", str(self.edge.ca), "--api-key", API_KEY]

    def channel(self) -> grpc.Channel:
        """What the Python client has to reach it."""
        target = f"localhost:{self.grpc_port}"
        if self.edge is None:
            return grpc.insecure_channel(target)
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(self.edge.ca.read_bytes()),
            grpc.access_token_call_credentials(API_KEY),
        )
        return grpc.secure_channel(target, credentials)

    def worker_metric(self, name: str) -> float:
        url = f"http://127.0.0.1:{self.metrics_port + 3}"
        return _sum(httpx.get(f"{url}/metrics"), f"rhizome_worker_{name}")

    def gateway_metric(self, name: str) -> float:
        url = f"http://localhost:{self.port}/metrics"
        if self.edge is None:
            return _sum(httpx.get(url), f"rhizome_gateway_{name}")
        context = ssl.create_default_context(cafile=str(self.edge.ca))
        answer = httpx.get(url.replace("http:", "https:"), verify=context)
        return _sum(answer, f"rhizome_gateway_{name}")


def _sum(metrics: httpx.Response, name: str) -> float:
    """A metric's value, over all its labels."""
    lines = metrics.raise_for_status().text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.split(" ")[0].split("{")[0] == name
    )


@pytest.fixture(scope="session", params=LANGUAGES, ids=lambda language: language.name)
def language(request: pytest.FixtureRequest) -> Language:
    """Each language whose tools are here, its client and examples built."""
    language: Language = request.param
    if (reason := language.missing()) is not None:
        pytest.skip(reason)
    language.compile()
    return language


@pytest.fixture(scope="session")
def plain() -> Iterator[Watched]:
    """A system without TLS and keys."""
    with _watched_system() as watched:
        yield watched


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A system with both."""
    edge = files_of(tmp_path_factory.mktemp("edge"), Authority("the clients' CA"))
    flags = ("--ssl-certfile", str(edge.cert), "--ssl-keyfile", str(edge.key))
    with _watched_system(*flags, "--api-key", API_KEY, edge=edge) as watched:
        yield watched


@pytest.fixture(params=["plain", "secure"])
def system(request: pytest.FixtureRequest) -> Watched:
    """Both."""
    watched: Watched = request.getfixturevalue(request.param)
    return watched


@contextlib.contextmanager
def _watched_system(*flags: str, edge: TlsFiles | None = None) -> Iterator[Watched]:
    metrics_port = free_port(4)
    with running_system("--metrics-port", str(metrics_port), *flags) as system:
        yield Watched(system.port, metrics_port, edge)


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """The certificate of an authority that signed nothing here."""
    return files_of(tmp_path / "stranger", Authority("a stranger")).ca
