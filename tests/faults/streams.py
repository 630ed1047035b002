"""Streams under way while something fails, and what they must have brought all the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import pytest
from openai import OpenAI

NUM_TOKENS = 200
# Longest time that losing any process may cost a stream.
MAX_PAUSE_S = 3.0


@dataclass(slots=True)
class Streamed:
    """What one stream brought."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    # Longest time without a chunk, its first included.
    longest_gap_s: float = 0.0


def stream(
    client: OpenAI,
    index: int,
    started: Callable[[], object] = lambda: None,
    num_tokens: int = NUM_TOKENS,
) -> Streamed:
    """One long stream; calls `started` after its fifth chunk."""
    heard = time.monotonic()
    chunks = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"What is {index} plus {index}?"}],
        max_tokens=num_tokens,
        stream=True,
        # Every kind of state that must travel to another worker.
        temperature=0.7,
        seed=index,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logprobs=True,
        extra_body={
            "ignore_eos": True,
            "repetition_penalty": 1.05,
            "min_tokens": num_tokens // 2,
        },
    )
    streamed = Streamed()
    for number, chunk in enumerate(chunks):
        streamed.longest_gap_s = max(streamed.longest_gap_s, time.monotonic() - heard)
        if number == 5:
            started()
        heard = time.monotonic()
        for choice in chunk.choices:
            streamed.text += choice.delta.content or ""
            if choice.logprobs is not None:
                streamed.logprobs += [entry.logprob for entry in choice.logprobs.content or ()]
    return streamed


def run_streams(
    clients: Sequence[OpenAI], number: int, fault: Callable[[], object]
) -> list[Streamed]:
    """All streams to their ends, dealt out to the clients; `fault` happens once, when every stream
    is under way."""
    under_way = Barrier(number, action=fault)

    def run(index: int) -> Streamed:
        return stream(clients[index % len(clients)], index, lambda: under_way.wait(60))

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def run_rounds(
    clients: Sequence[OpenAI],
    number: int,
    fault: Callable[[], object],
    mend: Callable[[], object] | None = None,
    *,
    rounds: int = 4,
) -> list[Streamed]:
    """As `run_streams`, and each client goes on with `rounds` short ones: requests that are
    placed during and after the fault. `mend` happens once, when all have done half of them."""
    under_way = Barrier(number, action=fault)
    half_way = Barrier(number, action=mend)

    def run(index: int) -> list[Streamed]:
        client = clients[index % len(clients)]
        streams = [stream(client, index, lambda: under_way.wait(60))]
        for turn in range(1, rounds + 1):
            if mend is not None and turn == rounds // 2 + 1:
                half_way.wait(60)
            streams.append(stream(client, index + number * turn, num_tokens=20))
        return streams

    with ThreadPoolExecutor(number) as pool:
        return [streamed for streams in pool.map(run, range(number)) for streamed in streams]


def assert_same(disturbed: list[Streamed], undisturbed: list[Streamed]) -> None:
    """Equal text, and equal log-probabilities."""
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one.text == other.text
        assert len(one.logprobs) == len(other.logprobs) > 0
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def longest_gap_s(streams: Sequence[Streamed]) -> float:
    return max(streamed.longest_gap_s for streamed in streams)


def assert_pause(disturbed: Sequence[Streamed], undisturbed: Sequence[Streamed]) -> None:
    """No stream was silent for longer than a fault may take, beyond what it is anyway."""
    longest, usual = longest_gap_s(disturbed), longest_gap_s(undisturbed)
    print(f"longest gap {longest:.2f} s, else {usual:.2f} s")
    assert longest <= MAX_PAUSE_S + usual


def without_rounds(streams: Sequence[Streamed], *, rounds: int = 4) -> list[Streamed]:
    """Of what `run_rounds` gave, what `run_streams` would have given."""
    return list(streams[:: rounds + 1])
