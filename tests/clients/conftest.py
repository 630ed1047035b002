"""The clients' examples, built once, and the systems that they call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.clients.languages import LANGUAGES, Language
from tests.e2e.system import System, free_port, running_system


@dataclass(frozen=True)
class Watched:
    """A running system and what its services count."""

    system: System
    # Of the scheduler, and from there on those of the others.
    metrics_port: int

    @property
    def target(self) -> str:
        return f"localhost:{self.system.port + 1}"

    def worker_metric(self, name: str) -> float:
        return _metric(f"http://127.0.0.1:{self.metrics_port + 3}", f"rhizome_worker_{name}")

    def gateway_metric(self, name: str) -> float:
        return _metric(self.system.url, f"rhizome_gateway_{name}")


def _metric(url: str, name: str) -> float:
    """A metric's value, over all its labels."""
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    values = [line.split()[-1] for line in lines if line.split(" ")[0].split("{")[0] == name]
    return sum(map(float, values))


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
    with watched_system() as watched:
        yield watched


@contextlib.contextmanager
def watched_system(*flags: str) -> Iterator[Watched]:
    metrics_port = free_port(4)
    with running_system("--metrics-port", str(metrics_port), *flags) as system:
        yield Watched(system, metrics_port)
