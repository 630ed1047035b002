"""The whole system with certificates everywhere, from its client to its worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.e2e.secure_system import SERVER_NAME, SecureSystem, secure_system
from tests.fakes.certificates import Authority, TlsFiles, files_of

AUTHORITY = Authority()
SERVICES = ("scheduler", "cache_index", "tokenizer", "worker", "gateway")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    directory = tmp_path_factory.mktemp("certificates")
    return {
        service: files_of(
            directory / service, AUTHORITY, AUTHORITY.issue(service, dns_names=[SERVER_NAME])
        )
        for service in SERVICES
    }


@pytest.fixture(scope="module")
def system(
    files: dict[str, TlsFiles], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecureSystem]:
    with secure_system(tmp_path_factory.mktemp("logs"), files) as system:
        yield system


def test_a_chat_streams(system: SecureSystem) -> None:
    with OpenAI(
        base_url=f"http://127.0.0.1:{system.port('gateway')}/v1", api_key="x", timeout=60
    ) as client:
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
