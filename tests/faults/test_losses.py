"""What clients see when a service dies under load: a pause, and the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import httpx
import psutil
import pytest

from tests.e2e.system import System, running_system
from tests.faults.processes import engine_process, service_process

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

NUM_TOKENS = 200


@dataclass(slots=True)
class Streamed:
    """What one stream brought."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def pair() -> Iterator[System]:
    """A system with two workers."""
    with running_system("--dp", "2") as system:
        yield system


def stream(system: System, index: int, started: Callable[[], object]) -> Streamed:
    """One long stream; calls `started` after its fifth chunk."""
    chunks = system.openai.chat.completions.create(
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
    streamed = Streamed()
    for number, chunk in enumerate(chunks):
        if number == 5:
            started()
        for choice in chunk.choices:
            streamed.text += choice.delta.content or ""
            if choice.logprobs is not None:
                streamed.logprobs += [entry.logprob for entry in choice.logprobs.content or ()]
    return streamed


def run_streams(system: System, number: int, fault: Callable[[], object]) -> list[Streamed]:
    """All streams to their ends; `fault` happens once, when every stream is under way."""
    under_way = Barrier(number, action=fault)
    with ThreadPoolExecutor(number) as pool:
        return list(
            pool.map(lambda index: stream(system, index, lambda: under_way.wait(60)), range(number))
        )


def assert_same(disturbed: list[Streamed], undisturbed: list[Streamed]) -> None:
    """Equal text, and as many equal log-probabilities as tokens."""
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one.text == other.text
        assert len(one.logprobs) == NUM_TOKENS
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.fixture
def num_streams(fault_scale: float) -> int:
    return max(4, round(32 * fault_scale))


@pytest.fixture
def undisturbed(pair: System, num_streams: int) -> list[Streamed]:
    return run_streams(pair, num_streams, lambda: None)


def num_migrations(system: System) -> float:
    """Choices that went on after their worker lost them, so far."""
    metrics = httpx.get(f"{system.url}/metrics").text
    name = "rhizome_gateway_migrations_total "
    return float(next(line for line in metrics.splitlines() if line.startswith(name)).split()[1])


def worker(system: System, index: int) -> psutil.Process:
    return service_process(system.process.pid, "services.worker", f"worker-{index}")


def test_a_killed_worker_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[Streamed]
) -> None:
    before = num_migrations(pair)
    assert_same(run_streams(pair, num_streams, lambda: worker(pair, 0).kill()), undisturbed)
    assert num_migrations(pair) > before


def test_a_killed_engine_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[Streamed]
) -> None:
    def kill() -> None:
        engine_process(worker(pair, 1)).kill()

    before = num_migrations(pair)
    assert_same(run_streams(pair, num_streams, kill), undisturbed)
    assert num_migrations(pair) > before


@pytest.mark.parametrize("module", ["services.scheduler", "services.cache_index"])
def test_a_killed_control_plane_service_is_not_noticed(
    pair: System, num_streams: int, undisturbed: list[Streamed], module: str
) -> None:
    def kill() -> None:
        service_process(pair.process.pid, module).kill()

    assert_same(run_streams(pair, num_streams, kill), undisturbed)


def test_a_killed_tokenizer_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[Streamed]
) -> None:
    def kill() -> None:
        service_process(pair.process.pid, "services.tokenizer").kill()

    assert_same(run_streams(pair, num_streams, kill), undisturbed)
