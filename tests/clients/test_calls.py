"""Each client's examples against a running system."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rhizome.common.v1.chat_message_pb2 import ChatMessage
from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.inference.v1 import inference_service_pb2 as pb
from rhizome.inference.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from services.common.errors import OverloadedError
from services.common.rpc import running_server
from tests.clients.conftest import Watched
from tests.clients.held_connections import held_connections
from tests.clients.languages import Language

# The time of a cold build included, which the first test of a language waits for.
pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

# What the examples' long request asks for.
LONG_TOKENS = 3500


def python_answer(system: Watched) -> str:
    """What the Python client gets for the examples' question."""
    with system.channel() as channel:
        responses = InferenceServiceStub(channel).Generate(
            pb.GenerateRequest(
                chat=pb.ChatInput(
                    messages=[ChatMessage(role="user", content="What is the capital of France?")]
                ),
                sampling=SamplingParams(temperature=0, max_new_tokens=32),
            )
        )
        return "".join(response.text for response in responses)


def status_of(stderr: str) -> str:
    """The status that an example reports, however its language spells it."""
    return stderr.strip().split(":")[0].replace("_", "").upper()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.05)


def test_the_quickstart_prints_what_python_gets(language: Language, plain: Watched) -> None:
    run = language.run(language.quickstart, [f"localhost:{plain.grpc_port}"])
    assert run.stdout == python_answer(plain) + "\n", run.stderr
    assert "Paris" in run.stdout


def test_a_chat_prints_what_python_gets(language: Language, system: Watched) -> None:
    run = language.run(language.calls, [*system.arguments(), "chat"])
    assert run.returncode == 0, run.stderr
    assert run.stdout == python_answer(system) + "\n"


async def test_cancelling_frees_the_worker_while_the_connection_stays(
    language: Language, system: Watched
) -> None:
    before = system.gateway_metric("output_tokens_total")
    async with held_connections(system.grpc_port) as port:
        run = await asyncio.to_thread(
            language.run, language.calls, [*system.arguments(port), "cancel"]
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.endswith("\ncancelled; builtin goes on\n")
        await until(lambda: system.gateway_metric("inflight_prompts") == 0)
        await until(lambda: system.worker_metric("running_sequences") == 0)
    tokens = system.gateway_metric("output_tokens_total") - before
    assert 5 <= tokens < LONG_TOKENS, "it was not cancelled but came to its end"


async def test_a_deadline_ends_the_call(language: Language, system: Watched) -> None:
    run = await asyncio.to_thread(language.run, language.calls, [*system.arguments(), "deadline"])
    assert (run.returncode, status_of(run.stderr)) == (1, "DEADLINEEXCEEDED"), run.stderr
    await until(lambda: system.worker_metric("running_sequences") == 0)


def test_a_wrong_parameter_is_named(language: Language, system: Watched) -> None:
    run = language.run(language.calls, [*system.arguments(), "error"])
    assert (run.returncode, run.stdout) == (1, "")
    assert status_of(run.stderr) == "INVALIDARGUMENT"
    assert "temperature must be in" in run.stderr
    assert "\nparam: temperature\n" in run.stderr


@pytest.mark.parametrize("key", [(), ("--api-key", "another")], ids=["no key", "unknown key"])
def test_who_has_no_key_is_told_so(
    language: Language, secure: Watched, key: tuple[str, ...]
) -> None:
    assert secure.edge is not None
    target = ("--target", f"localhost:{secure.grpc_port}", "--ca", str(secure.edge.ca))
    run = language.run(language.calls, [*target, *key, "chat"])
    assert (run.returncode, run.stdout) == (1, "")
    assert status_of(run.stderr) == "UNAUTHENTICATED"


def test_a_certificate_of_another_authority_is_refused(
    language: Language, secure: Watched, stranger: Path
) -> None:
    run = language.run(
        language.calls,
        ["--target", f"localhost:{secure.grpc_port}", "--ca", str(stranger), "chat"],
    )
    assert (run.returncode, run.stdout) == (1, "")
    # Connect finds no better status for what Node.js tells it.
    refused = "INTERNAL" if language.name == "typescript" else "UNAVAILABLE"
    assert status_of(run.stderr) == refused, run.stderr


class FullServicer(InferenceServiceServicer):
    """Has no room for anybody."""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        raise OverloadedError("the queue is full", 2.5)
        yield


async def test_the_time_to_come_back_is_told(language: Language) -> None:
    async with running_server(
        lambda server: add_InferenceServiceServicer_to_server(FullServicer(), server),
        [pb.DESCRIPTOR.services_by_name["InferenceService"]],
        "localhost:0",
    ) as server:
        run = await asyncio.to_thread(
            language.run, language.calls, ["--target", f"localhost:{server.port}", "chat"]
        )
    assert (run.returncode, status_of(run.stderr)) == (1, "RESOURCEEXHAUSTED"), run.stderr
    assert "the queue is full" in run.stderr
    assert "\nretry after 2500 ms\n" in run.stderr


def test_nobody_listening_is_a_status_too(language: Language) -> None:
    run = language.run(language.calls, ["--target", "localhost:1", "chat"])
    assert (run.returncode, run.stdout) == (1, "")
    assert status_of(run.stderr) == "UNAVAILABLE"
