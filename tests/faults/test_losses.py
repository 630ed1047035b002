"""What clients see when a service dies under load: a pause, and the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import psutil
import pytest

from tests.e2e.system import System, running_system
from tests.faults.processes import engine_process, service_process

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

NUM_TOKENS = 200


@pytest.fixture(scope="module")
def pair() -> Iterator[System]:
    """A system with two workers."""
    with running_system("--dp", "2") as system:
        yield system


def stream_ids(system: System, index: int, started: Callable[[], None]) -> tuple[str, int]:
    """Text and number of chunks of one long stream; calls `started` after its fifth chunk."""
    stream = system.openai.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"What is {index} plus {index}?"}],
        max_tokens=NUM_TOKENS,
        stream=True,
        # Every kind of state that must travel to another worker.
        temperature=0.7,
        seed=index,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logprobs=True,
        extra_body={"ignore_eos": True, "repetition_penalty": 1.05, "min_tokens": 100},
    )
    text, num_chunks = [], 0
    for chunk in stream:
        if not chunk.choices:
            continue
        num_chunks += 1
        if num_chunks == 5:
            started()
        text.append(chunk.choices[0].delta.content or "")
        logprobs = chunk.choices[0].logprobs
        text.extend(f"[{entry.logprob:.3f}]" for entry in (logprobs and logprobs.content) or ())
    return "".join(text), num_chunks


def run_streams(system: System, number: int, fault: Callable[[], None]) -> list[str]:
    """All streams' texts; `fault` happens once, when every stream is under way."""
    under_way = Barrier(number, action=fault)
    with ThreadPoolExecutor(number) as pool:
        streams = [
            pool.submit(stream_ids, system, index, lambda: under_way.wait(60) and None)
            for index in range(number)
        ]
        return [stream.result()[0] for stream in streams]


@pytest.fixture
def num_streams(fault_scale: float) -> int:
    return max(4, round(32 * fault_scale))


@pytest.fixture
def undisturbed(pair: System, num_streams: int) -> list[str]:
    return run_streams(pair, num_streams, lambda: None)


def worker(system: System, index: int) -> psutil.Process:
    return service_process(system.process.pid, "services.worker", f"worker-{index}")


def test_a_killed_worker_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[str]
) -> None:
    assert run_streams(pair, num_streams, lambda: worker(pair, 0).kill()) == undisturbed


def test_a_killed_engine_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[str]
) -> None:
    def kill() -> None:
        engine_process(worker(pair, 1)).kill()

    assert run_streams(pair, num_streams, kill) == undisturbed


@pytest.mark.parametrize("module", ["services.scheduler", "services.cache_index"])
def test_a_killed_control_plane_service_is_not_noticed(
    pair: System, num_streams: int, undisturbed: list[str], module: str
) -> None:
    def kill() -> None:
        service_process(pair.process.pid, module).kill()

    assert run_streams(pair, num_streams, kill) == undisturbed


def test_a_killed_tokenizer_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[str]
) -> None:
    def kill() -> None:
        service_process(pair.process.pid, "services.tokenizer").kill()

    assert run_streams(pair, num_streams, kill) == undisturbed
